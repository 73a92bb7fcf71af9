"""A target verifies what is worth its time, whatever its machine; and its text is the same on all of them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, reduce

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_ray.bench.grid import BRIEF, QUICK, Cell, survey
from ssd_ray.bench.rehearsal import Play, Rehearsal
from ssd_ray.bench.simulate import Hardware
from ssd_ray.config import MAX_LOOKAHEAD, SamplingParams
from ssd_ray.models.table import TableModel
from ssd_ray.sampling.rejection import Proposing
from ssd_ray.speculation.window import SCRATCH
from ssd_ray.stats import Stats, add

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
TARGET = TableModel(scratch=SCRATCH, vocab_size=64, rows=len(PROMPTS))
GOOD, POOR = TARGET.blurred(0.3), TARGET.blurred(3.0)
SSD = Play("ssd")
FREE_TOKENS, DEAR_TOKENS = Hardware(20.0, 2.0), Hardware(20.0, 2.0, verify_token_ms=20.0)


def decode(
    hardware: Hardware, draft: TableModel, play: Play, *, rows: int = 1, tokens: int = 100, temperature: float = 0.0
) -> tuple[list[list[int]], Stats]:
    """The texts and figures of some requests that run together on such a machine."""
    play = replace(play, target=play.target | {"concurrency": rows})
    params = SamplingParams(temperature=temperature, max_tokens=tokens, seed=5)
    came = Rehearsal(TARGET, [draft], hardware, play).run_all([(prompt, params) for prompt in PROMPTS[:rows]])
    return [text for text, _ in came], Stats(sums=reduce(add, [figures for _, figures in came]))


def speculated(stats: Stats) -> float:
    """Tokens beside the bonus token that a row verified in a round."""
    return stats.sums.verified / stats.rounds - 1.0


@cache
def texts(tokens: int, temperature: float) -> list[list[int]]:
    """Of plain decoding."""
    return decode(FREE_TOKENS, GOOD, Play("ar"), rows=len(PROMPTS), tokens=tokens, temperature=temperature)[0]


class TestWhatIsVerified:
    @pytest.mark.parametrize("method", ["sd", "ssd"])
    @pytest.mark.parametrize("rows", [1, pytest.param(3, marks=pytest.mark.slow)])
    def test_dear_tokens_that_are_seldom_right_are_not(self, method: str, rows: int) -> None:
        """A token costs what a round does: only one that is all but certain would be worth it."""
        _, dear = decode(DEAR_TOKENS, POOR, Play(method), rows=rows)
        _, free = decode(FREE_TOKENS, POOR, Play(method), rows=rows)
        assert speculated(dear) < 0.15
        assert speculated(free) > 4 * speculated(dear)

    def test_free_tokens_are(self) -> None:
        _, stats = decode(FREE_TOKENS, GOOD, Play("sd"))
        assert speculated(stats) > 3.0

    def test_the_dearer_the_fewer(self) -> None:
        machines = [Hardware(20.0, 1.0, verify_token_ms=each) for each in (0.0, 2.0, 8.0, 40.0)]
        verified = [speculated(decode(machine, GOOD, SSD)[1]) for machine in machines]
        assert verified == sorted(verified, reverse=True)
        assert verified[0] > verified[-1] + 1.0

    def test_an_exact_lookahead_is_verified_whatever_it_costs(self) -> None:
        exact = Play("sd", text_lookup=False, target={"lookahead": 4, "exact_lookahead": True})
        _, stats = decode(DEAR_TOKENS, POOR, exact)
        assert speculated(stats) == pytest.approx(4.0, abs=0.15)  # there is no room for so many at the end

    def test_a_limit_of_the_lookahead_stays_one(self) -> None:
        _, stats = decode(FREE_TOKENS, GOOD, Play(target={"lookahead": 2}))
        assert stats.sums.speculated[2] > 0
        assert not any(stats.sums.speculated[3:])


class TestWhatItTurnsInto:
    def test_where_speculation_does_not_pay_plain_decoding(self) -> None:
        _, plain = decode(DEAR_TOKENS, POOR, Play("ar"), tokens=200)
        _, stats = decode(DEAR_TOKENS, POOR, SSD, tokens=200)
        assert stats.tokens_per_s > 0.95 * plain.tokens_per_s

    def test_where_drafts_slow_the_target_down_they_rest(self) -> None:
        steps = {}
        for drag in (0.0, 0.8):
            rehearsal = Rehearsal(TARGET, [POOR], Hardware(20.0, 7.0, verify_token_ms=6.0, drag=drag))
            rehearsal.run(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=200))
            steps[drag] = rehearsal.forwards.steps
        assert steps[0.8] < 0.5 * steps[0.0]

    @pytest.mark.parametrize("blur", [pytest.param(1.5, marks=pytest.mark.slow), 3.0])
    def test_where_drafts_of_many_rows_slow_it_down_they_work_when_asked_if_at_all(self, blur: float) -> None:
        """Finding that out takes a part of so short a run."""
        machine, rows, tokens = Hardware(20.0, 6.7, drag=0.6), len(PROMPTS), 240
        draft, play = TARGET.blurred(blur), replace(SSD, text_lookup=False)
        _, plain = decode(machine, draft, Play("ar"), rows=rows, tokens=tokens)
        _, stats = decode(machine, draft, play, rows=rows, tokens=tokens)
        assert stats.tokens_per_s > 0.91 * plain.tokens_per_s

    def test_what_is_not_verified_is_judged_by_what_came_in_its_place(self) -> None:
        """The bonus token: a target that verifies few tokens, the surest, knows of the others, too."""
        play = Play(text_lookup=False)
        rehearsal = Rehearsal(TARGET, [GOOD], Hardware(20.0, 2.0, verify_token_ms=8.0), play)
        rehearsal.run(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=200))
        assert rehearsal.target._pace.acceptance[0] == pytest.approx(TARGET.agreement(GOOD), abs=0.075)


MS = st.floats(0.1, 50.0)
MACHINES = st.builds(
    Hardware,
    verify_ms=MS,
    step_ms=MS,
    host_ms=st.floats(0.0, 5.0),
    message_ms=st.floats(0.0, 5.0),
    token_ms=st.floats(0.0, 3.0),
    row_ms=st.floats(0.0, 3.0),
    verify_token_ms=st.floats(0.0, 30.0),
    drag=st.floats(0.0, 2.0),
)


@settings(max_examples=40)
@given(
    MACHINES,
    st.sampled_from([GOOD, POOR]),
    st.sampled_from(["sd", "ssd"]),
    st.booleans(),
    st.integers(1, MAX_LOOKAHEAD),
    st.sampled_from([0.0, 1.0]),
)
def test_whatever_things_cost_the_texts_are_those_of_plain_decoding(
    hardware: Hardware, draft: TableModel, method: str, text: bool, lookahead: int, temperature: float
) -> None:
    played = Play(method, text_lookup=text, target={"lookahead": lookahead, "backup": "auto" if text else "draft"})
    assert decode(hardware, draft, played, rows=len(PROMPTS), tokens=25, temperature=temperature)[0] == texts(
        25, temperature
    )


@settings(max_examples=20)
@given(MACHINES, st.sampled_from([GOOD, POOR]))
def test_in_rejection_mode_greedy_texts_are_those_of_plain_decoding(hardware: Hardware, draft: TableModel) -> None:
    played = Play(proposing=Proposing())
    assert decode(hardware, draft, played, rows=len(PROMPTS), tokens=25)[0] == texts(25, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("cell", QUICK.cells, ids=str)
def test_nowhere_is_ssd_slower_than_what_it_replaces(cell: Cell) -> None:
    """At the corners of the grid, and within what so short a run can tell."""
    (figure,) = survey([cell], BRIEF)
    assert figure.ratio >= 0.97
