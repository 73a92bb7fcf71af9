"""Drafts made of their target: some of its layers, in its width or in a narrower one, with its embeddings and head."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from ssd_ray.models.describe import at_best
from ssd_ray.models.sources import silence

COPIED = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Architectures whose layers are copied. A draft for any other begins with layers drawn at random, as Llama's."""

A_LAYER = 500_000
"""Numbers that could be read while the operations of one layer are started: what a narrow layer costs at least."""

SHAPES = ((1.0, 0.25), (0.5, 0.15), (0.25, 0.08))
"""How wide drafts are, of the target's width, and what a step of them takes at most, of a verification. One layer each
has in any case."""

HEAD = 64
"""Numbers of an attention head, where they are free to choose."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a draft.

    Attributes:
        layers: how many.
        width: its hidden size; the target's own, or less.
    """

    layers: int
    width: int

    def copied(self, depth: int) -> list[int]:
        """Which layers of a target of that depth it begins as: the first ones, and the last."""
        last = min(1, self.layers - 1) if self.layers < 4 else 2
        return [*range(self.layers - last), *range(depth - last, depth)]


@dataclass(frozen=True, slots=True)
class Costs:
    """What a target's forward reads, in numbers, and what a draft's would."""

    hidden: int
    depth: int
    a_layer: int
    head: int
    total: int

    @classmethod
    def of(cls, config: PreTrainedConfig, parameters: int) -> Costs:
        """Of a target with so many parameters; an embedding that is no head, too, is looked up, not read."""
        text = config.get_text_config()
        table = text.vocab_size * text.hidden_size
        total = parameters - (0 if text.tie_word_embeddings else table)
        depth = text.num_hidden_layers
        dense = (total - table) // depth if text.model_type in COPIED else 12 * text.hidden_size**2
        return cls(text.hidden_size, depth, dense, table, total)

    def step(self, shape: Shape) -> float:
        """What a step of a draft takes of a verification, where numbers are read and layers started."""
        narrow = shape.width / self.hidden
        draft = narrow * self.head + shape.layers * (narrow * self.a_layer + A_LAYER)
        return draft / (self.total + self.depth * A_LAYER)

    def deepest(self, width: int, step: float) -> int:
        """How many layers a draft has whose step takes at most so much; one at least."""
        narrow = width / self.hidden
        room = step * (self.total + self.depth * A_LAYER) - narrow * self.head
        return max(1, int(room / (narrow * self.a_layer + A_LAYER)))


def worth(acceptance: float, step: float) -> float:
    """How much faster than plain decoding a pair is, between what it reaches with its drafting hidden and with none of
    it hidden; see :func:`~ssd_ray.models.describe.at_best`."""
    waiting, hidden = at_best(acceptance, step)
    return float((waiting * hidden) ** 0.5)


