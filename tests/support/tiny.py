"""Tiny random models in folders: config, weights and a tokenizer, loadable like any checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "granite", "olmo2", "gpt2")

WINDOW = 24
"""Tokens that layers with a window see, and those of a chunk."""

_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
_SHARED = {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8}

DETAILS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {"attn_logit_softcapping": 2.0},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "cohere2": _ALTERNATING | {"sliding_window": WINDOW},
    "olmo3": _ALTERNATING | {"sliding_window": WINDOW},
    "gpt_oss": {
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "llama4_text": {
        "attention_chunk_size": WINDOW,
        "num_hidden_layers": 4,
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
        "head_dim": 8,
    },
    "gemma3n_text": _ALTERNATING
    | _SHARED
    | {"laurel_rank": 4, "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": _ALTERNATING | _SHARED | {"global_head_dim": 16},
    "mixtral": {"sliding_window": WINDOW, "num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 12,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}
"""What families have of their own, small."""

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}

RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "qwen3_next": _LINEAR
    | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    | {"shared_expert_intermediate_size": 16},
    "qwen3_5_text": _LINEAR | {"head_dim": 8},
    "olmo_hybrid": _LINEAR,
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64, "head_dim": 8},
    "granitemoehybrid": _MAMBA
    | {"layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 48},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp"],
        "num_hidden_layers": 3,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 4,
        "head_dim": 8,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "mamba_d_state": 8,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "mamba_ngroups": 1,
        "chunk_size": 4,
    },
}
"""The same of families with recurrent layers."""

FAMILIES = (*ARCHITECTURES, *sorted({*DETAILS} - {*ARCHITECTURES}))
"""Windows, chunks, soft caps, sinks, shared and compressed KV, head sizes by layer, experts."""

EOS = 0


def tiny_config(architecture: str, *, vocab: int = 96, context: int = 128, layers: int = 2, **overrides: Any) -> Any:
    """A config small enough for milliseconds; weights are drawn wide, so that logits depend on what is attended to."""
    values: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": None,
        "dtype": "float32",
    }
    if architecture.startswith("gemma"):
        values |= {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
    if architecture == "gpt2":
        values = {key: values[key] for key in ("vocab_size", "initializer_range", "eos_token_id", "dtype")}
        values |= {"n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": context, "bos_token_id": EOS}
    own = DETAILS.get(architecture, {}) | RECURRENT.get(architecture, {})
    return AutoConfig.for_model(architecture, **(values | own | overrides))


def tiny_model(architecture: str = "llama", *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random model in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(architecture, **config))
    return model.eval()


def tiny_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """One token a byte, blanks and ASCII first; token 0 ends a text. Bytes beyond ``vocab`` are dropped."""
    characters = sorted(
        pre_tokenizers.ByteLevel.alphabet(), key=lambda text: (text not in "ĠĊ", len(text.encode()), text)
    )
    words = ["<|end|>", *characters, *(f"<|{number}|>" for number in range(vocab))][:vocab]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def save_model(folder: Path, model: PreTrainedModel) -> Path:
    """Write config, weights and tokenizer."""
    model.save_pretrained(folder)
    tiny_tokenizer(model.config.vocab_size).save_pretrained(folder)
    return folder


def tiny_pair(
    tmp_path: Path,
    architecture: str = "llama",
    *,
    vocab: int = 96,
    context: int = 128,
    noise: float = 0.02,
    seed: int = 0,
) -> tuple[str, str]:
    """A target and a draft in folders. The draft is the target with ``noise`` (relative) on its weights: it agrees
    often, not always."""
    target = tiny_model(architecture, vocab=vocab, context=context, seed=seed)
    save_model(tmp_path / "target", target)
    random = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for weight in target.parameters():
            weight += noise * weight.std(correction=0) * torch.randn(weight.shape, generator=random)
    save_model(tmp_path / "draft", target)
    return str(tmp_path / "target"), str(tmp_path / "draft")


def with_weights(source: str | Path, folder: Path, changes: Mapping[str, Tensor | None]) -> None:
    """A copy of a model with other weights; None takes one away."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors") | dict(changes)
    kept = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(kept, folder / "model.safetensors")
