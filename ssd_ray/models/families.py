"""Which architectures of the installed transformers can be served: a small model of each is made and run.

A small random model shows what a large one does: what its layers keep, and whether they obey masks and positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ssd_ray.errors import ConfigError, SsdRayError
from ssd_ray.models.info import count_parameters
from ssd_ray.models.runners import make_runner
from ssd_ray.models.sources import silence
from ssd_ray.models.support import refuse_unsupported

LENGTH, WINDOW = 64, 16

MOST_PARAMETERS = 20_000_000
"""Of a small model."""

MOST_WORDS = 160
"""Characters of a reason."""

SIZES: dict[str, Any] = {
    "vocab_size": 64, "vocab_size_per_layer_input": 64, "max_position_embeddings": LENGTH, "n_positions": LENGTH,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32, "hidden_size_per_layer_input": 8,
    "intermediate_size": 48, "ffn_dim": 48, "d_ff": 48, "moe_intermediate_size": 16, "intermediate_size_mlp": 48,
    "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16, "dense_intermediate_size": 48,
    "num_hidden_layers": 4, "num_layers": 4, "n_layer": 4, "n_layers": 4, "decoder_layers": 4,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "global_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "query_pre_attn_scalar": 8, "rotary_dim": 8,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW, "num_kv_shared_layers": 0, "laurel_rank": 4, "pad_token_id": 0,
    "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False,
    "state_size": 8, "ssm_state_size": 8, "mamba_d_state": 8, "expand": 1, "n_groups": 1, "chunk_size": 4,
    "mamba_n_heads": 8, "n_mamba_heads": 8, "mamba_num_heads": 8, "mamba_d_head": 8, "mamba_headdim": 8,
    "mamba_head_dim": 8, "mamba_d_ssm": 64, "mamba_n_groups": 1, "mamba_ngroups": 1, "mamba_dt_rank": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
}  # fmt: skip
"""Fields of configs, and how small they are made where a config has them."""


HEADINGS = {
    "works": "Served: logits over scattered KV are those of the model's own attention",
    "refused": "Refused, with the reason",
    "unknown": "Not tried: no small model could be made",
}


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture and what became of a small model of it.

    Attributes:
        name: what transformers calls it.
        verdict: "works", "refused", or "unknown" where no small model of it could be made.
        reason: why it is refused, or could not be tried.
    """

    name: str
    verdict: str
    reason: str = ""


def survey(names: Sequence[str] | None = None) -> Iterator[Family]:
    """Try architectures, one after the other; None is every causal language model that transformers has.

    Raises:
        ConfigError: transformers has no such architecture.
    """
    known = {name for name, config in CONFIG_MAPPING.items() if config in MODEL_FOR_CAUSAL_LM_MAPPING}
    for name in names or ():
        if name not in known:
            raise ConfigError("name", "a causal language model of transformers", name)
    yield from map(try_family, names or sorted(known))


def document(families: Sequence[Family]) -> str:
    """What was found, as a page of Markdown."""
    parts = [f"# Models\n\nMade by `ssd-ray models --markdown` with transformers {transformers.__version__}.\n"]
    for verdict, heading in HEADINGS.items():
        some = [family for family in families if family.verdict == verdict]
        names = ", ".join(f"`{family.name}`" for family in some)
        lines = [f"- `{family.name}`: {family.reason}" for family in some]
        parts.append(f"## {heading} ({len(some)})\n\n" + (names if verdict == "works" else "\n".join(lines)) + "\n")
    return "\n".join(parts)


def try_family(name: str) -> Family:
    """Make a small model of an architecture and see whether it can be served."""
    try:
        usual = CONFIG_MAPPING[name]()
        refuse_unsupported(usual, "target")
        model = small_model(name, usual)
        make_runner(model, rows=2, max_length=LENGTH, scratch=16)
    except SsdRayError as error:
        return Family(name, "refused", _line(error).partition("cannot be served: ")[2] or _line(error))
    except Exception as error:  # a config says in its own way that sizes do not fit it
        return Family(name, "unknown", _line(error))
    return Family(name, "works")


def small_model(name: str, usual: PreTrainedConfig) -> PreTrainedModel:
    """A random model of an architecture whose ``usual`` config is this one, with few and small layers, which runs.

    Raises:
        Exception: none of the sizes that are tried fits the architecture.
    """
    known = {field: size for field, size in SIZES.items() if _has(usual, field)}
    open_ones = {field: size for field, size in SIZES.items() if field in usual.to_dict()}
    bare = [{k: v for k, v in some.items() if k != "head_dim"} for some in (known, open_ones)]
    kinds = _layer_kinds(usual)
    tries = [*(some | kinds for some in (known, open_ones, *bare) if kinds), known, open_ones, *bare]
    with silence(), torch.random.fork_rng(devices=[]):
        for sizes in tries[:-1]:
            with suppress(Exception):
                return _made(name, sizes)
        return _made(name, tries[-1])


def _layer_kinds(usual: PreTrainedConfig) -> dict[str, Any]:
    """Layers of all kinds that a config has, and attention beside those that are recurrent, one after the other."""
    count = SIZES["num_hidden_layers"]
    for field in ("layer_types", "layers_block_type"):
        kinds: list[str] = list(dict.fromkeys(usual.to_dict().get(field) or ()))
        kinds += ["full_attention"] if kinds == ["linear_attention"] else []
        if len(kinds) > 1:
            return {field: (kinds * count)[:count]}
    return {"attn_layer_indices": [1]} if "attn_layer_indices" in usual.to_dict() else {}


def _has(config: PreTrainedConfig, field: str) -> bool:
    try:
        return getattr(config, field, None) is not None
    except Exception:  # it has one for each layer
        return True


def _made(name: str, sizes: dict[str, Any]) -> PreTrainedModel:
    config = CONFIG_MAPPING[name](**sizes)
    _require_small(config)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.inference_mode():
        model(input_ids=torch.ones(1, 2, dtype=torch.int64), use_cache=False)
    return model


def _require_small(config: PreTrainedConfig) -> None:
    """Not all sizes of all configs have a name that is known here."""
    if (count := count_parameters(config)) > MOST_PARAMETERS:
        raise ValueError(f"no small model of it can be made: it would have {count:,} parameters")


def _line(error: Exception) -> str:
    said = " ".join(str(error).split())
    return (said[:MOST_WORDS] + ".." if len(said) > MOST_WORDS else said) or type(error).__name__