def candidates(costs: Costs) -> list[Shape]:
    """Shapes that are worth a trial: in the target's width and in narrower ones, as deep as :data:`SHAPES` allows."""
    shapes = []
    for share, step in SHAPES:
        width = costs.hidden if share == 1 else int(costs.hidden * share) // HEAD * HEAD
        if width:
            shapes.append(Shape(min(max(1, costs.depth // 2), costs.deepest(width, step)), width))
    return shapes


def draft_config(target: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
    """The config of a draft, of one vocabulary and context with its target."""
    text = target.get_text_config()
    if text.model_type not in COPIED:
        heads = max(1, shape.width // HEAD)
        return LlamaConfig(
            vocab_size=text.vocab_size, hidden_size=shape.width, intermediate_size=3 * shape.width,
            num_hidden_layers=shape.layers, num_attention_heads=heads, num_key_value_heads=heads,
            head_dim=shape.width // heads, tie_word_embeddings=False,
            max_position_embeddings=getattr(text, "max_position_embeddings", None) or 2048,
            bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id,
        )  # fmt: skip
    config = deepcopy(text)
    config.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    config.num_hidden_layers, config.hidden_size = shape.layers, shape.width
    if getattr(text, "layer_types", None):
        config.layer_types = [text.layer_types[index] for index in shape.copied(text.num_hidden_layers)]
    config.tie_word_embeddings = text.tie_word_embeddings and shape.width == text.hidden_size
    return config


@torch.no_grad()
def make_draft(target: Any, shape: Shape, basis: Tensor | None, seed: int = 0) -> Any:
    """A draft as it is before it is trained, in float32.

    A narrower one works with the residual stream in the directions of ``basis`` (Ashkboos et al., 2024, SliceGPT): what
    reads the stream is multiplied by it, what writes it by its transpose, and the weights of norms go into what
    reads them.

    Args:
        basis: orthonormal directions [hidden, width], see :func:`directions`; None for the target's own width.
        seed: for layers that are drawn at random.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draft = AutoModelForCausalLM.from_config(draft_config(target.config, shape), dtype=torch.float32)
    table = target.get_input_embeddings().weight.float()
    head = target.get_output_embeddings().weight.float()
    inner, norm = _decoder(target), None
    if draft.config.model_type == target.config.get_text_config().model_type:
        norm = inner.norm.weight.float()
        for layer, origin in zip(draft.model.layers, shape.copied(len(inner.layers)), strict=True):
            layer.load_state_dict(_layer_weights(inner.layers[origin], basis))
    if basis is None:
        draft.model.embed_tokens.weight.copy_(table)
        draft.lm_head.weight.copy_(head)
        if norm is not None:
            draft.model.norm.weight.copy_(norm)
    else:
        basis = basis.to(table.device)
        draft.model.embed_tokens.weight.copy_(table @ basis)
        draft.lm_head.weight.copy_((head if norm is None else head * norm) @ basis)
        draft.model.norm.weight.fill_(_scale(basis))
    for weight in (draft.model.embed_tokens.weight, draft.lm_head.weight):
        weight.requires_grad_(False)
    return draft.eval()


READING = {"input_layernorm": ("q_proj", "k_proj", "v_proj"), "post_attention_layernorm": ("gate_proj", "up_proj")}
"""What reads the residual stream, by the norm before it."""

WRITING = ("o_proj", "down_proj")
"""What writes it."""


def _layer_weights(origin: Any, basis: Tensor | None) -> dict[str, Tensor]:
    """The weights of a layer, in the directions of a basis if there is one."""
    weights = {name: weight.float() for name, weight in origin.state_dict().items()}
    if basis is None:
        return weights
    basis = basis.to(next(iter(weights.values())).device)
    norms = {name: weights[f"{norm}.weight"] for norm, names in READING.items() for name in names}
    for full in weights:
        name, _, kind = full.rpartition(".")
        name = name.rpartition(".")[2]
        if name in READING:
            weights[full] = torch.full((basis.shape[1],), _scale(basis))
        elif name in norms and kind == "weight":
            weights[full] = (weights[full] * norms[name]) @ basis
        elif name in WRITING:
            weights[full] = basis.T @ weights[full]
    return weights


def _scale(basis: Tensor) -> float:
    """Weights of a norm behind which a direction of fewer is as long as it was among all."""
    return float((basis.shape[0] / basis.shape[1]) ** 0.5)


def _decoder(target: Any) -> Any:
    """The part of a model that has its layers."""
    inner = target.get_decoder() if hasattr(target, "get_decoder") else target.model
    return getattr(inner, "language_model", inner)


@torch.inference_mode()
def directions(target: Any, ids: Tensor, width: int) -> Tensor:
    """The directions of the residual stream that matter most: those of its states along a text, of the embeddings and
    of what the head reads, each scaled to one length.

    Args:
        ids: int64 [rows, length].

    Returns:
        float32 [hidden, width], orthonormal.
    """
    states = target(input_ids=ids.to(target.device), use_cache=False, output_hidden_states=True).hidden_states
    streams = [states[0], states[len(states) // 2], states[-1]]
    tables = [target.get_input_embeddings().weight, target.get_output_embeddings().weight]
    moment = sum(_moment(each.flatten(0, -2).double()) for each in (*streams, *tables))
    _, vectors = torch.linalg.eigh(moment)
    chosen: Tensor = vectors.flip(1)[:, :width]
    return chosen.float().clone().contiguous()


def _moment(states: Tensor) -> Tensor:
    """Second moment of states [n, hidden], each of length one."""
    states = states / states.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return states.T @ states / len(states)


def export(draft: Any, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write a stock transformers folder: config, generation config, weights, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = deepcopy(draft).to("cpu", dtype)
    copy.config.dtype = dtype
    with silence():
        copy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
