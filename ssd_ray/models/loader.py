"""From a path to a runner: what can be refused is refused before weights are read, in our own words."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ssd_ray.errors import ConfigError, ModelError, ResourceError
from ssd_ray.models.calibration import calibrate, calibrate_steps, kept_or_made, machine_name
from ssd_ray.models.checkpoint import few
from ssd_ray.models.contract import PAGE_SLOTS
from ssd_ray.models.dtypes import faster_dtype
from ssd_ray.models.info import kv_bytes, weight_bytes
from ssd_ray.models.runners import Runner, make_runner
from ssd_ray.models.sources import (
    Role,
    check_source,
    checkpoint_dtype,
    find_source,
    in_our_words,
    place,
    read_config,
    silence,
)
from ssd_ray.models.support import max_positions, refuse_unsupported

logger = logging.getLogger(__name__)

FREE_SHARE = 0.4
"""Part of the free memory that the KV of one model takes at most where the configuration leaves it open: a target and a
draft may share a machine."""


def load_runner(
    path: str | None,
    *,
    role: Role,
    rows: int,
    max_length: int | None = None,
    scratch: int,
    kv_memory: float | Literal["auto"] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool = False,
    prefill_chunk: int = 256,
    vocab_size: int | None = None,
    trust_remote_code: bool = False,
    calibrated: bool = False,
) -> Runner:
    """Load a model and give it a KV cache.

    Args:
        path: a folder, a hub id, or None for the bundled model of this role. Nothing is fetched for a folder.
        role: names the field in messages.
        rows, scratch: see :class:`~ssd_ray.models.runner.HFRunner`.
        kv_memory: GiB for KV; "auto" takes a part of the memory that is free, if that is less than what ``rows`` rows
            need; None is what they need.
        max_length: positions of a row; None is the model's own limit. A draft may have a lower limit, and keeps it.
        device: "cpu", "cuda", "cuda:1" .., or "auto": CUDA where there is a device.
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's, or float32 on a CPU where that is faster
            and fits the memory.
        compile, prefill_chunk, vocab_size: see there.
        trust_remote_code: run the Python code that comes with a model whose architecture transformers does not have.
        calibrated: find out what its verifications, or its steps, cost here, and which of the former leave a token's
            bits alone.

    Raises:
        ModelError: no such model, or it cannot be read, or it lacks weights.
        UnsupportedModelError: its architecture cannot work here, or not at this length.
        ConfigError: ``max_length`` is above the model's limit, or ``kv_memory`` does not hold one row.
        ResourceError: weights and KV do not fit the memory that is free.
    """
    source = find_source(path, role)
    with in_our_words(role, source):
        config = read_config(source, trust_remote_code)
        length = _length(config, max_length, role)
        refuse_unsupported(config, role, length, trusted=trust_remote_code)
        check_source(source)
        where = find_device(device)

        load = _loading(source, role, trust_remote_code)
        kind = _dtype(source, config, where, load) if dtype == "auto" else getattr(torch, dtype)
        weights = weight_bytes(source, config, kind, trusted=trust_remote_code)
        page_bytes = kv_bytes(config, kind, trusted=trust_remote_code) * PAGE_SLOTS
        pages = count_pages(kv_memory, page_bytes, rows, length + scratch, free_bytes(where) - weights)
        _require_memory(role, weights, page_bytes * pages, where)
        runner = make_runner(
            load(kind).to(where),
            rows=rows,
            max_length=length,
            scratch=scratch,
            pages=None if kv_memory is None else pages,
            prefill_chunk=prefill_chunk,
            compile=compile,
            vocab_size=vocab_size,
        )
        if calibrated:
            _calibrate(runner, role, (config.to_json_string(), str(kind), str(where), rows, compile), kv_memory is None)
        return runner


def load_model(
    path: str | None, *, role: Role, device: torch.device, dtype: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a model as transformers has it, without a KV cache of ours; arguments as in :func:`load_runner`.

    Raises:
        ModelError: no such model, or it cannot be read, or it lacks weights.
        ResourceError: it does not fit the memory.
    """
    source = find_source(path, role)
    with in_our_words(role, source):
        load = _loading(source, role, trust_remote_code)
        config = read_config(source, trust_remote_code)
        kind = _dtype(source, config, device, load) if dtype == "auto" else getattr(torch, dtype)
        return load(kind).to(device)


