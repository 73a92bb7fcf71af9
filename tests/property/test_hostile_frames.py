"""Whatever frames arrive, from whoever gets one in: texts are what they were, loops go on, all that do nothing are
counted, and nothing is kept."""

from __future__ import annotations

import gc
import logging
import random
import sys
from collections import Counter, deque

import msgspec
import pytest

from ssd_ray import wire
from ssd_ray.config import SamplingParams
from ssd_ray.errors import ProtocolError
from ssd_ray.sampling.rejection import Proposing
from ssd_ray.transport.channel import HUB
from ssd_ray.transport.inbox import Inbox
from ssd_ray.wire import decode, encode
from tests.support.pump import SESSION, Pump, Text, garbage, table_pair

VOCAB = 64
PEER = "draft-0"
STRANGER = "nobody"
AT_ONCE = 200
"""Frames of a burst, half of them for the target. Queues take 256 of a peer."""

KEPT_BLOCKS = 2000
"""Blocks of memory by which a moment may differ from another: what is kept is bounded, and not always the same."""

REQUESTS = (
    ([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=24)),
    ([5, 6, 7, 8], SamplingParams(seed=11, max_tokens=30)),
    ([9, 8], SamplingParams(seed=5, max_tokens=20, repetition_penalty=1.3, logprobs=2)),
)

pytestmark = pytest.mark.timeout(1800)


class Tap:
    """Keeps some of the frames that pass an inbox: the first ones, to be repeated long after, and the latest."""

    def __init__(self, inbox: Inbox) -> None:
        self._put = inbox.put
        self.frames: deque[bytes] = deque(maxlen=64)
        self.first: list[bytes] = []
        self.twice = False
        inbox.put = self.put  # type: ignore[method-assign]

    def put(self, sender: str, frame: bytes) -> bool:
        (self.frames if len(self.first) == 64 else self.first).append(bytes(frame))
        return self._put(sender, frame) and (not self.twice or self._put(sender, frame))

    def throw(self, sender: str, frame: bytes) -> None:
        assert self._put(sender, frame)

    def pick(self, dice: random.Random) -> bytes:
        return dice.choice(self.first if not self.frames or dice.random() < 0.3 else self.frames)


def number(dice: random.Random) -> int:
    return dice.choice([0, 1, 2, 3, dice.randrange(100), dice.randrange(2**20), 2**31 - 1, 2**53, 2**63, -1, -2, -66])


def value(dice: random.Random, depth: int = 0) -> object:
    """Anything that msgpack can say."""
    match dice.randrange(9 if depth < 3 else 6):
        case 0:
            return dice.choice([None, True, False, float("inf"), float("nan"), -1.5, 0.5, 1e308])
        case 1:
            return dice.choice(["", "x" * 70, PEER, "nodes", "float32", "\U0001f600"])
        case 2:
            return dice.randbytes(dice.randrange(40))
        case 3 | 4 | 5:
            return number(dice)
        case 6:
            return {str(value(dice, 3)): value(dice, depth + 1) for _ in range(dice.randrange(3))}
        case _:
            return [value(dice, depth + 1) for _ in range(dice.randrange(6))]


TAGS = [kind.__struct_config__.tag for kind in wire.AnyMessage.__args__]  # type: ignore[union-attr]


def numbers(dice: random.Random, most: int, low: int, high: int) -> list[int]:
    return [dice.randint(low, high) for _ in range(dice.randrange(most))]


