"""From a path to a runner: what can be refused is refused before weights are read, in our own words."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Self

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ssd_ray.config import MTP_DRAFT
from ssd_ray.errors import ConfigError, ModelError, ResourceError
from ssd_ray.models.adapters import adapter_folder, merge_adapter
from ssd_ray.models.calibration import calibrate, calibrate_steps, kept_or_made, machine_name
from ssd_ray.models.checkpoint import few
from ssd_ray.models.contract import PAGE_SLOTS
from ssd_ray.models.dtypes import faster_dtype, has_instructions
from ssd_ray.models.formats import checkpoint_format, is_widened, refuse_company, refuse_format
from ssd_ray.models.info import (
    Kept,
    count_parameters,
    kind_for,
    state_bytes,
    weight_bytes,
    what_layers_keep,
    with_taps,
)
from ssd_ray.models.mtp import mtp_config
from ssd_ray.models.published import load_head, load_mtp
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
    read_head,
    silence,
)
from ssd_ray.models.support import max_positions, refuse_unsupported

logger = logging.getLogger(__name__)

FREE_SHARE = 0.4
"""Part of the free memory that the KV of one model takes at most where the configuration leaves it open: a target and a
draft may share a machine."""


ENDED = 2
"""Windows that a pool holds for each row: its own, and that of a text that has ended and may go on."""


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
    taps: Sequence[int] = (),
    target: str | None = None,
) -> Runner:
    """Load a model, or a head, and give it a KV cache.

    Args:
        path: a folder, a hub id, "mtp" for the head in the target's checkpoint, or None for the bundled model of this
            role. Nothing is fetched for a folder.
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
        taps: see there.
        target: a head's target, whose embedding it may lack.

    Raises:
        ModelError: no such model, or it cannot be read, or it lacks weights.
        UnsupportedModelError: its architecture cannot work here, or not at this length.
        ConfigError: ``max_length`` is above the model's limit, or ``kv_memory`` does not hold one row, or what
            ``quantize`` or ``adapter`` asks for needs another device or package.
        ResourceError: weights and KV do not fit the memory that is free.
    """
    source = _source_of(path, role, target)
    with in_our_words(role, source):
        config = _config(source, path, role, trust_remote_code)
        length = _length(config, max_length, role)
        if not _in_target(path, role):  # else it is one of the layers of a target that is not refused
            refuse_unsupported(config, role, length, trusted=trust_remote_code)
        check_source(source)
        where = find_device(device)
        if (read := _read_head(source, path, role, target, trust_remote_code)) is not None:
            loading: _Loading = _LoadingHead.read_by(read, source, config, role, where, trusted=trust_remote_code)
        else:
            loading = _Loading.of(source, config, role, where, quantize, adapter, trusted=trust_remote_code)
        kind = loading.dtype(dtype)
        pages = loading.count_pages(kind, kv_memory, rows, length, scratch, prefill_chunk, len(taps))
        runner = make_runner(
            loading.model(kind),
            rows=rows,
            max_length=length,
            scratch=scratch,
            pages=None if kv_memory is None else pages,
            prefill_chunk=prefill_chunk,
            compile=compile,
            vocab_size=vocab_size,
            quantize=loading.quantizing(kind, siblings=not compile),
            taps=taps,
        )
        if calibrated:
            parts = config.to_json_string(), str(kind), loading.quantize, str(loading.device), rows, compile, *taps
            _calibrate(runner, role, parts, kv_memory is None)
        return runner


def _source_of(path: str | None, role: Role, target: str | None) -> str:
    """A folder or hub id; the head in a target's checkpoint is where that one is."""
    return find_source(target, "target") if _in_target(path, role) else find_source(path, role)


def _in_target(path: str | None, role: Role) -> bool:
    return role == "draft" and path == MTP_DRAFT


def _config(source: str, path: str | None, role: Role, trusted: bool) -> PreTrainedConfig:
    config = read_config(source, trusted)
    return mtp_config(config) if _in_target(path, role) else config


