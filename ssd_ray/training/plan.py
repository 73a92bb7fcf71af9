"""What can be refused before anything is started, and what is kept so that a later run goes on with the same work."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssd_ray.errors import ConfigError, ModelError, ResourceError
from ssd_ray.models.describe import Description, describe
from ssd_ray.models.info import check_files, end_tokens, load_tokenizer, model_fingerprint
from ssd_ray.models.loader import find_device, free_bytes
from ssd_ray.models.sources import silence
from ssd_ray.training.config import TrainingConfig

LENGTH = 160
"""Tokens of a text."""

PROMPT = 32
"""Tokens of it that are given, or drawn at temperature 1."""

LEAST_DATA = 16 * PROMPT
"""Tokens of data that are enough to cut prompts from."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What is known of a training that can begin.

    Attributes:
        config: as it was asked for.
        target: the target.
        tokenizer: its tokenizer.
        ids: the data, int32 [tokens]; without data a token that texts begin with.
        device: where it is done.
        processes: on how many cores of a CPU.
        length: tokens of a text.
        identity: what the training depends on, by the names of flags.
    """

    config: TrainingConfig
    target: Description
    tokenizer: Any
    ids: np.ndarray
    device: torch.device
    processes: int
    length: int
    identity: dict[str, Any]

    @property
    def rows(self) -> int:
        """Texts that are written at once."""
        return 32 if self.device.type == "cpu" else 256

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a batch of training."""
        return 640 if self.device.type == "cpu" else 16_384

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return end_tokens(self.target.info, self.tokenizer)


class Plan:
    """What was found or decided, in a file. A later run reads what is there, and does not decide it anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def __contains__(self, name: str) -> bool:
        return name in self.known

    def __getitem__(self, name: str) -> Any:
        return self.known[name]

    def keep(self, name: str, value: Any) -> Any:
        """Write down something; returns it."""
        self.known[name] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.known, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(self.path)
        return value


def check(config: TrainingConfig) -> tuple[Checked, Plan]:
    """Look at everything that is asked for, and read the data and what an earlier run has left.

    Raises:
        ConfigError: data that cannot be read, or a folder that holds something else.
        ModelError: the target is not there, cannot work, or has no tokenizer.
        ResourceError: the device, or memory for the target, is missing.
    """
    target = describe(config.target, trust_remote_code=config.trust_remote_code)
    check_files(config.target)
    tokenizer = load_tokenizer(config.target, trust_remote_code=config.trust_remote_code)
    device = find_device(config.device)
    ids = _data(config.files, tokenizer, target)
    needed = target.parameters * (4 if config.dtype == "float32" else 2)
    if needed > free_bytes(device):
        raise ResourceError(f"target: {needed / 2**30:.2f} GiB of weights do not fit the memory free on {device}")
    identity = _identity(config, ids)
    plan = _open(config, identity)
    length = min(LENGTH, target.info.max_length or LENGTH)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = (config.processes or cores) if device.type == "cpu" else 1
    return Checked(config, target, tokenizer, ids, device, processes, length, identity), plan


def _data(files: list[Path], tokenizer: Any, target: Description) -> np.ndarray:
    """The tokens of all documents; without any, a token that texts begin with."""
    if not files:
        start = next((each for each in (tokenizer.bos_token_id, tokenizer.eos_token_id) if each is not None), 0)
        return np.array([start], dtype=np.int32)
    documents = [_read(file) for file in files]
    with silence():  # who tokenises a document is told that it is longer than the context
        ids = np.concatenate([np.array(tokenizer(text)["input_ids"], dtype=np.int32) for text in documents])
    if len(ids) < LEAST_DATA:
        raise ConfigError("data", f"at least {LEAST_DATA} tokens of text", f"{len(ids)} in {len(files)} files")
    if ids.max() >= target.info.vocab_size:
        raise ModelError(
            f"target: its tokenizer knows token {ids.max()}, but its vocabulary has {target.info.vocab_size} tokens"
        )
    return ids


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("data", "text files in UTF-8", f"{file}: {error}") from None


def _identity(config: TrainingConfig, ids: np.ndarray) -> dict[str, Any]:
    """What a training depends on, by the names of flags."""
    return {
        "target": list(model_fingerprint(config.target)),
        "data": sha256(ids.tobytes()).hexdigest()[:16],
        "minutes": config.minutes if config.texts is None or config.steps is None else None,
        "texts": config.texts,
        "steps": config.steps,
        "seed": config.seed,
    }


def _open(config: TrainingConfig, identity: dict[str, Any]) -> Plan:
    """The plan in the folder, which has to be of the same training; or a new one.

    Raises:
        ConfigError: the folder holds something else.
    """
    folder = config.folder
    if folder.exists() and not folder.is_dir():
        raise ConfigError("out", "a folder", str(folder))
    try:
        plan = Plan(config.work / "plan.json")
    except (OSError, ValueError) as error:
        raise ConfigError("out", "a folder whose plan can be read", f"{config.work / 'plan.json'}: {error}") from None
    if not plan.known and folder.exists() and any(folder.iterdir()):
        raise ConfigError("out", "a folder that is new, empty or was begun by this command", str(folder))
    known = plan.known.get("identity", identity)
    if differing := [name for name in identity if known.get(name) != identity[name]]:
        what = ", ".join(differing)
        raise ConfigError("out", f"a folder without another plan (it was begun with other {what})", str(folder))
    return plan