def message(dice: random.Random) -> wire.Message:
    """A message that is well formed and says something else than anybody means."""
    sequence, round = dice.randrange(6), dice.choice([0, 1, 5, dice.randrange(40), 2**53])
    tokens, speculation = numbers(dice, 20, 0, 2 * VOCAB), numbers(dice, 18, 0, 2 * VOCAB)
    match dice.randrange(10):
        case 0:
            return wire.Hello(dice.choice([PEER, STRANGER, ""]), dice.random() < 0.5, dice.randrange(9))
        case 1 | 2:
            parents = [dice.randint(-20, 40) for _ in tokens[dice.random() < 0.1 :]]
            chances = dice.randbytes(len(tokens)) if dice.random() < 0.5 else b""
            step = dice.choice([0.0, 1e-9, 3.0, 3.6e6]), dice.choice([1, 2**60]), dice.choice([0, 1, 2**53])
            sampled = numbers(dice, 4, 0, 30)
            laws = memoryview(dice.randbytes(4 * dice.randrange(8))), memoryview(dice.randbytes(4 * len(sampled)))
            more = [dice.randrange(99) for _ in sampled], [dice.random() for _ in sampled]
            first = dice.choice([0, dice.randrange(300), 2**53])
            return wire.Nodes(sequence, round, first, parents, tokens, *step, chances, sampled, *laws, *more)
        case 3:
            return wire.Lost(sequence, dice.choice([0, 5, 2**53]))
        case 4:
            leaving = [wire.Goodbye(PEER)] if dice.random() < 0.02 else []
            return dice.choice([wire.Declined(sequence), wire.Close(sequence), *leaving])
        case 5:
            share = dice.randrange(5), dice.choice([1, 4096])
            prompt = dice.choice([0, 1, 2**53]), dice.choice([0, 0, 0, 3])
            return wire.Open(sequence, round, tokens, speculation, REQUESTS[sequence % 3][1], 0.5, *share, *prompt)
        case 6 | 7:
            position, accepted = dice.randrange(40), dice.choice([0, 1, 3, 2**53])
            price = dice.choice([0.0, 0.1, float("inf")]), dice.random()
            rest = dice.random() < 0.5, dice.choice([0, 5, 2**53]), dice.random(), 0, dice.choice([1, 4096]), *price
            return wire.Outcome(sequence, round, position, accepted, dice.randrange(99), speculation, *rest)
        case 8:
            return wire.Begin(sequence, round, speculation, dice.randrange(5), dice.choice([1, 4096]))
        case _:
            numbers_of = memoryview(dice.randbytes(8))
            return dice.choice(
                [wire.States(sequence, 0, 2, "float16", numbers_of), wire.Output(sequence, tokens, "stop")]
            )


def hostile(dice: random.Random, tap: Tap) -> bytes:
    """A frame that nobody has sent, or nobody has sent now."""
    frame = tap.pick(dice)
    match dice.randrange(9):
        case 0:
            return frame
        case 1:
            return frame[: dice.randrange(len(frame))]
        case 2:
            return frame + tap.pick(dice)
        case 3:
            return dice.randbytes(dice.randrange(60))
        case 4:
            return encode(dice.choice([0, SESSION + 1, 2**53]), *decode(SESSION, frame))
        case 5:
            body = [dice.choice(TAGS), *(value(dice) for _ in range(dice.randrange(12)))]
            return msgspec.msgpack.encode(
                [dice.choice([wire.VERSION, wire.VERSION, 1]), SESSION, [body, body][: dice.randrange(3)]]
            )
        case 6 | 7:
            return encode(SESSION, *(message(dice) for _ in range(dice.randrange(4))))
        case _:
            return garbage(frame, dice)


