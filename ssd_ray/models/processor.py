"""What computes: a processor's name, and those of its instructions by which speeds differ most."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch

INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve")
"""As Linux spells them for x86 and for ARM."""


@cache
def processor() -> tuple[str, tuple[str, ...]]:
    """The GPU, or else the CPU and which of :data:`INSTRUCTIONS` it has, as far as the system says so."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), ()
    said = _cpuinfo()
    name = said.get("model name") or platform.processor() or platform.machine()
    flags = (said.get("flags") or said.get("Features") or "").split()
    return name, tuple(each for each in INSTRUCTIONS if each in flags)


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the last core."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