def _read_head(
    source: str, path: str | None, role: Role, target: str | None, trusted: bool
) -> Callable[[torch.dtype], PreTrainedModel] | None:
    """What reads the head that a path stands for; None if it is a whole model."""
    if _in_target(path, role):
        config = read_config(source, trusted)
        return lambda dtype: load_mtp(source, config, dtype, trusted)
    if (head := read_head(source)) is not None:
        return lambda dtype: load_head(source, head, target, dtype, trusted)
    return None


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
        config = read_config(source, trust_remote_code)
        loading = _Loading.of(source, config, role, device, trusted=trust_remote_code)
        return loading.model(loading.dtype(dtype))


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
    quantize: Kind | None
    adapter: Path | None
    trusted: bool

    @classmethod
    def of(
        cls,
        source: str,
        config: PreTrainedConfig,
        role: Role,
        device: torch.device,
        quantize: Kind | None = None,
        adapter: str | None = None,
        *,
        trusted: bool,
    ) -> Self:
        """Refuse what cannot be loaded so; see :func:`load_runner`."""
        refuse_format(config, role, device)
        how = kind_for(config, quantize)
        if how is not None:
            refuse_kind(how, device)
        merged = None if adapter is None else adapter_folder(adapter)
        return cls(source, config, role, device, how, merged, trusted)

    def dtype(self, wanted: str) -> torch.dtype:
        """The dtype of this name, or, for "auto", the one that suits the checkpoint on the device."""
        if wanted != "auto":
            return getattr(torch, wanted)  # type: ignore[no-any-return]
        own = checkpoint_dtype(self.config)
        if self.quantize is not None and self.device.type == "cpu":  # what is not quantised takes little
            return own if has_instructions(own) else torch.float32
        if self.device.type != "cpu":
            return own
        # Both copies are there for a moment, and then one of them beside its KV.
        wide = weight_bytes(self.source, self.config, torch.float32, trusted=self.trusted)
        if 2 * wide > free_bytes(self.device):
            return own
        return faster_dtype(own, self.model, self.config.to_json_string())

    def weights(self, dtype: torch.dtype) -> int:
        """Bytes that the weights take."""
        return weight_bytes(
            self.source, self.config, dtype, quantize=self.quantize, device=self.device, trusted=self.trusted
        )

    def count_pages(
        self,
        dtype: torch.dtype,
        kv_memory: float | Literal["auto"] | None,
        rows: int,
        length: int,
        scratch: int,
        chunk: int,
        taps: int,
    ) -> list[int]:
        """See :func:`count_pages`.

        Raises:
            ResourceError: with them the model does not fit the memory that is free.
        """
        weights = self.weights(dtype)
        kept = what_layers_keep(self.config, dtype, length, trusted=self.trusted)
        kept = with_taps(kept, self.config, dtype, taps)
        slots = length + scratch
        states = bytes_of_states(state_bytes(self.config, dtype, trusted=self.trusted), rows, slots)
        free = free_bytes(self.device) - weights - states
        pages = count_pages(kv_memory, kept, rows, slots, chunk + scratch, free)
        _require_memory(self.role, weights, kv_size(kept, pages), self.device, states)
        return pages

    def quantizing(self, dtype: torch.dtype, *, siblings: bool) -> Callable[[PreTrainedModel], None] | None:
        """What quantises the model once it is there; None if nothing does."""
        if self.quantize is None:
            return None
        return partial(quantize_linears, kind=self.quantize, dtype=dtype, siblings=siblings)

    def model(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model on its device, with its adapter in its weights; in the checkpoint's dtype if it is still to be
        quantised."""
        if self.quantize is not None:
            dtype = checkpoint_dtype(self.config)
        packed = checkpoint_format(self.config) is not None and not is_widened(self.config, self.device)
        model = _load_model(self.source, dtype, self.role, self.trusted, self.device if packed else None)
        if not packed:
            model = model.to(self.device, dtype) if checkpoint_format(self.config) else model.to(self.device)
        if packed:
            refuse_company(model, self.role)
        return model if self.adapter is None else merge_adapter(model, self.adapter)


@dataclass(frozen=True, slots=True)
class _LoadingHead(_Loading):
    """How a head is loaded; it is not quantised, and has no adapter."""

    read: Callable[[torch.dtype], PreTrainedModel]

    @classmethod
    def read_by(
        cls,
        read: Callable[[torch.dtype], PreTrainedModel],
        source: str,
        config: PreTrainedConfig,
        role: Role,
        device: torch.device,
        *,
        trusted: bool,
    ) -> Self:
        """Refuse what cannot be loaded so."""
        refuse_format(config, role, device)
        return cls(source, config, role, device, None, None, trusted, read)

    def weights(self, dtype: torch.dtype) -> int:
        return count_parameters(self.config, trusted=self.trusted) * dtype.itemsize

    def model(self, dtype: torch.dtype) -> PreTrainedModel:
        """The head on its device."""
        return self.read(dtype).to(self.device)


def kv_size(kept: Sequence[Kept], pages: Sequence[int]) -> int:
    """Bytes of so many pages of each pool."""
    return sum(each.slot_bytes * PAGE_SLOTS * count for each, count in zip(kept, pages, strict=True))


def count_pages(
    kv_memory: float | Literal["auto"] | None, kept: Sequence[Kept], rows: int, slots: int, ahead: int, free: int
) -> list[int]:
    """How many pages of KV to have for rows of so many slots, for each reach of the layers: where there is a window, a
    row needs those of the window and of slots ``ahead`` of it.

    Raises:
        ConfigError: ``kv_memory`` does not hold one row.
    """
    whole = -(-slots // PAGE_SLOTS)
    if kv_memory is None:
        return [rows * whole] * len(kept)
    one = [each.reach.pages(slots, ahead, PAGE_SLOTS) for each in kept]
    enough = [rows * min(whole, ENDED * count) for count in one]
    if kv_memory == "auto":
        return _dealt(FREE_SHARE * free, kept, one, enough)
    least, memory = kv_size(kept, one) / 2**30, kv_memory * 2**30
    if kv_memory < least:
        raise ConfigError("kv_memory", f"at least {least:.3g} GiB, which one sequence of full length needs", kv_memory)
    dealt = _dealt(memory, kept, one, enough)
    return _dealt(memory, kept, dealt, [int(memory)] * len(kept))


def _dealt(memory: float, kept: Sequence[Kept], pages: Sequence[int], most: Sequence[int]) -> list[int]:
    """The pages of each pool, and as many more as there is memory for, equally many to each that has not the most."""
    dealt, left = list(pages), max(0.0, memory - kv_size(kept, pages))
    takers = sorted(range(len(kept)), key=lambda index: most[index] - pages[index])
    for turn, index in enumerate(takers):
        sizes = [kept[other].slot_bytes * PAGE_SLOTS for other in takers[turn:]]
        more = min(most[index] - pages[index], int(left // max(1, sum(sizes))))
        dealt[index] += more
        left -= more * sizes[0]
    return dealt


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
