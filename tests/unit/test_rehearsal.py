"""Virtual time: what takes how long is what was said, and everything else is the real loops."""

from __future__ import annotations

import pytest

from ssd_ray.actors.process import lookahead
from ssd_ray.bench.rehearsal import Play, Rehearsal
from ssd_ray.bench.simulate import Hardware
from ssd_ray.config import EngineConfig, SamplingParams
from ssd_ray.models.table import TableModel
from ssd_ray.sampling.rejection import Proposing
from ssd_ray.speculation.window import SCRATCH
from ssd_ray.stats import Stats, add
from ssd_ray.wire import RequestStats

PROMPT = [1, 2, 3, 4, 5]
HARDWARE = Hardware(verify_ms=20.0, step_ms=2.0, host_ms=1.0, message_ms=0.5, token_ms=0.1)
PARAMS = SamplingParams(temperature=1.0, max_tokens=120, seed=3)
TARGET = TableModel(scratch=SCRATCH, vocab_size=64)


def run(play: Play, hardware: Hardware = HARDWARE, drafts: int = 1) -> tuple[list[int], Stats]:
    rehearsal = Rehearsal(TARGET, [TARGET.blurred(0.7) for _ in range(drafts)], hardware, play)
    tokens, stats = rehearsal.run(PROMPT, PARAMS)
    return tokens, Stats(sums=stats)


def test_plain_decoding_takes_a_verification_and_the_host_work_for_each_token() -> None:
    _, stats = run(Play(method="ar"))
    assert (stats.tokens, stats.rounds) == (120, 120)
    assert stats.verify_ms == pytest.approx(120 * 20.0)
    assert stats.host_ms == pytest.approx(120 * 1.0, rel=0.02)
    assert stats.tokens_per_s == pytest.approx(1e3 / 21.0, rel=0.01)


def test_plain_speculation_waits_for_its_steps() -> None:
    play = Play(method="sd", text_lookup=False, target={"lookahead": 3, "exact_lookahead": True})
    _, stats = run(play, Hardware(verify_ms=20.0, step_ms=2.0))
    assert stats.wait_ms / stats.rounds == pytest.approx(3 * 2.0, rel=0.1)


def test_a_wait_for_a_draft_takes_the_messages_way_and_its_steps() -> None:
    """A step that runs when the outcome comes is ended first."""
    play = Play(budget=1, strict=True, text_lookup=False, target={"lookahead": 1, "exact_lookahead": True})
    _, stats = run(play, Hardware(verify_ms=20.0, step_ms=2.0, message_ms=0.5))
    assert 0.0 < stats.sums.waits < stats.rounds
    assert 2.5 <= stats.wait_ms / stats.sums.waits <= 6.5


def test_the_text_is_that_of_plain_decoding() -> None:
    expected, _ = run(Play(method="ar"))
    for play in (Play(method="sd"), Play(), Play(target={"backup": "auto"}), Play(budget=4, strict=True)):
        assert run(play)[0] == expected
    assert run(Play(), drafts=3)[0] == expected


def test_it_repeats_to_the_last_bit() -> None:
    assert run(Play(proposing=Proposing()))[1] == run(Play(proposing=Proposing()))[1]


def test_drafts_work_beside_the_target() -> None:
    speeds = {method: run(Play(method=method))[1].tokens_per_s for method in ("ar", "sd", "ssd")}
    assert speeds["ar"] < speeds["sd"] < speeds["ssd"]
    assert run(Play())[1].duty_cycle > run(Play(method="sd"))[1].duty_cycle


def test_several_drafts_prepare_for_more() -> None:
    slow = Hardware(verify_ms=20.0, step_ms=4.0, message_ms=0.5)
    play = Play(budget=3, text_lookup=False)
    assert run(play, slow, drafts=3)[1].hit_rate > run(play, slow, drafts=1)[1].hit_rate


@pytest.mark.parametrize(
    ("temperature", "verify_ms", "blur"),
    [
        (0.0, 6.0, 1.0),
        (1.0, 60.0, 0.4),
        pytest.param(0.0, 60.0, 0.4, marks=pytest.mark.slow),
        pytest.param(1.0, 6.0, 1.0, marks=pytest.mark.slow),
    ],
)
def test_auto_lookahead_is_within_five_percent_of_the_best(temperature: float, verify_ms: float, blur: float) -> None:
    """A lookahead left open is the longest: the drafts' order of work decides how deep branches get."""
    hardware = Hardware(verify_ms=verify_ms, step_ms=2.0, host_ms=0.5, message_ms=0.3, token_ms=0.05)

    def speed(longest: int) -> float:
        play = Play(text_lookup=False, target={"lookahead": longest, "backup": "draft"})
        rehearsal = Rehearsal(TARGET, [TARGET.blurred(blur)], hardware, play)
        total = RequestStats()
        for seed in range(1 + (verify_ms < 10.0)):
            params = SamplingParams(temperature=temperature, max_tokens=150, seed=seed)
            total = add(total, rehearsal.run([*PROMPT, seed], params)[1])
        return Stats(sums=total).tokens_per_s

    auto = speed(lookahead(EngineConfig()))
    assert auto > 0.95 * max(speed(fixed) for fixed in (1, 3, 6))
