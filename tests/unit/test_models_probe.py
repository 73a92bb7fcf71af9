"""What is found out at load by running a model: rounding is no reason to refuse one, a layer that does not obey is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssd_ray.errors import UnsupportedModelError
from ssd_ray.models.attention import choose_attention
from ssd_ray.models.float32 import PART, InFloat32
from ssd_ray.models.probe import check_addressing, probe_layers
from ssd_ray.models.runner import HFRunner
from tests.support.tiny import ARCHITECTURES, tiny_model

LENGTH = 128
MIXTURES = ("mixtral", "qwen2_moe")


def with_outliers(architecture: str, **config: Any) -> PreTrainedModel:
    """A model in which all tokens have a large part in common, so that rounding to half precision moves the logits."""
    model = tiny_model(architecture, layers=4, **config)
    tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    with torch.no_grad():
        for table in {id(table): table for table in tables}.values():
            table += 100 * table.std() * torch.randn(table.shape[1], generator=torch.Generator().manual_seed(0))
    return model


def check(model: PreTrainedModel, length: int = LENGTH) -> None:
    model.set_attn_implementation(choose_attention(model))
    check_addressing(model, probe_layers(model), length)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MIXTURES])
def test_models_with_outliers_load(architecture: str, dtype: torch.dtype) -> None:
    model = with_outliers(architecture).to(dtype)
    runner = HFRunner(model, rows=2, max_length=LENGTH, scratch=16)
    assert runner.append([0], [[1]], [0])[0].isfinite().all()
    assert runner.dtype == dtype


def hook_attention(model: PreTrainedModel, layer: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what the attention of one layer is handed."""
    (module,) = (each for each in model.modules() if getattr(each, "layer_idx", None) == layer and is_attention(each))

    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        change(kwargs)
        return args, kwargs

    module.register_forward_pre_hook(before, with_kwargs=True)


def is_attention(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Attention")


def ignore_mask(kwargs: dict[str, Any]) -> None:
    if isinstance(mask := kwargs.get("attention_mask"), Tensor):
        kwargs["attention_mask"] = torch.zeros_like(mask)


def ignore_positions(kwargs: dict[str, Any]) -> None:
    """Count from 0 in every forward."""
    cosine, _ = kwargs["position_embeddings"]
    first = FIRST[None, : cosine.shape[1]]
    kwargs["position_embeddings"] = first.cos().to(cosine.dtype), first.sin().to(cosine.dtype)


FIRST = torch.arange(16.0)[:, None] * (1e4 ** -(torch.arange(4) / 4)).repeat(2)
"""Angles at the first positions, float32 [16, 8], for heads of 8."""


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_layer_that_ignores_the_mask_is_enough_to_be_refused(architecture: str, layer: int) -> None:
    model = tiny_model(architecture, layers=4).to(torch.bfloat16)
    check(model)
    hook_attention(model, layer, ignore_mask)
    with pytest.raises(UnsupportedModelError, match="positions and mask as they are given"):
        check(model)


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("architecture", sorted({*ARCHITECTURES} - {"gpt2"}))
def test_one_layer_that_ignores_positions_is_enough_to_be_refused(architecture: str, layer: int) -> None:
    model = tiny_model(architecture, layers=4, head_dim=8).to(torch.bfloat16)
    hook_attention(model, layer, ignore_positions)
    with pytest.raises(UnsupportedModelError, match="positions and mask as they are given"):
        check(model)


def take_from_the_first_row(kwargs: dict[str, Any]) -> None:
    kwargs["position_embeddings"] = tuple(each[:1] for each in kwargs["position_embeddings"])


def look_at_the_longest(kwargs: dict[str, Any]) -> None:
    """Another scale once some position of the forward is beyond 100: at position 0 the cosine is 1 in either case."""
    cosine, sine = kwargs["position_embeddings"]
    if (cosine[..., -1] < FAR).any():
        kwargs["position_embeddings"] = cosine * 1.05, sine * 1.05


FAR = torch.tensor(100 * 1e4 ** -(3 / 4)).cos()


@pytest.mark.parametrize("change", [take_from_the_first_row, look_at_the_longest])
@pytest.mark.parametrize("layer", [0, 3])
def test_a_layer_that_looks_at_a_neighbour_is_refused(change: Callable[[dict[str, Any]], None], layer: int) -> None:
    model = tiny_model(layers=4)
    hook_attention(model, layer, change)
    with pytest.raises(UnsupportedModelError, match="each row for itself"):
        check(model)


def test_keys_in_another_dtype_than_the_model_are_refused() -> None:
    model = tiny_model().to(torch.bfloat16)
    model.set_attn_implementation("eager")
    attention = model.model.layers[1].self_attn
    for each in (attention.q_proj, attention.k_proj, attention.v_proj):
        each.register_forward_hook(lambda module, args, output: output.float())
    attention.o_proj.register_forward_pre_hook(lambda module, args: args[0].to(model.dtype))
    with pytest.raises(UnsupportedModelError, match=r"float32.*bfloat16"):
        probe_layers(model)


@pytest.mark.parametrize("length", [2, 5, 16, 17])
def test_short_contexts_can_be_checked(length: int) -> None:
    check(tiny_model("gpt2", context=length), length)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MIXTURES, "gpt_neox", "opt"])
@torch.inference_mode()
def test_a_model_in_half_precision_runs_in_float32(architecture: str) -> None:
    model = tiny_model(architecture).to(torch.bfloat16)
    tokens = torch.arange(12)[None]
    with InFloat32():
        got = model(tokens, use_cache=False).logits
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(got, model.float()(tokens, use_cache=False).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_wide_layers_are_widened_in_parts(bias: bool) -> None:
    layer = nn.Linear(8, 2 * PART + 5, bias=bias, dtype=torch.bfloat16)
    inputs = torch.randn(2, 3, 8)
    with InFloat32():
        got = layer(inputs)
    torch.testing.assert_close(got, layer.float()(inputs))
