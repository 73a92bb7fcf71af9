"""From a path to a runner: what can be refused is refused before weights are read, in our own words."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import constants as hub
from huggingface_hub.errors import GatedRepoError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ssd_ray.errors import (
    ConfigError,
    ModelError,
    ResourceError,
    SsdRayError,
    UnsupportedModelError,
    VocabularyMismatchError,
)
from ssd_ray.models.calibration import calibrate, calibrate_steps, kept_or_made, machine_name
from ssd_ray.models.checkpoint import (
    CheckpointError,
    bytes_on_disk,
    check_texts,
    check_weights,
    checkpoint_folder,
    few,
    fingerprint,
)
from ssd_ray.models.contract import PAGE_SLOTS
from ssd_ray.models.dtypes import faster_dtype
from ssd_ray.models.probe import probe_layers
from ssd_ray.models.runner import HFRunner
from ssd_ray.models.support import max_positions, refuse_unsupported

logger = logging.getLogger(__name__)

Role = Literal["target", "draft"]

ASSETS = Path(__file__).parent.parent / "assets"

SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Fields of a generation config that requests heed where they say nothing, and what they are called here."""

FREE_SHARE = 0.4
"""Part of the free memory that the KV of one model takes at most where the configuration leaves it open: a target and a
draft may share a machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """What a model's config.json says, before any weight is read.

    Attributes:
        vocab_size: entries of the embedding; padding beyond the tokenizer's included.
        max_length: positions that the model can take, or None if its config sets no limit.
        eos_token_ids: tokens that end a text; see also :func:`end_tokens`.
        parameter_bytes: weight files on this machine's disk; 0 if they are not here yet.
        kv_bytes_per_slot: K and V of one token over all layers, in the checkpoint's dtype.
    """

    vocab_size: int
    max_length: int | None
    eos_token_ids: tuple[int, ...]
    parameter_bytes: int
    kv_bytes_per_slot: int


def model_info(path: str | None, *, role: Role = "target", trust_remote_code: bool = False) -> ModelInfo:
    """Describe a model from its config.json alone; arguments as in :func:`load_runner`.

    Raises:
        ModelError: no such model.
        UnsupportedModelError: its architecture cannot work here.
    """
    source = _source(path, role)
    with _mapped(role, source):
        config = _config(source, trust_remote_code)
        refuse_unsupported(config, role, trusted=trust_remote_code)
        return ModelInfo(
            vocab_size=config.get_text_config().vocab_size,
            max_length=max_positions(config),
            eos_token_ids=_eos_token_ids(source, config),
            parameter_bytes=_bytes_on_disk(source),
            kv_bytes_per_slot=_kv_bytes(config, checkpoint_dtype(config)),
        )


def check_files(path: str | None, *, role: Role = "target") -> None:
    """Look whether the weights of a model are there and whole, without reading them.

    Raises:
        ModelError: naming the file that is not.
    """
    source = _source(path, role)
    with _mapped(role, source):
        _check_files(source)


def model_fingerprint(path: str | None, *, role: Role = "target") -> tuple[str, str]:
    """Digests of a model's config and weights, by which two machines see whether theirs is the same; empty for what is
    not on this one; see :func:`~ssd_ray.models.checkpoint.fingerprint`.

    Raises:
        ModelError: no such folder.
    """
    source = _source(path, role)
    with _mapped(role, source):
        folder = checkpoint_folder(source)
        return fingerprint(folder) if folder else ("", "")


def load_tokenizer(path: str | None, *, role: Role = "target", trust_remote_code: bool = False) -> Any:
    """Load the tokenizer that lies beside a model.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    source = _source(path, role)
    with _mapped(role, source):
        return AutoTokenizer.from_pretrained(
            source, local_files_only=os.path.isdir(source), trust_remote_code=trust_remote_code
        )


def sampling_defaults(path: str | None, *, role: Role = "target") -> dict[str, float | int]:
    """What a model's generation config says of sampling, by the names of :class:`~ssd_ray.config.SamplingParams`."""
    said = _generation_config(_source(path, role))
    return {ours: said[theirs] for theirs, ours in SAMPLING.items() if said.get(theirs) is not None}


