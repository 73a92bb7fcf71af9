"""Which architectures of the installed transformers can be served: a small model of each is made and run.

A small random model shows what a large one does: what its layers keep, and whether they obey masks and positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ssd_ray.errors import SsdRayError
from ssd_ray.models.runner import HFRunner
from ssd_ray.models.sources import silence
from ssd_ray.models.support import refuse_unsupported

LENGTH, WINDOW = 64, 16

MOST_PARAMETERS = 20_000_000
"""Of a small model."""

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
}  # fmt: skip
"""Fields of configs, and how small they are made where a config has them."""


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture and what became of a small model of it.

    Attributes:
        name: what transformers calls it.
        verdict: "works", "refused", or "unknown" where no small model could be made.
        reason: why it is refused or unknown.
    """

    name: str
    verdict: str
    reason: str = ""


def survey() -> Iterator[Family]:
    """Try every causal language model that transformers has, one after the other."""
    kinds = {config: name for name, config in CONFIG_MAPPING.items()}
    for config in MODEL_FOR_CAUSAL_LM_MAPPING:
        if config in kinds:
            yield try_family(kinds[config])


def try_family(name: str) -> Family:
    """Make a small model of an architecture and see whether it can be served."""
    try:
        with silence():
            config = small_config(name)
    except Exception as error:  # a config says in its own way that sizes do not fit it
        return Family(name, "unknown", f"no small config: {_line(error)}")
    try:
        refuse_unsupported(config, "target")
        _require_small(config)
        with silence(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            HFRunner(model, rows=2, max_length=LENGTH, scratch=16)
    except SsdRayError as error:
        return Family(name, "refused", _line(error).partition("cannot be served: ")[2] or _line(error))
    except Exception as error:  # as above
        return Family(name, "unknown", f"no small model: {_line(error)}")
    return Family(name, "works")


def _require_small(config: PreTrainedConfig) -> None:
    """Not all sizes of all configs have a name that is known here."""
    with torch.device("meta"), silence():
        model = AutoModelForCausalLM.from_config(config)
    if (count := sum(weight.numel() for weight in model.parameters())) > MOST_PARAMETERS:
        raise ValueError(f"it would have {count:,} parameters")


def small_config(name: str) -> PreTrainedConfig:
    """A config of an architecture with few and small layers."""
    usual = CONFIG_MAPPING[name]()
    sizes = {field: size for field, size in SIZES.items() if getattr(usual, field, None) is not None}
    return CONFIG_MAPPING[name](**sizes)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