def _loading(source: str, role: Role, trust_remote_code: bool) -> Callable[[torch.dtype], PreTrainedModel]:
    return lambda kind: _load_model(source, kind, role, trust_remote_code)


def _calibrate(runner: Runner, role: Role, parts: Sequence[object], bound: bool) -> None:
    """Find out what a runner's forwards cost, or look it up under a name of these parts, and let the runner know."""
    calibration = calibrate if role == "target" else calibrate_steps
    name = machine_name(role, *parts, runner.packed)
    runner.adopt(kept_or_made(name, lambda: calibration(runner, bound=bound)))
    kind, packed = str(runner.dtype).removeprefix("torch."), ", packed" if runner.packed else ""
    logger.info("%s in %s on %s%s: %s", role, kind, runner.device, packed, runner.calibration)


def _dtype(
    source: str, config: PreTrainedConfig, device: torch.device, load: Callable[[torch.dtype], PreTrainedModel]
) -> torch.dtype:
    """The dtype that suits a checkpoint on a device."""
    own = checkpoint_dtype(config)
    # Both copies are there for a moment, and then one of them beside its KV.
    if device.type != "cpu" or 2 * weight_bytes(source, config, torch.float32) > free_bytes(device):
        return own
    return faster_dtype(own, load, config.to_json_string())


def count_pages(kv_memory: float | Literal["auto"] | None, page_bytes: int, rows: int, slots: int, free: int) -> int:
    """How many pages of KV to have for rows of so many slots.

    Raises:
        ConfigError: ``kv_memory`` does not hold one row.
    """
    per_row = -(-slots // PAGE_SLOTS)
    if kv_memory is None:
        return rows * per_row
    if kv_memory == "auto":
        return max(per_row, min(rows * per_row, int(FREE_SHARE * free // page_bytes)))
    pages = int(kv_memory * 2**30 // page_bytes)
    if pages < per_row:
        least = per_row * page_bytes / 2**30
        raise ConfigError("kv_memory", f"at least {least:.3g} GiB, which one sequence of full length needs", kv_memory)
    return pages


def _load_model(source: str, dtype: torch.dtype, role: Role, trust_remote_code: bool) -> PreTrainedModel:
    """Load weights, all that the model has: transformers draws at random what is not there."""
    with silence():
        model, found = AutoModelForCausalLM.from_pretrained(
            **place(source),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # so that they are told, too
            output_loading_info=True,
        )
    if missing := found["missing_keys"]:
        raise ModelError(f"{role}: {source} lacks weights that the model has: {few(missing)}")
    if mismatched := found["mismatched_keys"]:
        shapes = few(f"{name} ({tuple(ours)}, not {tuple(theirs)})" for name, ours, theirs in mismatched)
        raise ModelError(f"{role}: {source} has weights of another shape than the model: {shapes}")
    if surplus := found["unexpected_keys"]:
        logger.warning("%s: %s has weights that the model has not: %s", role, source, few(surplus))
    return model


def _length(config: PreTrainedConfig, wanted: int | None, role: Role) -> int:
    limit = max_positions(config)
    if role == "draft" and wanted is not None and limit is not None:
        return min(wanted, limit)
    if wanted is None and limit is None:
        raise ConfigError("max_model_len", f"a number, since the {role}'s config sets no limit", None)
    if wanted is not None and limit is not None and wanted > limit:
        raise ConfigError("max_model_len", f"at most {limit}, the positions of the {role}", wanted)
    return wanted or limit or 0


def find_device(device: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" .. stands for here.

    Raises:
        ResourceError: CUDA is asked for, and there is none.
    """
    available = torch.cuda.is_available()
    if device.startswith("cuda") and not available:
        raise ResourceError(f"device: {device} was asked for, but PyTorch sees no CUDA device")
    if device == "auto":
        device = "cuda" if available else "cpu"
    return torch.device(device)


def _require_memory(role: Role, weight_bytes: int, kv_bytes: int, device: torch.device) -> None:
    needed, free = weight_bytes + kv_bytes, free_bytes(device)
    if needed > free:
        raise ResourceError(
            f"{role}: {weight_bytes / 2**30:.2f} GiB of weights and {kv_bytes / 2**30:.2f} GiB of KV do not fit the "
            f"{free / 2**30:.2f} GiB that are free on {device}; lower max_num_seqs or max_model_len"
        )


def free_bytes(device: torch.device) -> int:
    """Memory that a process could still take on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        # What can be had without swapping; the page cache counts.
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
