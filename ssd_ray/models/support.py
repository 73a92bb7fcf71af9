"""Which models can work with slot-addressed KV, as far as a config.json tells."""

from __future__ import annotations

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ssd_ray.errors import UnsupportedModelError

ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})


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
        reason = _window_reason(config, length)
    if reason is not None:
        raise UnsupportedModelError(f"{role}: {config.model_type} models cannot be served: {reason}")


def _kind_reason(config: PreTrainedConfig, trusted: bool) -> str | None:
    if config.is_encoder_decoder:
        return "encoder-decoder models are not causal language models"
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return None if trusted else "their code comes with them, which only trust_remote_code=True runs"
    if kind is None:
        return "transformers has no causal language model for this config"
    if getattr(kind, "_is_stateful", False):
        return "their recurrent state cannot be rolled back"
    return None


def _layers_reason(config: PreTrainedConfig) -> str | None:
    other = set(getattr(config.get_text_config(), "layer_types", None) or ()) - ATTENTION_LAYERS
    if other:
        return f"what their layers of type {', '.join(sorted(other))} keep cannot be addressed by slot or rolled back"
    return None


def _window_reason(config: PreTrainedConfig, length: int) -> str | None:
    name, window = shortest_window(config)
    if window is None or window >= length:
        return None
    return f"{name}={window} is shorter than the context of {length}; set max_model_len to at most {window}"


def shortest_window(config: PreTrainedConfig) -> tuple[str, int | None]:
    """The field of the config that limits how far a layer sees back, and its value; None if all see everything."""
    text = config.get_text_config()
    layers = getattr(text, "layer_types", None)
    kinds = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    used = {name: getattr(text, name, None) for kind, name in kinds.items() if layers is None or kind in layers}
    windows = [(window, name) for name, window in used.items() if isinstance(window, int)]
    window, name = min(windows, default=(None, ""))
    return name, window
