"""The two shapes, and how a shallow model becomes a deep one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Shape:
    """The shape of one model of the pair."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int


TARGET = Shape(layers=20, hidden=256, intermediate=704, heads=4, kv_heads=2)
DRAFT = Shape(layers=2, hidden=192, intermediate=512, heads=3, kv_heads=1)


def new_model(shape: Shape, layers: int, vocab_size: int, length: int) -> Any:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab_size, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads, max_position_embeddings=length, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=None,
    ))  # fmt: skip


@torch.no_grad()
def grow(model: Any, shape: Shape, layers: int) -> Any:
    """A deeper model that computes the same function: each layer is followed by copies whose outputs start at zero."""
    config = model.config
    old = len(model.model.layers)
    deeper = new_model(shape, layers, config.vocab_size, config.max_position_embeddings)
    deeper.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    deeper.model.norm.load_state_dict(model.model.norm.state_dict())
    for index, layer in enumerate(deeper.model.layers):
        origin = index * old // layers
        layer.load_state_dict(model.model.layers[origin].state_dict())
        if index != -(-origin * layers // old):
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return deeper