def end_tokens(info: ModelInfo, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a text: those of the model's configs, and the tokenizer's own end token."""
    own = tokenizer.eos_token_id
    return tuple(sorted({*info.eos_token_ids, *([] if own is None else [own])}))


def check_pair(target: str | None, draft: str | None, *, trust_remote_code: bool = False) -> None:
    """Check that two models share one vocabulary.

    Tokenizers decide where both models have one: the same strings under the same ids. The embeddings may then differ in
    padding. Without tokenizers the sizes of the vocabularies have to be equal.

    Raises:
        VocabularyMismatchError: they do not.
        ModelError: a model is not there.
    """
    ours, theirs = (_vocabulary(path, role, trust_remote_code) for path, role in _pair(target, draft))
    if ours is None or theirs is None:
        sizes = [
            model_info(path, role=role, trust_remote_code=trust_remote_code).vocab_size
            for path, role in _pair(target, draft)
        ]
        if sizes[0] != sizes[1]:
            raise VocabularyMismatchError(
                f"draft: its vocabulary has {sizes[1]} tokens, the target's has {sizes[0]}; a pair shares one"
            )
    elif ours != theirs:
        differing = max(len(ours), len(theirs)) - len(ours.items() & theirs.items())
        raise VocabularyMismatchError(
            f"draft: its tokenizer is not the target's: {differing} of {max(len(ours), len(theirs))} entries differ; "
            "a pair shares one vocabulary"
        )


def _pair(target: str | None, draft: str | None) -> tuple[tuple[str | None, Role], ...]:
    return (target, "target"), (draft, "draft")


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
) -> HFRunner:
    """Load a model and give it a KV cache.

    Args:
        path: a folder, a hub id, or None for the bundled model of this role. Nothing is fetched for a folder.
        role: names the field in messages.
        rows, scratch: see :class:`HFRunner`.
        kv_memory: GiB for KV; "auto" takes a part of the memory that is free, if that is less than what ``rows`` rows
            need; None is what they need.
        max_length: positions of a row; None is the model's own limit. A draft may have a lower limit, and keeps it.
        device: "cpu", "cuda", "cuda:1" .., or "auto": CUDA where there is a device.
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's, or float32 on a CPU where that is faster
            and fits the memory.
        compile, prefill_chunk, vocab_size: see :class:`HFRunner`.
        trust_remote_code: run the Python code that comes with a model whose architecture transformers does not have.
        calibrated: find out what its verifications, or its steps, cost here, and which of the former leave a token's
            bits alone.

    Raises:
        ModelError: no such model, or it cannot be read, or it lacks weights.
        UnsupportedModelError: its architecture cannot work here, or not at this length.
        ConfigError: ``max_length`` is above the model's limit, or ``kv_memory`` does not hold one row.
        ResourceError: weights and KV do not fit the memory that is free.
    """
    source = _source(path, role)
    with _mapped(role, source):
        config = _config(source, trust_remote_code)
        length = _length(config, max_length, role)
        refuse_unsupported(config, role, length, trusted=trust_remote_code)
        _check_files(source)
        where = _device(device)

        def load(kind: torch.dtype) -> PreTrainedModel:
            return _load_model(source, kind, role, trust_remote_code)

        kind = _dtype(source, config, where, load) if dtype == "auto" else getattr(torch, dtype)
        weight_bytes = _weight_bytes(source, config, kind)
        page_bytes = _kv_bytes(config, kind) * PAGE_SLOTS
        pages = count_pages(kv_memory, page_bytes, rows, length + scratch, free_bytes(where) - weight_bytes)
        _require_memory(role, weight_bytes, page_bytes * pages, where)
        runner = HFRunner(
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


def _calibrate(runner: HFRunner, role: Role, parts: Sequence[object], bound: bool) -> None:
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
    if device.type != "cpu" or 2 * _weight_bytes(source, config, torch.float32) > free_bytes(device):
        return own
    return faster_dtype(own, load, config.to_json_string())


def _weight_bytes(source: str, config: PreTrainedConfig, dtype: torch.dtype) -> int:
    return _bytes_on_disk(source) * dtype.itemsize // checkpoint_dtype(config).itemsize


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


def _vocabulary(path: str | None, role: Role, trust_remote_code: bool) -> dict[str, int] | None:
    """Token strings and their ids; None if there is no tokenizer beside the model."""
    source = _source(path, role)
    if os.path.isdir(source) and not any(Path(source).glob("*tokenizer*")) and not any(Path(source).glob("vocab.*")):
        return None
    vocabulary: dict[str, int] = load_tokenizer(path, role=role, trust_remote_code=trust_remote_code).get_vocab()
    return vocabulary


def checkpoint_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype that a checkpoint says it is in; float32 if it says nothing."""
    dtype = config.dtype or config.get_text_config().dtype or torch.float32
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype))


