"""Heads of EAGLE-3 in folders, in both formats, and one in plain torch to compare with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

HEADS, KV_HEADS, THETA, EPSILON = 4, 2, 10_000.0, 1e-6


def layer_config(target: PreTrainedConfig, **overrides: Any) -> dict[str, Any]:
    """What a config says of a head's own layer."""
    return {
        "model_type": "llama",
        "vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": target.hidden_size // HEADS,
        "max_position_embeddings": target.max_position_embeddings,
        "rms_norm_eps": EPSILON,
        "rope_theta": THETA,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    } | overrides


def authors_config(layer: Mapping[str, Any], draft_vocab: int, **overrides: Any) -> dict[str, Any]:
    """As EAGLE's authors and SGLang have it."""
    return {**layer, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": draft_vocab} | overrides


def speculators_config(layer: Mapping[str, Any], draft_vocab: int, **overrides: Any) -> dict[str, Any]:
    """As the library speculators has it."""
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "target"}},
        "transformer_layer_config": dict(layer),
        "draft_vocab_size": draft_vocab,
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": None,
    } | overrides


def random_weights(
    layer: Mapping[str, Any], draft_vocab: int, *, seed: int = 0, embeds: bool = True, read: int | None = None
) -> dict[str, Tensor]:
    """Weights by the names of the authors; the draft's tokens are the last ones of the target."""
    hidden, inner, vocab = layer["hidden_size"], layer["intermediate_size"], layer["vocab_size"]
    narrow = hidden * KV_HEADS // HEADS
    shapes = {
        "fc.weight": (hidden, read or 3 * hidden),
        "midlayer.self_attn.q_proj.weight": (hidden, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (narrow, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (narrow, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, hidden),
        "midlayer.mlp.gate_proj.weight": (inner, hidden),
        "midlayer.mlp.up_proj.weight": (inner, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, inner),
        "lm_head.weight": (draft_vocab, hidden),
        **({"embed_tokens.weight": (vocab, hidden)} if embeds else {}),
    }
    random = torch.Generator().manual_seed(seed)
    weights = {name: 0.3 * torch.randn(shape, generator=random) for name, shape in shapes.items()}
    for name in ("midlayer.input_layernorm", "midlayer.hidden_norm", "midlayer.post_attention_layernorm", "norm"):
        weights[f"{name}.weight"] = 1.0 + 0.2 * torch.randn(hidden, generator=random)
    if draft_vocab < vocab:
        weights["d2t"] = torch.full((draft_vocab,), vocab - draft_vocab, dtype=torch.int64)
        weights["t2d"] = torch.arange(vocab) >= vocab - draft_vocab
    return weights


def save_head(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """Write a head in the format of its config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if "speculators_model_type" in config:
        weights = {name.replace("midlayer.", "layers.0."): weight for name, weight in weights.items()}
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    return str(folder)


@dataclass
class PlainHead:
    """A head in plain torch, one token after the other. Tokens and the states before them come from outside.

    Attributes:
        weights: by the names of the authors.
        before_residual: the layer adds to the normed state.
        logits, states: after each token, the latter being the head's own.
    """

    weights: Mapping[str, Tensor]
    before_residual: bool = False
    logits: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    _keys: list[Tensor] = field(default_factory=list)
    _values: list[Tensor] = field(default_factory=list)

    def combine(self, states: Tensor) -> Tensor:
        """The state to go on from, of the target's."""
        return states @ self.weights["fc.weight"].T

    def step(self, token: int, state: Tensor) -> Tensor:
        """Run the next token with the state before it; returns the head's own state."""
        layer = {name.removeprefix("midlayer."): weight for name, weight in self.weights.items()}
        position = len(self.states)
        normed = _norm(state, layer["hidden_norm.weight"])
        wide = torch.cat([_norm(layer["embed_tokens.weight"][token], layer["input_layernorm.weight"]), normed])
        query, key, value = (layer[f"self_attn.{name}_proj.weight"] @ wide for name in "qkv")
        query, key = _turned(query.view(HEADS, -1), position), _turned(key.view(KV_HEADS, -1), position)
        self._keys.append(key)
        self._values.append(value.view(KV_HEADS, -1))
        first = min(position, 1)  # nobody sees the first token
        keys, values = (
            torch.stack(kept[first:]).repeat_interleave(HEADS // KV_HEADS, 1) for kept in (self._keys, self._values)
        )
        weights = torch.einsum("hd,nhd->hn", query, keys).mul(query.shape[-1] ** -0.5).softmax(-1)
        attended = torch.einsum("hn,nhd->hd", weights, values).flatten()
        state = (normed if self.before_residual else state) + layer["self_attn.o_proj.weight"] @ attended
        inner = _norm(state, layer["post_attention_layernorm.weight"])
        inner = F.silu(layer["mlp.gate_proj.weight"] @ inner) * (layer["mlp.up_proj.weight"] @ inner)
        state = state + layer["mlp.down_proj.weight"] @ inner
        self.states.append(state)
        self.logits.append(layer["lm_head.weight"] @ _norm(state, layer["norm.weight"]))
        return state

    def text(self, tokens: Sequence[int], read: Tensor | None = None) -> Tensor:
        """Logits [n, V] after each token of a text, of whose first tokens the target's states, [m, all], were read."""
        known = [] if read is None else list(self.combine(read))
        state = torch.zeros(self.weights["fc.weight"].shape[0], dtype=self.weights["fc.weight"].dtype)
        for position, token in enumerate(tokens):
            state = self.step(token, known[position - 1] if 0 < position <= len(known) else state)
        return torch.stack(self.logits)


def _norm(state: Tensor, weight: Tensor) -> Tensor:
    return weight * state * torch.rsqrt(state.pow(2).mean() + EPSILON)


def _turned(heads: Tensor, position: int) -> Tensor:
    """Rotated by its position, [heads, dim]."""
    half = heads.shape[-1] // 2
    angles = position * THETA ** (-torch.arange(half, dtype=heads.dtype) / half)
    one, other = heads[:, :half], heads[:, half:]
    return torch.cat([one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin()], -1)