class Siege:
    """A target and its draft with requests that run again and again, under frames thrown at both."""

    def __init__(self, seed: int, proposing: Proposing | None = None) -> None:
        target, drafts = table_pair(0.8, vocab_size=VOCAB, rows=4, max_length=64, contexts=256)
        options = {"concurrency": len(REQUESTS), "backup": "auto"}
        self.pump = Pump(target, drafts, draft_turns=lambda: 3, proposing=proposing, **options)
        self.dice = random.Random(seed)
        self.rejecting = proposing is not None
        self.thrown = self.number = 0
        self.faults: Counter[str] = Counter()
        inboxes = self.pump.address.inboxes
        self.taps = {HUB: Tap(inboxes[HUB]), PEER: Tap(inboxes[PEER])}
        self.alone = self.every_request()

    def every_request(self, frames: int = 0) -> list[Text]:
        """Run every request once, while so many frames come now and then, before one of a few turns of the target."""
        self.number += len(REQUESTS)
        texts = [self.pump.submit(self.number + index, *request) for index, request in enumerate(REQUESTS)]
        while not all(text.finish_reason for text in texts):
            for _ in range(frames if self.dice.random() < 0.4 else 0):
                self.throw()
            self.pump.turn()
        self.pump.texts.clear()
        self.pump._requests.clear()
        return texts

    def throw(self) -> None:
        """A frame for the target, mostly in the draft's name, or one for the draft."""
        self.thrown += 1
        to, sender = (PEER, HUB) if self.thrown % 2 else (HUB, self.dice.choice([PEER, PEER, PEER, STRANGER]))
        frame = hostile(self.dice, self.taps[to])
        self.taps[to].throw(sender, frame)
        if to == HUB:
            try:
                decode(SESSION, frame)
            except ProtocolError as error:
                self.faults[error.fault] += 1

    def last(self, frames: int) -> None:
        """Go on until so many frames have come; texts are what they were alone."""
        end = self.thrown + frames
        while self.thrown < end:
            for text, alone in zip(self.every_request(AT_ONCE), self.alone, strict=True):
                same = (text.tokens, text.logprobs) == (alone.tokens, alone.logprobs)
                assert same or self.rejecting  # then a text depends on what was drafted
                assert (text.finish_reason, len(text.tokens)) == (alone.finish_reason, len(alone.tokens))


def kept_blocks() -> int:
    gc.collect()
    return sys.getallocatedblocks()


@pytest.mark.parametrize(
    ("frames", "proposing"),
    [(8_000, None), (2_000, Proposing(16)), pytest.param(1_000_000, None, marks=pytest.mark.slow)],
    ids=["coupled", "rejection", "a million"],
)
def test_nothing_that_arrives_changes_anything(
    frames: int, proposing: Proposing | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    siege = Siege(frames, proposing)
    siege.last(frames // 4)
    before = kept_blocks()
    siege.last(3 * frames // 4)
    grown = kept_blocks() - before
    assert not caplog.records
    dropped = siege.pump.target.stats().dropped_frames
    assert {fault: dropped[fault] for fault in siege.faults} == siege.faults
    assert min(dropped.values()) > 0
    assert sum(dropped.values()) - dropped["by_drafts"] <= siege.thrown
    assert siege.pump.target.stats().hit_rate > 0.1  # the draft is not out of it
    siege.pump.validate()
    assert grown < KEPT_BLOCKS


def test_what_is_said_again_at_once_and_long_after_changes_nothing() -> None:
    siege = Siege(0)
    for tap in siege.taps.values():
        tap.twice = True
    for _ in range(3):
        for tap, sender in zip(siege.taps.values(), (PEER, HUB), strict=True):
            for frame in [*tap.first, *tap.frames]:
                tap.throw(sender, frame)
        assert [text.tokens for text in siege.every_request()] == [text.tokens for text in siege.alone]
    dropped = siege.pump.target.stats().dropped_frames
    assert dropped["stale"] > 100
    assert dropped["malformed"] == dropped["version"] == dropped["session"] == 0
    assert siege.pump.drafts[0].dropped > 0


def test_frames_of_a_target_that_has_died_are_of_another_session() -> None:
    siege = Siege(1)
    old = list(siege.taps[HUB].first), list(siege.taps[PEER].first)
    model, _ = table_pair(0.8, vocab_size=VOCAB, rows=4, max_length=64, contexts=256)
    siege.pump.lose_target(model)
    inboxes = siege.pump.address.inboxes
    for frame in old[0]:
        inboxes[HUB].put(PEER, frame)
    for frame in old[1]:
        inboxes[PEER].put(HUB, frame)
    assert [text.tokens for text in siege.every_request()] == [text.tokens for text in siege.alone]
    assert siege.pump.target.stats().dropped_frames["session"] == len(old[0])
    assert siege.pump.drafts[0].dropped == len(old[1])