def _source(path: str | None, role: Role) -> str:
    """A folder that exists, or a hub id."""
    if path is None:
        folder = ASSETS / role
        if not folder.is_dir():
            raise ModelError(f"{role}: the bundled model is not in this installation ({folder}); give a path")
        return str(folder)
    folder = Path(os.path.expanduser(path))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{role}: no config.json in {folder}")
        with _mapped(role, path):
            check_texts(folder)
        return str(folder)
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ModelError(f"{role}: no folder at {path}")
    return path


def _check_files(source: str) -> None:
    folder = checkpoint_folder(source)
    if folder is not None:
        check_weights(folder, complete=os.path.isdir(source) or hub.HF_HUB_OFFLINE)


def _load_model(source: str, dtype: torch.dtype, role: Role, trust_remote_code: bool) -> PreTrainedModel:
    """Load weights, all that the model has: transformers draws at random what is not there."""
    with _silence():
        model, found = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            local_files_only=os.path.isdir(source),
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


@contextmanager
def _silence() -> Iterator[None]:
    """Let nobody else draw a progress bar or print a report on somebody's terminal: we say what there is to say."""
    shown = transformers_logging.is_progress_bar_enabled()
    libraries = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [library.level for library in libraries]
    transformers_logging.disable_progress_bar()
    for library in libraries:
        library.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.setLevel(level)
        if shown:
            transformers_logging.enable_progress_bar()


def _config(source: str, trust_remote_code: bool) -> PreTrainedConfig:
    with _silence():  # the hub's client reports each of its tries
        return AutoConfig.from_pretrained(
            source, local_files_only=os.path.isdir(source), trust_remote_code=trust_remote_code
        )


@contextmanager
def _mapped(role: Role, source: str) -> Iterator[None]:
    """Turn whatever a foreign library raises into our errors."""
    try:
        yield
    except SsdRayError:
        raise
    except CheckpointError as error:
        raise ModelError(f"{role}: cannot load {source}: {error}") from None
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ResourceError(f"{role}: out of memory while loading {source}: {error}") from error
    except Exception as error:  # a broken file raises nearly anything
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(
                f"{role}: {source} comes with Python code of its own, which only trust_remote_code=True runs"
            ) from error
        raise ModelError(f"{role}: cannot load {source}: {_reason(source, error)}") from error


def _reason(source: str, error: Exception) -> str:
    if isinstance(error, OSError) and not os.path.isdir(source):  # what transformers says of it is a page long
        if isinstance(error.__cause__, GatedRepoError):
            return str(error).splitlines()[0]
        if checkpoint_folder(source) is None:
            return "it is no folder here, and no hub model that is on this machine or can be fetched"
    return f"{type(error).__name__}: {error}"


def _length(config: PreTrainedConfig, wanted: int | None, role: Role) -> int:
    limit = max_positions(config)
    if role == "draft" and wanted is not None and limit is not None:
        return min(wanted, limit)
    if wanted is None and limit is None:
        raise ConfigError("max_model_len", f"a number, since the {role}'s config sets no limit", None)
    if wanted is not None and limit is not None and wanted > limit:
        raise ConfigError("max_model_len", f"at most {limit}, the positions of the {role}", wanted)
    return wanted or limit or 0


def _generation_config(source: str) -> dict[str, Any]:
    """What a model's generation_config.json says; nothing if there is none."""
    # Imported here: transformers loads generation lazily, and actors never need it.
    from transformers import GenerationConfig

    try:
        with _silence():
            found = GenerationConfig.from_pretrained(source, local_files_only=os.path.isdir(source))
    except (OSError, ValueError):
        return {}
    said: dict[str, Any] = found.to_diff_dict()
    return said


def _eos_token_ids(source: str, config: PreTrainedConfig) -> tuple[int, ...]:
    """End tokens of the generation config where there is one (chat models list more there), else of the config."""
    found = _generation_config(source).get("eos_token_id")
    found = config.get_text_config().eos_token_id if found is None else found
    return () if found is None else (found,) if isinstance(found, int) else tuple(found)


def _bytes_on_disk(source: str) -> int:
    folder = checkpoint_folder(source)
    return bytes_on_disk(folder) if folder else 0


def _kv_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of one slot over all layers: what a model without weights keeps of a token."""
    try:
        with torch.device("meta"), _silence():
            # Some operations exist for no other dtype there; what is counted does not depend on it.
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            shapes = probe_layers(model)
    except Exception:  # it looks at values, which are not there
        return _usual_kv_bytes(config, dtype)
    return sum(shape.heads * (shape.key_dim + shape.value_dim) for shape in shapes) * dtype.itemsize


def _usual_kv_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(2 * text.num_hidden_layers * kv_heads * head_dim * dtype.itemsize)


def _device(device: str) -> torch.device:
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
