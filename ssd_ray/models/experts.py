"""Mixtures of experts whose products have one shape, so that a token's bits are the same whoever is run beside it.

Each expert gets as many tokens as were routed to it, which the other tokens of a forward decide, and how a product
rounds depends on how many there are. Here an expert's tokens are run in blocks of one size, the last one padded: for
few tokens the time goes into reading weights, and the padding costs little.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from ssd_ray.models.replay import opaque

NAME = "ssd_ray"

BLOCK = 8
"""Tokens that an expert is asked about at once."""


@opaque(lambda module, states, *args: (states,))
def steady_experts(module: Any, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What the experts of a module make of states [N, hidden]: of each token the sum over its experts ``chosen``, int64
    [N, K], by ``weights`` [N, K]."""
    tokens, count = chosen.shape
    order = chosen.flatten().argsort(stable=True)
    sizes = torch.bincount(chosen.flatten(), minlength=module.num_experts).tolist()
    outputs = states.new_empty(tokens * count, states.shape[-1])
    for expert, (first, last) in enumerate(pairwise(accumulate(sizes, initial=0))):
        for block in torch.split(order[first:last], BLOCK) if last > first else ():
            outputs[block] = _asked(module, expert, states[block // count])
    summed = (outputs.view(tokens, count, -1) * weights[..., None]).sum(1)
    return summed.to(states.dtype)


def _asked(module: Any, expert: int, states: Tensor) -> Tensor:
    """One expert's output for up to :data:`BLOCK` tokens."""
    padded = F.pad(states, (0, 0, 0, BLOCK - len(states)))
    inner = _product(module, "gate_up_proj" if module.has_gate else "up_proj", expert, padded)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    output = _product(module, "down_proj", expert, inner)
    if getattr(module, "has_post_expert_norm", False):
        output = module.post_expert_norm(output)
    return output[: len(states)]


def _product(module: Any, name: str, expert: int, inputs: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return F.linear(inputs, weight.t() if module.is_transposed else weight, bias)


def use_steady_experts(model: PreTrainedModel) -> None:
    """Let the experts of a model on a CPU be run so, where it lets us choose."""
    if model.device.type == "cpu" and any(map(_is_mixture, model.modules())):
        model.set_experts_implementation(NAME)


def _is_mixture(module: nn.Module) -> bool:
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def routers(module: nn.Module) -> Iterator[Tensor]:
    """Weights [outputs, inputs] of products that are no layer of their own, as of what chooses experts."""
    for each in module.modules():
        weight = each._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and not isinstance(each, nn.Embedding | nn.Linear):
            yield weight


ExpertsInterface.register(NAME, steady_experts)
