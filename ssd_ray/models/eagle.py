"""A head of EAGLE-3 as a causal LM that transformers' and our machinery run like any other.

It reads tokens, and before each of them the hidden state of the one before it, which lies in a
:class:`~ssd_ray.models.memory.Memory`. Its first layer attends over (token, state before it), side by side;
what comes out of the last one is the head's own hidden state of the token, from which it can go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding

from ssd_ray.errors import ModelError
from ssd_ray.models.checkpoint import few
from ssd_ray.models.graphs import cache_name
from ssd_ray.models.heads import Head
from ssd_ray.models.memory import HeadModel, Memory, keep_after, mask_of_text, states_before

PARTS: dict[str, tuple[Any, Any, Any]] = {
    "llama": (LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding),
    "qwen3": (Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding),
}
"""Of each family: a layer, a norm and rotary frequencies."""


class EagleHead(HeadModel):
    """The whole head.

    Args:
        config: ``head.config``.
        head: what it is like.
    """

    def __init__(self, config: PreTrainedConfig, head: Head) -> None:
        super().__init__(config)
        self.body = EagleBody(config, head)
        self.lm_head = nn.Linear(config.hidden_size, head.draft_vocab_size, bias=False)
        self.reads = self.body.fc.in_features
        self.register_buffer("d2t", torch.zeros(head.draft_vocab_size, dtype=torch.int64))

    def combine(self, states: Tensor) -> Tensor:
        """The state to go on from, [tokens, hidden], of the target's, [tokens, ``reads``]."""
        combined: Tensor = self.body.combine(states)
        return combined

    def get_input_embeddings(self) -> nn.Embedding:
        """Of the target's tokens."""
        embedding: nn.Embedding = self.body.embed_tokens
        return embedding

    @property
    def proposed(self) -> Tensor:
        """The target's tokens for the head's own, int64 [draft vocabulary]."""
        offsets: Tensor = self.d2t
        return torch.arange(len(offsets), device=offsets.device) + offsets


class EagleBody(nn.Module):
    """All of a head but its output layer."""

    def __init__(self, config: PreTrainedConfig, head: Head) -> None:
        super().__init__()
        layer, norm, rotary = PARTS[config.model_type]
        self.config = config
        hidden, read, epsilon = config.hidden_size, head.states * head.target_hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        self.fc = nn.Linear(read, hidden, bias=bool(getattr(config, "bias", False)))
        self.input_norm = norm(read, eps=epsilon) if head.norm_before_fc else None
        norms = [norm(head.target_hidden_size, eps=epsilon) for _ in range(head.states)]
        self.fc_norm = nn.ModuleList(norms) if head.fc_norm else None
        others = [layer(config, index) for index in range(1, config.num_hidden_layers)]
        first = FirstLayer(config, head)
        self.layers = nn.ModuleList([first, *others])
        self.norm = norm(hidden, eps=epsilon)
        self.rotary_emb = rotary(config)
        self.memory: Memory | None = None
        self._keeps_normed = head.norm_output
        self._cache_name = cache_name(first.self_attn)

    @property
    def dtype(self) -> torch.dtype:
        """That of its weights."""
        return self.norm.weight.dtype  # type: ignore[no-any-return]

    def combine(self, states: Tensor) -> Tensor:
        """The state to go on from, [tokens, hidden], of the target's, [tokens, all that is read]."""
        if self.input_norm is not None:
            states = self.input_norm(states)
        if self.fc_norm is not None:
            parts = states.chunk(len(self.fc_norm), -1)
            states = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], -1)
        combined: Tensor = self.fc(states)
        return combined

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """The normed states after the last layer; arguments as transformers has them."""
        tokens = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(tokens.shape[1], device=tokens.device)[None]
        if attention_mask is None:
            attention_mask = mask_of_text(tokens)
        states = states_before(tokens, self.memory)
        common = {
            "attention_mask": attention_mask,
            "position_embeddings": self.rotary_emb(tokens, position_ids),
            "position_ids": position_ids,
            self._cache_name: past_key_values,
        }
        first, *others = self.layers
        states = first(tokens, states, **common)
        for layer in others:
            states = layer(states, **common)
        normed = self.norm(states)
        keep_after(normed if self._keeps_normed else states, self.memory)
        return BaseModelOutput(last_hidden_state=normed)


class FirstLayer(nn.Module):
    """A decoder layer that attends over tokens and the states before them, and goes on from the latter."""

    def __init__(self, config: PreTrainedConfig, head: Head) -> None:
        super().__init__()
        layer, norm, _ = PARTS[config.model_type]
        own = layer(config, 0)
        self.self_attn, self.mlp = own.self_attn, own.mlp
        for name in ("q_proj", "k_proj", "v_proj"):
            narrow = getattr(self.self_attn, name)
            wide = nn.Linear(2 * config.hidden_size, narrow.out_features, bias=narrow.bias is not None)
            setattr(self.self_attn, name, wide)
        self.input_layernorm = norm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = norm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = norm(config.hidden_size, eps=config.rms_norm_eps)
        self._adds_to_normed = head.norm_before_residual

    def forward(self, tokens: Tensor, states: Tensor, **common: Any) -> Tensor:
        """States [R, T, hidden] after tokens [R, T, hidden] with the states before them."""
        normed = self.hidden_norm(states)
        residual = normed if self._adds_to_normed else states
        attended, _ = self.self_attn(torch.cat([self.input_layernorm(tokens), normed], -1), **common)
        states = residual + attended
        return states + self.mlp(self.post_attention_layernorm(states))  # type: ignore[no-any-return]


def make_head(head: Head, weights: Mapping[str, Tensor], target: Mapping[str, Tensor], dtype: torch.dtype) -> EagleHead:
    """A head of weights as they are published.

    Args:
        weights: by the names of either format.
        target: what a head may lack, of its target's: "embed_tokens.weight" and "lm_head.weight".

    Raises:
        ModelError: weights are missing, or have another shape.
    """
    state = _in_our_names(head, weights, target)
    with torch.device("meta"):
        model = EagleHead(head.config, head)
    wanted = dict(model.state_dict())
    if missing := wanted.keys() - state.keys():
        raise ModelError(f"draft: the head lacks weights: {few(missing)}")
    if wrong := [name for name, tensor in wanted.items() if state[name].shape != tensor.shape]:
        shapes = few(f"{name} ({tuple(state[name].shape)}, not {tuple(wanted[name].shape)})" for name in wrong)
        raise ModelError(f"draft: the head has weights of another shape than its config says: {shapes}")
    model.load_state_dict({name: state[name] for name in wanted}, assign=True)
    model.body.rotary_emb = PARTS[head.config.model_type][2](head.config)  # its buffers are in no file
    made: EagleHead = model.to(dtype)
    return made


def _in_our_names(head: Head, weights: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    given = {name.removeprefix("model.").replace("midlayer.", "layers.0."): weight for name, weight in weights.items()}
    given.pop("t2d", None)
    given.setdefault("d2t", torch.zeros(head.draft_vocab_size, dtype=torch.int64))
    proposed = torch.arange(len(given["d2t"])) + given["d2t"]
    if "embed_tokens.weight" in target:
        given.setdefault("embed_tokens.weight", target["embed_tokens.weight"])
    if "lm_head.weight" in target:
        given.setdefault("lm_head.weight", target["lm_head.weight"][proposed])
    outside = ("lm_head.", "d2t")
    return {name if name.startswith(outside) else f"body.{name}": weight for name, weight in given.items()}
