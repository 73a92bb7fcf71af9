"""One round after the other: fix the speculations, one forward, choose, commit, tell the drafts, wait where that pays.

Nothing in it asks anybody anything: speculations are looked up in the target's own memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from operator import mul
from time import perf_counter

import torch

from ssd_ray.actors.batch import Row
from ssd_ray.actors.isolation import Isolation
from ssd_ray.actors.links import Links
from ssd_ray.config import MAX_LOOKAHEAD, Backup
from ssd_ray.models.contract import ModelRunner
from ssd_ray.saguaro.backup import Pace
from ssd_ray.saguaro.budget import Prospect
from ssd_ray.saguaro.calibration import UNSAID, Calibration
from ssd_ray.saguaro.costs import Costs, Load
from ssd_ray.saguaro.planner import Planner
from ssd_ray.sampling.logprobs import logprobs
from ssd_ray.sampling.verify import Outcome as Decision
from ssd_ray.tracing import Recorder
from ssd_ray.wire import Output, TokenLogprobs

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """How speculations are made.

    Attributes:
        lookahead: tokens in one speculation at most.
        exact_lookahead: wait for ``lookahead`` tokens, and verify them, rather than the best number of them.
        coupled: speculations are verified by equality with the target's own choices.
        backup: what a row does on a miss.
        patient: wait for drafts however long they take: the draft is in this process and never late.
    """

    lookahead: int = MAX_LOOKAHEAD
    exact_lookahead: bool = False
    coupled: bool = True
    backup: Backup = "draft"
    patient: bool = False

    @property
    def looks_up(self) -> bool:
        """Whether a row that missed may speculate what the text suggests."""
        return self.backup in ("ngram", "auto")


class Rounds:
    """The rounds of one target.

    Args:
        runner: the model.
        links: to drafts and driver.
        rules: how speculations are made.
        planner, pace, costs: what the rounds follow, and what learns from them.
        isolation: takes out rows that raise.
        clock: seconds.
        trace: notes what is done; None: nobody does.
    """

    def __init__(
        self,
        runner: ModelRunner,
        links: Links,
        rules: Rules,
        planner: Planner,
        pace: Pace,
        costs: Costs,
        isolation: Isolation,
        clock: Callable[[], float] = perf_counter,
        trace: Recorder | None = None,
    ) -> None:
        self._runner = runner
        self._links = links
        self._rules = rules
        self._planner = planner
        self._pace = pace
        self._costs = costs
        self._isolation = isolation
        self._clock = clock
        self._trace = trace
        self._calibration = Calibration()

    def run(self, rows: Sequence[Row]) -> None:
        """Run one round of rows that can decode. Those that it ends have a finish reason afterwards."""
        start = self._clock()
        wait_ms = self._wait(rows)
        rows = self._begin(rows)
        verify_start = self._clock()
        logits = dict(self._isolation.together(rows, self._verify))
        verify_ms = 1e3 * (self._clock() - verify_start)
        rows = self.each(rows, lambda row: self._commit(row, self._decide(row, logits[row])))
        self._links.receive(0.0)  # after the outcomes are known: most of a tree is done with then
        self._learn(rows, verify_ms)
        self._announce(rows)
        if self._trace is not None:
            _note_round(self._trace, rows, verify_start, verify_ms)
        rows = self.each(rows, lambda row: self._report(row, logits[row]))
        self._links.flush()
        total_ms = 1e3 * (self._clock() - start)
        self._account(rows, total_ms, verify_ms, wait_ms)

    def each(self, rows: Iterable[Row], step: Callable[[Row], None]) -> list[Row]:
        """Do something for each row that still runs; returns those that are left."""
        done = self._isolation.each([row for row in rows if row.lease is not None], step)
        return [row for row, _ in done]

    # What is verified

    def _plan(self, rows: Sequence[Row], *, under_way: bool = False) -> int:
        """Set what each row verifies of what is there, and how many tokens it waits for; returns the draft steps that
        this takes, 0 for going on at once. ``under_way``: the first of them has begun."""
        prospects = [self._prospect(row) for row in rows]
        if self._rules.exact_lookahead:
            lengths = [len(each.there) for each in prospects]
            steps = max((len(each.coming) for each in prospects), default=0)
        else:
            budget = self._planner.budget(prospects, _load(rows), under_way=under_way)
            lengths, steps = list(budget.lengths), self._at_least(budget.steps, prospects)
        for row, prospect, length in zip(rows, prospects, lengths, strict=True):
            there = len(prospect.there)
            row.wanted = min(there + steps, there + len(prospect.coming)) if steps else 0
            row.length = max(there, row.wanted) if steps else length
        return steps

    def _at_least(self, steps: int, prospects: Sequence[Prospect]) -> int:
        """What is never tried is never known: how fast a draft is, and what drafting in turn comes to."""
        untried = not self._pace.tried or (self._rules.patient and self._planner.trial)
        missing = any(each.coming and not each.there for each in prospects)
        return max(steps, 1 if untried and missing else 0)

    def _prospect(self, row: Row) -> Prospect:
        """What a row could verify: what is there, and what drafts would add."""
        most = row.session.most(self._rules.lookahead)
        there = self._chances(row, row.session.cache.said(most))
        waits = self._worth_waiting(row) and not row.looked_up
        return Prospect(there, self._pace.acceptance[len(there) : most] if waits else ())

    def _chances(self, row: Row, said: Sequence[int]) -> list[float]:
        """The probabilities of accepting tokens of which drafts say this, each when it is reached."""
        usual = self._pace.lookup_acceptance if row.looked_up else self._pace.acceptance
        return [
            usual[depth] if each == UNSAID else self._calibration.chance(each, depth) for depth, each in enumerate(said)
        ]

    def _worth_waiting(self, row: Row) -> bool:
        """Whether some draft is at work on this sequence, or will be when it is asked."""
        if not self._links.drafters(row):
            return False
        return self._rules.patient or (self._rules.backup in ("draft", "auto") and self._is_followed(row))

    def _is_followed(self, row: Row) -> bool:
        if self._planner.drafts_work and self._links.drafted_ms > 0.0:
            return self._heard_of(row)
        return bool(row.session.cache.latest) and row.asked > 0  # their silence may be rest

    @staticmethod
    def _heard_of(row: Row) -> bool:
        """Whether some draft has said something about the round before this one."""
        return max(row.session.cache.latest.values(), default=-1) >= max(0, row.session.round - 1)

    def _wait(self, rows: Sequence[Row]) -> float:
        """Wait for drafts where longer speculations are worth it; returns milliseconds."""
        steps = first = self._plan(rows)
        if steps <= 0:
            return 0.0
        start, before = self._clock(), _lengths(rows)
        verify_ms = self._costs.verify_ms(len(rows), _load(rows))
        patience_ms = inf if self._rules.patient else self._pace.patience_ms(steps, verify_ms)
        if not all(map(self._heard_of, rows)):
            patience_ms += verify_ms  # who has rested has to run first what was committed meanwhile
        deadline = start + 1e-3 * patience_ms
        while steps > 0 and (left := deadline - self._clock()) > 0:
            if not self._links.receive(left) and self._rules.patient:
                break
            steps = self._plan(rows, under_way=self._is_under_way(rows))
        waited_ms = 1e3 * (self._clock() - start)
        if self._trace is not None:
            self._trace.span("wait for drafts", start, start + 1e-3 * waited_ms, len(rows), first)
        made = max(now - then for now, then in zip(_lengths(rows), before, strict=True))
        # The draft in this process is never late: what does not come is not to be had, and nothing was lost by asking.
        if not self._planner.disturbed:
            self._pace.saw_wait(waited_ms, made or first, came=self._rules.patient or steps <= 0)
        return waited_ms

    def _is_under_way(self, rows: Sequence[Row]) -> bool:
        """Whether drafts are at work on more of what they were asked for, and will be beside the verification."""
        return not self._rules.patient and any(row.session.cache.available(MAX_LOOKAHEAD) < row.asked for row in rows)

    def _begin(self, rows: Sequence[Row]) -> list[Row]:
        rows = self.each(rows, self._fix_speculation)
        self._links.begin([row for row in rows if row.session.cache.speculation != row.announced])
        return self.each(rows, self.introduce)

    def _fix_speculation(self, row: Row) -> None:
        row.session.begin(row.length, self._rules.lookahead)
        trunk = row.session.cache.tree.trunk
        row.said = [node.said for node in trunk[1:]]
        row.foreseen = trunk[-1].continuation()
        row.expected = 1.0 + sum(accumulate(self._chances(row, row.said), mul))

    def introduce(self, row: Row) -> None:
        """Open the sequence to drafts that do not know of it."""
        self._links.introduce(row, self._planner.c or 0.0)

    # The forward, and what it decides

    @torch.inference_mode()
    def _verify(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """One forward over the rows; for each its logits, float32 [tokens, V]."""
        self._links.drafted_ms = 0.0
        numbers, positions = [row.number for row in rows], [row.session.position for row in rows]
        return self._runner.append(numbers, [row.session.inputs for row in rows], positions)

    @torch.inference_mode()
    def _decide(self, row: Row, logits: torch.Tensor) -> Decision:
        session = row.session
        return row.verifier.decide(logits, session.tokens, session.cache.speculation, session.proposals)

    def _commit(self, row: Row, decision: Decision) -> None:
        session = row.session
        self._learn_chances(row, decision)
        self._pace.saw_outcomes(session.cache.outcomes)
        row.accepted = decision.accepted
        row.added = session.commit(decision)
        row.filled = session.position
        if self._rules.looks_up:
            row.ngrams.extend(row.added)
        row.look_for_stop()

    def _learn_chances(self, row: Row, decision: Decision) -> None:
        """Learn which tokens were accepted. The bonus token says so of the one that was drafted in its place, too: what
        is not worth verifying would else never show that it is."""
        said, accepted = row.said, decision.accepted
        if self._rules.coupled and row.foreseen is not None and accepted == len(said):
            said = [*said, row.foreseen.said]
            accepted += row.foreseen.token == decision.bonus_token
        self._pace.saw_decision(len(said), accepted, looked_up=row.looked_up, whole=row.whole)
        for depth, each in enumerate(said[: accepted + 1]):
            if each != UNSAID:
                self._calibration.saw(each, depth, accepted=depth < accepted)

    def _learn(self, rows: Sequence[Row], verify_ms: float) -> None:
        if not rows:
            return
        tokens = sum(1 + len(row.said) for row in rows)
        self._planner.saw_verification(tokens, _load(rows), verify_ms, self._links.drafted_ms)
        self._calibration.end_round()
        if (plan := self._planner.update()) is not None:
            logger.info("plan: %s", plan)

    # What comes next

    def _announce(self, rows: Sequence[Row]) -> None:
        """Tell the drafts the outcomes and what is verified next."""
        going = [row for row in rows if row.session.finish_reason is None]
        load = _load(going)
        for row in going:
            row.asked = MAX_LOOKAHEAD  # by what is said now, should the plan have it so
        going = self.each(going, lambda row: self._look_up(row, load))
        steps = self._plan(going) if going else 0
        self._links.announce(self.each(going, lambda row: self._speculate(row, waits=steps > 0)), self._planner)

    def _speculate(self, row: Row, *, waits: bool) -> None:
        """What is verified if nothing else comes: what pays, or, if the round waits for more, all that is there."""
        length = row.session.most(self._rules.lookahead) if waits else row.length
        row.announced = row.session.cache.speculate(length)
        row.asked = row.wanted

    def _look_up(self, row: Row, load: Load) -> None:
        """Find what is prepared for the outcome."""
        session = row.session
        hit = session.look_up(self._links.drafters(row))
        if self._planner.factors is not None and row.accepted == len(row.said) > 0:
            self._planner.factors.saw_whole(hit)
        most = session.most(self._rules.lookahead)
        row.looked_up = False
        row.whole = session.cache.available(most) == most
        if not hit:
            self._back_up(row, most, load)

    def _back_up(self, row: Row, most: int, load: Load) -> None:
        """After a miss speculate what the text itself suggests, if the configuration, or the odds, say so."""
        pace, waits = self._pace, self._worth_waiting(row)
        proposal = row.ngrams.propose(most) if self._rules.looks_up else []
        coming = pace.acceptance[:most] if waits else ()
        chances = pace.lookup_acceptance[: len(proposal)]
        if proposal and (self._rules.backup == "ngram" or self._planner.prefers_lookup(chances, coming, load)):
            row.session.cache.plant(proposal)
            row.looked_up = True
        row.session.back_up("ngram" if row.looked_up else "draft" if waits else "none")

    @torch.inference_mode()
    def _report(self, row: Row, logits: torch.Tensor) -> None:
        """Tell the driver the new tokens, which the first rows of the logits decided."""
        most, wanted = row.session.params.logprobs, []
        if most is not None:
            wanted = [TokenLogprobs(*entry) for entry in logprobs(logits, row.added, most)]
        self._links.put(Output(row.session.sequence, row.added, logprobs=wanted))

    def _account(self, rows: Sequence[Row], total_ms: float, verify_ms: float, wait_ms: float) -> None:
        """Share out the milliseconds of a round: verifying, waiting, the rest."""
        host_ms = total_ms - verify_ms - wait_ms
        for row in rows:
            row.session.tally.spent(*(each / len(rows) for each in (verify_ms, wait_ms, host_ms)))
        self._pace.saw_round(sum(len(row.added) for row in rows), total_ms, host_ms)
        self._planner.saw_round(len(rows), sum(row.expected for row in rows), total_ms)


def _note_round(trace: Recorder, rows: Sequence[Row], start: float, verify_ms: float) -> None:
    """Note a verification and what it decided."""
    if rows:
        tokens = sum(1 + len(row.said) for row in rows)
        trace.span("verify", start, start + 1e-3 * verify_ms, tokens, len(rows))
    for row in rows:
        session = row.session
        trace.mark(
            "outcome", session.sequence, row.accepted, len(row.added), session.finish_reason or session.miss or "hit"
        )


def _load(rows: Sequence[Row]) -> Load:
    return Load(len(rows), sum(row.session.position for row in rows))


def _lengths(rows: Sequence[Row]) -> list[int]:
    return [row.session.cache.available(MAX_LOOKAHEAD) for row in rows]
