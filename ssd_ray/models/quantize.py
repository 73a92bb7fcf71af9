"""Linear layers in a few bits, made when a model is loaded.

On a CPU by products that torch itself has: torchao's take several times as long without a compiler. A weight has one
scale for each output (int8) or for each 32 inputs (int4), and activations that become integers one for each token,
never one for all: then a token's numbers depend on no other token. Sums of integers are exact in whatever order they
are taken, so in int8 a token has the same bits among any number of others. A CPU without VNNI multiplies int8
weights with inputs in bfloat16. On a GPU torchao's kernels serve, with such scales, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssd_ray.errors import ConfigError
from ssd_ray.models.dtypes import has_instructions
from ssd_ray.models.packing import Matrix, Packing, find_siblings, plain_linears

Kind = Literal["int8", "int4", "fp8"]

GROUP = 32
"""Inputs that share a scale in int4."""

TILE = 16
"""Outputs that the int4 kernel computes together."""

FP8_CAPABILITY = 8, 9
"""Of a GPU that multiplies in fp8."""


FINER = 254
"""By how much the second of the two int8 numbers of an input is finer than the first."""


class Int8:
    """A matrix of int8 with a scale for each output. Inputs become two int8 numbers each, a scale for each token: one
    would lose what small inputs say beside large ones, and a weight that is read anyway costs little to multiply twice.
    """

    def __init__(self, weight: Tensor) -> None:
        scales = _scales_of(weight.float())
        self._integers = (weight.float() / scales).round_().to(torch.int8)
        self._scales = scales.view(-1)

    def of(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """See :class:`~ssd_ray.models.packing.Matrix`. No operation here rounds by how many tokens there are: sums of
        integers are exact, and the others, one by one and never fused, are rounded as IEEE has it."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        scales = _scales_of(rows)
        exact = rows / scales
        coarse = exact.round()
        fine = exact.sub_(coarse).mul_(FINER).round_()
        integers = torch.cat([coarse, fine]).to(torch.int8)  # [2 * R, in_features]
        coarse, fine = torch._int_mm(integers, self._integers.t()).float().chunk(2)
        product = fine.mul_(1 / FINER).add_(coarse).mul_(self._scales).mul_(scales)
        return _with_bias(product, bias, inputs).to(inputs.dtype)

    def whole(self) -> Tensor:
        """What it stands for, float32."""
        return self._integers * self._scales[:, None]


