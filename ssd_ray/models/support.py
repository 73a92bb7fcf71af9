"""Which models can work with slot-addressed KV, as far as a config.json tells."""

from __future__ import annotations

from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, LinearAttentionLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ssd_ray.errors import UnsupportedModelError

ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})

RECURRENT_LAYERS = frozenset({"linear_attention", "conv", "hybrid", "mamba", "mlp", "moe"})
"""Kinds of layers, beside those of attention, of models that keep a state or nothing."""

OTHER_WINDOWS = ("keep_window_size", "sliding_window_size", "window_size", "local_attention_window_len")
"""Fields of configs whose layers see, from so many tokens on, what no mask of ours says."""


def max_positions(config: PreTrainedConfig) -> int | None:
    """Positions that a model can take, or None if its config sets no limit."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def refuse_unsupported(
    config: PreTrainedConfig, role: str, length: int | None = None, *, trusted: bool = False
) -> None:
    """Refuse an architecture that cannot work, naming the reason; with ``length`` also one that cannot at that length.
    ``trusted`` says whether code that comes with a model may run.

    Raises:
        UnsupportedModelError: see the message.
    """
    reason = _kind_reason(config, trusted) or _layers_reason(config)
    if reason is None and length is not None:
        reason = _length_reason(config, length)
    if reason is not None:
        raise UnsupportedModelError(f"{role}: {config.model_type} models cannot be served: {reason}")


def is_recurrent(config: PreTrainedConfig) -> bool:
    """Whether models of this config keep states in transformers' own cache."""
    try:
        layers = DynamicCache(config=config).layers
    except Exception:  # a config of foreign code, that says nothing of layers
        return False
    return any(isinstance(layer, LinearAttentionLayer) for layer in layers)


def _kind_reason(config: PreTrainedConfig, trusted: bool) -> str | None:
    if config.is_encoder_decoder:
        return "encoder-decoder models are not causal language models"
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return None if trusted else "their code comes with them, which only trust_remote_code=True runs"
    if kind is None:
        return "transformers has no causal language model for this config"
    if getattr(kind, "_is_stateful", False) and not is_recurrent(config):
        return "their recurrent state is kept where it cannot be rolled back"
    return None


def _layers_reason(config: PreTrainedConfig) -> str | None:
    known = ATTENTION_LAYERS | RECURRENT_LAYERS if is_recurrent(config) else ATTENTION_LAYERS
    other = set(getattr(config.get_text_config(), "layer_types", None) or ()) - known
    if other:
        return f"what their layers of type {', '.join(sorted(other))} keep cannot be addressed by slot or rolled back"
    return None


def _length_reason(config: PreTrainedConfig, length: int) -> str | None:
    text = config.get_text_config()
    limits = {name: getattr(text, name, None) for name in OTHER_WINDOWS}
    if getattr(text, "attn_temperature_tuning", False):  # scaled by the length of the cache, which ours does not have
        limits["floor_scale"] = getattr(text, "floor_scale", None)
    for name, limit in limits.items():
        if isinstance(limit, int | float) and 0 < limit < length:
            return f"{name}={limit:g} is shorter than the context of {length}; set max_model_len to at most {limit:g}"
    return None
