"""Experts in blocks of one size: what the model's own give, and each token's bits for itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssd_ray.models.experts import BLOCK, routers, steady_experts, use_steady_experts
from tests.support.tiny import tiny_model

MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
TOKENS = 5 * BLOCK + 3


@pytest.fixture(params=MIXTURES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


def first_experts(model: PreTrainedModel) -> nn.Module:
    return next(module for module in model.modules() if type(module).__name__.endswith("Experts"))


def routed(module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """States, and two experts for each of them, most of them the first one."""
    random = torch.Generator().manual_seed(0)
    states = torch.randn(TOKENS, 32, generator=random)
    others = torch.randint(1, module.num_experts, (TOKENS,), generator=random)
    return states, torch.stack([torch.zeros_like(others), others], 1), torch.rand(TOKENS, 2, generator=random)


@torch.inference_mode()
def test_they_give_what_the_models_own_give(model: PreTrainedModel) -> None:
    module = first_experts(model)
    model.set_experts_implementation("eager")
    want = module(*routed(module))
    use_steady_experts(model)
    torch.testing.assert_close(module(*routed(module)), want, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_who_else_is_routed_changes_no_bit(model: PreTrainedModel) -> None:
    module = first_experts(model)
    states, chosen, weights = routed(module)
    together = steady_experts(module, states, chosen, weights)
    for part in (slice(7, 8), slice(3, 20), slice(TOKENS - 2, TOKENS)):
        assert torch.equal(steady_experts(module, states[part], chosen[part], weights[part]), together[part])


def test_what_routes_is_found() -> None:
    shapes = [tuple(weight.shape) for weight in routers(tiny_model("mixtral"))]
    assert shapes == [(4, 32)] * 2
    assert not list(routers(tiny_model("llama")))


def test_models_without_experts_are_left_alone() -> None:
    model = tiny_model("llama")
    before = model.config._experts_implementation
    use_steady_experts(model)
    assert model.config._experts_implementation == before
