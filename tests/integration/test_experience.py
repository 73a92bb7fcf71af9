"""What rounds have taught is there at the next start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ssd_ray.actors.target import TargetActor
from ssd_ray.config import EngineConfig
from ssd_ray.saguaro.costs import TELLING, Load
from ssd_ray.transport.memory import MemoryHub
from tests.support.tiny import tiny_pair


def started(config: EngineConfig) -> TargetActor:
    return TargetActor(config, MemoryHub(), session=1, cores=None)


def test_what_drafting_costs_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSD_RAY_CACHE", str(tmp_path / "cache"))
    target, draft = tiny_pair(tmp_path)
    config = EngineConfig(target=target, draft=draft, dtype="float32", device="cpu", max_num_seqs=1)
    first = started(config)
    costs = first._target.costs
    assert not costs.remembers
    for _ in range(TELLING):
        costs.saw_trial(1, Load(), 1.25 * costs.alone_ms(1), beside=1.0, rests=False)
    first.stop()
    first.run()
    later = started(config)._target.costs
    assert later.remembers
    assert later.drag == pytest.approx(0.2, abs=0.06)
    assert not started(replace(config, num_drafts=2))._target.costs.remembers
