"""What this machine makes of a pair: what a verification costs by its tokens, and a draft's step by its width."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ssd_ray.actors.process import load_model
from ssd_ray.actors.verifying import MOST_TOKENS
from ssd_ray.config import EngineConfig
from ssd_ray.models.calibration import Calibration
from ssd_ray.saguaro.costs import Costs, Measured
from ssd_ray.speculation.window import SCRATCH


@dataclass(frozen=True, slots=True)
class Figures:
    """One model on this machine, as an engine runs it.

    Attributes:
        role: "target", whose forwards are verifications, or "draft", whose are steps.
        dtype, device: as the engine has chosen them.
        packed: whether its linear layers are packed.
        sizes: numbers of tokens, over all rows, that are run; fewer are padded to the next one. Of a draft the widths
            that were tried.
        ms: milliseconds of a forward of each, of as few rows as possible.
        row_ms: milliseconds that every further row adds, its tokens apart.
        unsteady: those of the sizes that give a token other bits than the others do.
    """

    role: Literal["target", "draft"]
    dtype: str
    device: str
    packed: bool
    sizes: Sequence[int]
    ms: Sequence[float]
    row_ms: float
    unsteady: Sequence[int]

    def forward_ms(self, tokens: int) -> float:
        """Milliseconds of a forward of so many tokens, as rounds reckon with it."""
        return Costs(Measured(tuple(self.sizes), tuple(self.ms))).alone_ms(tokens)

    def run_as(self, tokens: int) -> int:
        """How many tokens are run where there are so many."""
        return next((size for size in self.sizes if size >= tokens), tokens)


def examine(config: EngineConfig) -> Iterator[Figures]:
    """Load target and draft one after the other as an engine does. What an earlier start has measured is read."""
    for role, scratch in (("target", MOST_TOKENS), ("draft", SCRATCH)):
        runner = load_model(config, role, scratch)
        found = runner.calibration or Calibration(Measured(), ())
        measured = found.measured
        yield Figures(
            role,  # type: ignore[arg-type]
            str(runner.dtype).removeprefix("torch."),
            str(runner.device),
            runner.packed,
            measured.sizes,
            measured.ms,
            measured.row_ms,
            found.unsteady,
        )
