"""Rotary frequencies that transformers chooses anew in every forward, chosen once.

LongRoPE and dynamic NTK choose frequencies by the longest position of a forward. Keys that were cached under others,
and rows in one forward, would then depend on each other. Here the length that is served decides, as in vLLM.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

BY_LENGTH = ("longrope", "dynamic")
"""Kinds whose frequencies depend on the length."""

FIXED = "fixed"
"""In their place: a kind that is none of them is left alone."""


@torch.no_grad()
def fix_frequencies(model: PreTrainedModel, length: int) -> None:
    """Give a model the rotary frequencies that it has for texts of ``length`` tokens, for good and in place."""
    for module in model.modules():
        if isinstance(kinds := getattr(module, "rope_type", None), dict):  # frequencies for each type of layer
            for layer_type in filter(lambda name: kinds[name] in BY_LENGTH, kinds):
                _choose(module, model, length, layer_type)
            module.rope_type = {name: FIXED if kind in BY_LENGTH else kind for name, kind in kinds.items()}
        elif kinds in BY_LENGTH:
            _choose(module, model, length)
            module.rope_type = FIXED


def _choose(module: nn.Module, model: PreTrainedModel, length: int, *layer_type: str) -> None:
    """Let the module choose frequencies, by asking it for the last position."""
    states = torch.zeros(1, dtype=model.dtype, device=model.device)
    module(states, torch.tensor([[length - 1]], device=model.device), *layer_type)
