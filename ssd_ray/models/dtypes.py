"""In which dtype to serve a checkpoint: its own, or float32 on a processor that is faster in it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import msgspec
import torch
from transformers import PreTrainedModel

from ssd_ray.models.calibration import cache_path, keep, machine_name, read
from ssd_ray.models.clock import forward_clock
from ssd_ray.models.packing import find_siblings, pack_linears, packable

logger = logging.getLogger(__name__)

TIMED_TOKENS = (1, 4, 8, 16)

_WITHOUT_INT8 = frozenset({"SSE41", "AVX", "AVX2", "AVX512_CORE"})
_WITHOUT_HALF = _WITHOUT_INT8 | {"AVX2_VNNI", "AVX512_CORE_VNNI"}
POORER = {torch.bfloat16: _WITHOUT_HALF, torch.float16: _WITHOUT_HALF, torch.int8: _WITHOUT_INT8}
"""Limits of ONEDNN_MAX_CPU_ISA that leave no instructions for a dtype."""


class Times(msgspec.Struct, frozen=True):
    """Milliseconds of :func:`forward_ms` in two dtypes."""

    own: float
    float32: float


def has_instructions(dtype: torch.dtype) -> bool:
    """Whether this processor computes in a half precision, or in int8. What PyTorch does not know is taken for a no."""
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in POORER.get(dtype, ()):
        return False
    names = {
        torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
        torch.float16: ("_is_amx_fp16_supported",),
        torch.int8: ("_is_vnni_supported",),
    }
    return any(getattr(torch.cpu, name, bool)() for name in names.get(dtype, ()))


def faster_dtype(own: torch.dtype, load: Callable[[torch.dtype], PreTrainedModel], *parts: object) -> torch.dtype:
    """The checkpoint's ``own`` dtype on a CPU, or float32 if verifications of 1 to 16 tokens take less time in
    it, which is measured once.

    Args:
        load: loads the model in a dtype.
        parts: what tells the model apart.
    """
    if own == torch.float32 or has_instructions(own):
        return own
    path = cache_path(machine_name("dtype", str(own), *parts))
    times = read(path, Times)
    if times is None:
        times = Times(forward_ms(load(own)), forward_ms(load(torch.float32)))
        keep(path, times)
    chosen = torch.float32 if times.float32 < times.own else own
    logger.info(
        "no instructions for %s: 1, 4, 8 and 16 tokens take %.1f ms in it and %.1f in float32; serving in %s",
        own, times.own, times.float32, chosen,
    )  # fmt: skip
    return chosen


@torch.inference_mode()
def forward_ms(model: PreTrainedModel) -> float:
    """Milliseconds of forwards of :data:`TIMED_TOKENS`, the quickest of some each, together."""
    if packable(model.device, model.dtype):
        pack_linears(model, find_siblings(model))
    clock, total = forward_clock(model.device), 0.0
    for count in TIMED_TOKENS:
        tokens = torch.ones(1, count, dtype=torch.int64)
        times = []
        for _ in range(4):
            start = clock()
            model(input_ids=tokens, use_cache=False)
            times.append(1e3 * (clock() - start))
        total += min(times)
    return total
