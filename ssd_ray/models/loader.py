"""From a path to a runner: what can be refused is refused before weights are read, in our own words."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ssd_ray.errors import ConfigError, ModelError, ResourceError
from ssd_ray.models.adapters import adapter_folder, merge_adapter
from ssd_ray.models.calibration import calibrate, calibrate_steps, kept_or_made, machine_name
from ssd_ray.models.checkpoint import few
from ssd_ray.models.contract import PAGE_SLOTS
from ssd_ray.models.dtypes import faster_dtype, has_instructions
from ssd_ray.models.formats import checkpoint_format, is_widened, refuse_company, refuse_format
from ssd_ray.models.info import kept_bytes, kind_for, weight_bytes
from ssd_ray.models.quantize import Kind, quantize_linears, refuse_kind
from ssd_ray.models.recurrent import bytes_of_states
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
    quantize: Kind | None = None,
    adapter: str | None = None,
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
        quantize: in how many bits linear layers are kept, if the checkpoint is not quantised already.
        adapter: a folder or hub id of a PEFT adapter that is merged into the weights.
        compile, prefill_chunk, vocab_size: see there.
        trust_remote_code: run the Python code that comes with a model whose architecture transformers does not have.
        calibrated: find out what its verifications, or its steps, cost here, and which of the former leave a token's
            bits alone.

    Raises:
        ModelError: no such model, or it cannot be read, or it lacks weights.
        UnsupportedModelError: its architecture cannot work here, or not at this length.
        ConfigError: ``max_length`` is above the model's limit, or ``kv_memory`` does not hold one row, or what
            ``quantize`` or ``adapter`` asks for needs another device or package.
        ResourceError: weights and KV do not fit the memory that is free.
    """
    source = find_source(path, role)
    with in_our_words(role, source):
        config = read_config(source, trust_remote_code)
        length = _length(config, max_length, role)
        refuse_unsupported(config, role, length, trusted=trust_remote_code)
        check_source(source)
        where = find_device(device)
        refuse_format(config, role, where)
        merged = None if adapter is None else adapter_folder(adapter)
        loading = _Loading(source, config, role, where, merged, trust_remote_code)
        if (how := kind_for(config, quantize)) is not None:
            refuse_kind(how, where)
        kind = loading.dtype(how) if dtype == "auto" else getattr(torch, dtype)
        weights = weight_bytes(source, config, kind, quantize=how, device=where, trusted=trust_remote_code)
        kept = kept_bytes(config, kind, trusted=trust_remote_code)
        page_bytes = kept.slot * PAGE_SLOTS
        slots = length + scratch
        states = bytes_of_states(kept.state, rows, slots)
        pages = count_pages(kv_memory, page_bytes, rows, slots, free_bytes(where) - weights - states)
        _require_memory(role, weights, page_bytes * pages, where, states)
        runner = make_runner(
            loading.model(checkpoint_dtype(config) if how else kind),
            rows=rows,
            max_length=length,
            scratch=scratch,
            pages=None if kv_memory is None else pages,
            prefill_chunk=prefill_chunk,
            compile=compile,
            vocab_size=vocab_size,
            quantize=partial(quantize_linears, kind=how, dtype=kind, siblings=not compile) if how else None,
        )
        if calibrated:
            parts = config.to_json_string(), str(kind), how, str(where), rows, compile
            _calibrate(runner, role, parts, kv_memory is None)
        return runner


def _calibrate(runner: Runner, role: Role, parts: Sequence[object], bound: bool) -> None:
    """Find out what a runner's forwards cost, or look it up under a name of these parts, and let the runner know."""
    calibration = calibrate if role == "target" else calibrate_steps
    name = machine_name(role, *parts, runner.packed)
    runner.adopt(kept_or_made(name, lambda: calibration(runner, bound=bound)))
    kind, packed = str(runner.dtype).removeprefix("torch."), ", packed" if runner.packed else ""
    logger.info("%s in %s on %s%s: %s", role, kind, runner.device, packed, runner.calibration)


@dataclass(frozen=True, slots=True)
class _Loading:
    """How a model is loaded: all but its dtype."""

    source: str
    config: PreTrainedConfig
    role: Role
    device: torch.device
    adapter: Path | None
    trusted: bool

    def dtype(self, quantize: Kind | None) -> torch.dtype:
        """The dtype that suits a checkpoint on a device."""
        own = checkpoint_dtype(self.config)
        if quantize is not None and self.device.type == "cpu":  # what is not quantised takes little
            return own if has_instructions(own) else torch.float32
        if self.device.type != "cpu":
            return own
        # Both copies are there for a moment, and then one of them beside its KV.
        wide = weight_bytes(self.source, self.config, torch.float32, trusted=self.trusted)
        if 2 * wide > free_bytes(self.device):
            return own
        return faster_dtype(own, self.model, self.config.to_json_string())

    def model(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model on its device, with its adapter in its weights."""
        packed = checkpoint_format(self.config) is not None and not is_widened(self.config, self.device)
        model = _load_model(self.source, dtype, self.role, self.trusted, self.device if packed else None)
        if not packed:
            model = model.to(self.device, dtype) if checkpoint_format(self.config) else model.to(self.device)
        if packed:
            refuse_company(model, self.role)
        return model if self.adapter is None else merge_adapter(model, self.adapter)


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


def _load_model(
    source: str, dtype: torch.dtype, role: Role, trust_remote_code: bool, device: torch.device | None
) -> PreTrainedModel:
    """Load weights, all that the model has: transformers draws at random what is not there. Those that are quantised
    are laid out for a ``device``."""
    placed = {} if device is None else {"device_map": {"": device}}
    with silence():
        model, found = AutoModelForCausalLM.from_pretrained(
            **place(source),
            **placed,
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


def _require_memory(role: Role, weight_bytes: int, kv_bytes: int, device: torch.device, state_bytes: int = 0) -> None:
    needed, free = weight_bytes + kv_bytes + state_bytes, free_bytes(device)
    if needed > free:
        of_states = f", {state_bytes / 2**30:.2f} GiB of states" if state_bytes else ""
        raise ResourceError(
            f"{role}: {weight_bytes / 2**30:.2f} GiB of weights{of_states} and {kv_bytes / 2**30:.2f} GiB of KV do not "
            f"fit the {free / 2**30:.2f} GiB that are free on {device}; lower max_num_seqs or max_model_len"
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