def _with_bias(product: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    """A product [R, out_features], to which a bias is added, in the shape of its inputs."""
    if bias is not None:
        product.add_(bias)
    outputs: Tensor = product.view(*inputs.shape[:-1], -1)
    return outputs


def _scales_of(rows: Tensor) -> Tensor:
    """What 1 stands for in each row [R, N] of numbers up to 127, float32 [R, 1]."""
    scales: Tensor = torch.linalg.vector_norm(rows, float("inf"), -1, keepdim=True).mul_(1 / 127).clamp_(min=1e-30)
    return scales


class Int8Weight:
    """A matrix of int8 with a scale for each output. Inputs become bfloat16, and products are summed one by one in
    float32."""

    def __init__(self, weight: Tensor) -> None:
        scales = _scales_of(weight.float()).bfloat16()  # as the kernel takes them: no output is off as a whole
        self._integers = (weight.float() / scales).round_().clamp_(-127, 127).to(torch.int8)
        self._scales = scales.view(-1)

    def of(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """See :class:`~ssd_ray.models.packing.Matrix`. How many tokens there are does not move the bits of one."""
        rows = inputs.reshape(-1, inputs.shape[-1]).bfloat16()
        product = torch.ops.aten._weight_int8pack_mm(rows, self._integers, self._scales).to(inputs.dtype)
        return _with_bias(product, bias, inputs)

    def whole(self) -> Tensor:
        """What it stands for, float32."""
        return self._integers * self._scales[:, None].float()


class Int4:
    """A matrix of 4-bit integers with a scale and a zero for :data:`GROUP` inputs each. Inputs become bfloat16, as the
    processor's kernel takes them."""

    def __init__(self, weight: Tensor) -> None:
        groups = weight.float().view(len(weight), -1, GROUP)  # [N, K / GROUP, GROUP]
        low, high = groups.aminmax(dim=-1)
        scales = ((high - low) / 15).clamp(min=1e-30)
        integers = ((groups - low[..., None]) / scales[..., None]).round_().clamp_(0, 15).to(torch.int32)
        # The kernel takes 8 for zero.
        self._terms = torch.stack([scales, low + 8 * scales], -1).transpose(0, 1).contiguous().bfloat16()
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers.flatten(1), 1)

    def of(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """See :class:`~ssd_ray.models.packing.Matrix`."""
        rows = inputs.reshape(-1, inputs.shape[-1]).bfloat16()
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self._packed, GROUP, self._terms).to(inputs.dtype)
        return _with_bias(product, bias, inputs)

    def whole(self) -> Tensor:
        """What it stands for, bfloat16."""
        inputs = GROUP * len(self._terms)
        return self.of(torch.eye(inputs, dtype=torch.bfloat16), None).t()


def refuse_kind(kind: Kind, device: torch.device) -> None:
    """Refuse what a device has no arithmetic for, or what needs a package that is not there.

    Raises:
        ConfigError: naming it.
    """
    if device.type == "cpu":
        if kind == "fp8":
            raise ConfigError("quantize", "'int8' or 'int4' on a CPU, which has no arithmetic for fp8", kind)
        return
    if find_spec("torchao") is None:
        raise ConfigError("quantize", "'none' without torchao (pip install 'ssd-ray[quantize]')", kind)
    if kind == "fp8" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise ConfigError("quantize", "'int8' or 'int4' on a GPU of a compute capability below 8.9", kind)


@cache
def multiplies_int8() -> bool:
    """Whether this CPU multiplies integers fast, and sums the products as they are: older instructions cut sums off, or
    are not used at all, which takes ten times as long."""
    if not has_instructions(torch.int8):
        return False
    most = torch.full((4, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(most, -most.repeat(4, 1).t()) == -64 * 127 * 127).all())


@torch.inference_mode()
def quantize_linears(model: PreTrainedModel, kind: Kind, dtype: torch.dtype, *, siblings: bool = True) -> None:
    """Quantise the linear layers of a model in place, and bring what else is in its dtype to another one.

    Args:
        siblings: whether layers that read the same input may be one product.
    """
    if model.device.type == "cpu":
        _replace(model, kind, dtype, find_siblings(model) if siblings else ())
    own = model.dtype
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == own:
            tensor.data = tensor.data.to(dtype)
    if model.device.type != "cpu":
        from torchao.quantization import quantize_

        quantize_(model, recipe(kind))


def _replace(model: PreTrainedModel, kind: Kind, dtype: torch.dtype, siblings: Sequence[Sequence[nn.Linear]]) -> None:
    head, places = model.get_output_embeddings(), plain_linears(model)
    chosen = {linear: _matrix(kind, linear, head) for _, _, linear in places}
    packings = {
        matrix: Packing([[each for each in group if chosen[each] is matrix] for group in siblings], matrix, dtype)
        for matrix in set(chosen.values())
    }
    for module, name, linear in places:
        setattr(module, name, packings[chosen[linear]].packed(linear))


def _matrix(kind: Kind, linear: nn.Linear, head: nn.Module | None) -> type[Matrix]:
    """How a layer is kept on a CPU: what makes logits is worth 8 bits, and not every shape can have 4."""
    fits = linear.in_features % GROUP == 0 and linear.out_features % TILE == 0
    if kind == "int4" and fits and linear is not head:
        return Int4
    return Int8 if multiplies_int8() else Int8Weight


def quantised_bytes(model: PreTrainedModel, kind: Kind, dtype: torch.dtype) -> int:
    """What the weights of a model would take, of which there may be no more than an outline."""
    head, linears = model.get_output_embeddings(), {linear for _, _, linear in plain_linears(model)}
    of_linears = sum(
        linear.weight.numel() * BITS[_matrix(kind, linear, head)] // 8 + linear.out_features * 4 for linear in linears
    )
    gone = {id(linear.weight) for linear in linears} - {id(each.weight) for each in _tables(model)}
    of_others = sum(each.numel() for each in model.parameters() if id(each) not in gone) * dtype.itemsize
    return int(of_linears + of_others)


def _tables(model: PreTrainedModel) -> Iterator[nn.Embedding]:
    return (each for each in model.modules() if isinstance(each, nn.Embedding))


BITS: dict[type[Matrix], int] = {Int8: 8, Int8Weight: 8, Int4: 5}
"""Of a number: a scale and a zero in half precision for 32 numbers are a bit for each."""


def recipe(kind: Kind) -> Any:
    """How torchao is told what to do. Activations of int8 and fp8 have a scale for each token."""
    from torchao import quantization as ao

    match kind:
        case "int8":
            return ao.Int8DynamicActivationInt8WeightConfig()
        case "int4":
            return ao.Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
        case "fp8":
            return ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
