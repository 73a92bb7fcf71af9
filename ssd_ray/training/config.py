"""What a draft is trained for and with: a small frozen dataclass that validates itself."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from os.path import expanduser
from pathlib import Path
from typing import get_args

from ssd_ray.config import Dtype
from ssd_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How a draft is trained.

    Attributes:
        target: the model to train a draft for: a folder, a .gguf file or a hub id; default: the bundled one.
        data: text files in UTF-8 of the kind that the target will be asked for, one document each; repeat for several.
            The target goes on with pieces of them. Default: it writes by itself.
        out: folder for the draft, with what is needed to go on in `training` below it; the same command resumes.
        minutes: about how long all of it may take on this machine: the work is sized to it when it begins.
        texts: how many texts the target writes, instead of as many as there is time for.
        steps: of training, instead of as many as there is time for.
        device: `cpu`, `cuda`, `cuda:1` .., or `auto`: CUDA where there is a device.
        dtype: of the target while it writes: `float32`, `bfloat16`, `float16`, or `auto`: what suits it here.
        processes: on a CPU; 0 is one for each core.
        seed: names the prompts, the texts and the order of training.
        trust_remote_code: run Python code that comes with the target.
    """

    target: str | None = None
    data: tuple[str, ...] = ()
    out: str | None = None
    minutes: float = 30.0
    texts: int | None = None
    steps: int | None = None
    device: str = "auto"
    dtype: Dtype = "auto"
    processes: int = 0
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.out or not isinstance(self.out, str):
            raise ConfigError("out", "a folder for the draft", self.out)
        if not isinstance(self.minutes, int | float) or not isfinite(self.minutes) or not 0 < self.minutes <= 1e6:
            raise ConfigError("minutes", "a number above 0 up to 1e+06", self.minutes)
        for name, low in (("texts", 1), ("steps", 1), ("processes", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is None and name in ("texts", "steps"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**31:
                raise ConfigError(name, f"an integer from {low} to {2**31 - 1}", value)
        if self.dtype not in get_args(Dtype):
            raise ConfigError("dtype", "one of " + ", ".join(map(repr, get_args(Dtype))), self.dtype)
        kind, _, number = self.device.partition(":")
        if self.device not in ("auto", "cpu", "cuda") and not (kind == "cuda" and number.isdecimal()):
            raise ConfigError("device", "'auto', 'cpu', 'cuda' or 'cuda:N'", self.device)

    @property
    def folder(self) -> Path:
        """Where the draft goes."""
        return Path(expanduser(self.out or "")).absolute()

    @property
    def work(self) -> Path:
        """Where everything goes that is needed to go on."""
        return self.folder / "training"

    @property
    def files(self) -> list[Path]:
        """The data."""
        return [Path(expanduser(each)).absolute() for each in self.data]
