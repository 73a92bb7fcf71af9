"""Every message that travels between target, drafts and driver.

A frame is msgpack: ``[version, session, [message, ..]]``. ``session`` is a random number of one target, so that a
frame of another engine, or of a target that has died, is recognised and dropped. Messages are frozen structs with a tag
and with limits on every length; nothing is ever unpickled. :func:`decode` raises
:class:`~ssd_ray.errors.ProtocolError` for anything else, and the receivers count such frames and drop them.

Positions count from the first prompt token. *Round r* of a sequence is its r-th verification. The verification of round
r runs over the *trunk* of that round: the bonus token (depth 0) and the speculated tokens (depths 1 to n).
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from ssd_ray.config import MAX_LOGPROBS, SamplingParams
from ssd_ray.errors import ConfigError, ProtocolError

VERSION = 4

MAX_SHARES = 4096
"""Drafts among which guesses are dealt out at most."""

Count = Annotated[int, Meta(ge=0, le=2**53)]
Token = Annotated[int, Meta(ge=0, lt=2**31)]
Name = Annotated[str, Meta(max_length=64)]
Tokens = Annotated[list[Token], Meta(max_length=1 << 22)]
Speculation = Annotated[list[Token], Meta(max_length=64)]
Parent = Annotated[int, Meta(ge=-65, le=2**53)]
Factor = Annotated[float, Meta(ge=0.0, le=1.0)]
StatesDtype = Literal["float32", "bfloat16", "float16"]
Price = Annotated[float, Meta(ge=0.0)]
Shares = Annotated[int, Meta(ge=1, le=MAX_SHARES)]
Milliseconds = Annotated[float, Meta(ge=0.0, le=3.6e6)]
OfFrame = Meta(max_length=4096)  # how many messages a frame has


class Message(Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Base of all messages."""


# From a draft to the target.


class Hello(Message, frozen=True, tag="hello"):
    """The draft is there, its model is loaded: deal it a share of every open sequence. ``reads`` says whether it wants
    the target's hidden states, too; ``dropped`` how many frames it has dropped so far."""

    name: Name
    reads: bool = False
    dropped: Count = 0


class Nodes(Message, frozen=True, tag="nodes"):
    """New nodes of the draft's tree for one sequence.

    Node i has the id ``first + i``; ids are unique in (draft, sequence) and never used again. ``parents[i]`` is the id
    of an earlier node, or ``-1 - depth`` for a guess that follows the trunk token at that depth of round ``round``.
    ``step_ms`` is what the draft's last step took, which ran ``step_tokens`` for so many ``sequences``. ``chances`` has
    a byte for each node: 255 times the probability of being accepted once it is reached, as its draft has it, and 0
    where it says nothing (guesses, which are not reached but right or wrong). Empty: it says nothing of any.

    In rejection mode node ``sampled[j]`` of the message was drawn from law j: part j of as many equal parts of
    ``law_tokens`` (int32; empty if the laws are over the whole vocabulary, in order) and ``law_weights`` (float32),
    whose mass on the likeliest ``law_guesses[j] + 1`` was lowered by the factor ``law_factors[j]``.
    """

    sequence: Count
    round: Count
    first: Count
    parents: Annotated[list[Parent], Meta(max_length=4096)]
    tokens: Annotated[list[Token], Meta(max_length=4096)]
    step_ms: Milliseconds = 0.0
    sequences: Annotated[int, Meta(ge=1)] = 1
    step_tokens: Count = 0
    chances: Annotated[bytes, Meta(max_length=4096)] = b""
    sampled: Annotated[list[Count], Meta(max_length=4096)] = []
    law_tokens: memoryview = memoryview(b"")
    law_weights: memoryview = memoryview(b"")
    law_guesses: Annotated[list[Count], Meta(max_length=4096)] = []
    law_factors: Annotated[list[Factor], Meta(max_length=4096)] = []


class Lost(Message, frozen=True, tag="lost"):
    """The draft does not know the sequence's past (it joined late or missed an outcome), or whether it still runs: open
    it again, or close it. The target's hidden states of its first ``known`` tokens are there."""

    sequence: Count
    known: Count = 0


class Declined(Message, frozen=True, tag="declined"):
    """The sequence is beyond the draft, in its length or with a token that the draft does not know, or ended there with
    an error: it goes on without this draft."""

    sequence: Count


class Goodbye(Message, frozen=True, tag="goodbye"):
    """The draft leaves; its share goes to the others."""

    name: Name


# From the target to a draft.


class Open(Message, frozen=True, tag="open"):
    """A sequence as it stands: all committed tokens, the bonus token of ``round`` last, and what is being verified.

    The first ``prompt_tokens`` tokens are the prompt. ``tokens`` lacks the first ``omitted`` ones, if the driver hands
    a long prompt to the draft itself. ``c`` is the Saguaro's C to draw with from now on, in rejection mode.
    """

    sequence: Count
    round: Count
    tokens: Tokens
    speculation: Speculation
    params: SamplingParams
    c: Factor = 1.0
    share: Count = 0
    shares: Shares = 1
    prompt_tokens: Count = 0
    omitted: Count = 0


class Outcome(Message, frozen=True, tag="outcome"):
    """What the verification of ``round`` decided, and what the next one verifies.

    ``accepted`` speculated tokens and then ``bonus_token`` were committed; ``position`` is that of the bonus token.
    ``speculation`` is what the verification of ``round + 1`` runs over, unless the target waits for more: until there
    are ``wanted`` tokens. ``hit`` says whether a speculation was prepared.
    Guesses are dealt: this draft takes share ``share`` of ``shares``. ``c`` as in :class:`Open`.
    What nobody waits for is worth drafting only where a step adds more than ``price`` tokens, expected, by the
    millisecond, to this sequence (infinity: never), and a token only where it is reached and accepted, should its
    outcome happen, with a probability of ``floor``: the target would not verify it.
    """

    sequence: Count
    round: Count
    position: Count
    accepted: Count
    bonus_token: Token
    speculation: Speculation
    hit: bool
    wanted: Count = 0
    c: Factor = 1.0
    share: Count = 0
    shares: Shares = 1
    price: Price = 0.0
    floor: Factor = 0.0


class Begin(Message, frozen=True, tag="begin"):
    """What the verification of ``round`` runs over, where that is more than the last outcome said: the target waited
    for more of a branch."""

    sequence: Count
    round: Count
    speculation: Speculation
    share: Count = 0
    shares: Shares = 1


class States(Message, frozen=True, tag="states"):
    """The target's hidden states of ``count`` committed tokens from position ``start`` on, as many numbers of each, of
    this dtype. They are sent as they come to be, in the order of their tokens."""

    sequence: Count
    start: Count
    count: Annotated[int, Meta(ge=1, le=1 << 22)]
    dtype: StatesDtype
    numbers: memoryview


class Close(Message, frozen=True, tag="close"):
    """The sequence has ended."""

    sequence: Count


# From the target to the driver.


class Misses(Struct, frozen=True, array_like=True):
    """Rounds whose speculation was not prepared, by cause.

    Attributes:
        fan_out: guesses for this many accepted tokens were there, this token was not among them.
        late: the draft was at work on the round, but had not come to this outcome.
        stale: the draft was still at work on an earlier round.
        cold: no draft had sent anything for this sequence yet.
        no_draft: no draft took part: none is connected, or the text is beyond them.
    """

    fan_out: int = 0
    late: int = 0
    stale: int = 0
    cold: int = 0
    no_draft: int = 0


class Backups(Struct, frozen=True, array_like=True):
    """What rounds did whose speculation was not prepared.

    Attributes:
        draft: waited for a draft.
        ngram: took what followed the last tokens earlier in the text.
        none: went on without a speculation.
    """

    draft: int = 0
    ngram: int = 0
    none: int = 0


class RequestStats(Struct, frozen=True, array_like=True):
    """Figures of one request, or sums over several.

    Attributes:
        rounds: verifications.
        tokens: tokens generated.
        prompt_tokens: tokens of the prompt.
        hits: rounds that began with a prepared speculation; ``misses`` the others. The first round of a request counts
            as neither.
        accepted: histogram; ``accepted[k]`` rounds accepted exactly k tokens.
        speculated: histogram; ``speculated[n]`` rounds verified n tokens.
        verify_ms, wait_ms, host_ms: milliseconds inside verification forwards, waiting for drafts, and the rest of the
            rounds.
        prefill_ms: milliseconds of prefill.
        waits: rounds that waited for a draft.
        backups: misses by what was done about them.
        verified: tokens that verifications ran, bonus tokens included, padding apart.
        partial: rounds that began with a speculation shorter than could be of use.
        tree_tokens: tokens that drafts sent; ``tree_used`` of them were verified, or guessed right.
        draft_ms: milliseconds of the draft steps that made them, over all drafts; ``draft_used_ms`` those of steps of
            which at least one token was used.
        cached_tokens: tokens that were not prefilled, because their KV was there from an earlier request.
        preemptions: times that it had to give its memory back and wait again.
        resumed_tokens: tokens, of those generated, that came from a target which then died. Its other figures are gone
            with it.
    """

    rounds: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    hits: int = 0
    misses: Misses = Misses()
    accepted: tuple[int, ...] = ()
    speculated: tuple[int, ...] = ()
    verify_ms: float = 0.0
    wait_ms: float = 0.0
    host_ms: float = 0.0
    prefill_ms: float = 0.0
    waits: int = 0
    backups: Backups = Backups()
    verified: int = 0
    partial: int = 0
    tree_tokens: int = 0
    tree_used: int = 0
    draft_ms: float = 0.0
    draft_used_ms: float = 0.0
    cached_tokens: int = 0
    preemptions: int = 0
    resumed_tokens: int = 0


class TokenLogprobs(Struct, frozen=True, array_like=True):
    """Log-probabilities in nats at one token of a text, as the target has them before penalties and temperature.

    Attributes:
        token_id: the token of the text.
        logprob: its log-probability.
        rank: 1 if no token is likelier, 2 if one is, and so on.
        top: the likeliest tokens and their log-probabilities, best first, as many as were asked for.
    """

    token_id: Token
    logprob: float
    rank: Count
    top: Annotated[dict[Token, float], Meta(max_length=MAX_LOGPROBS)]


class Output(Message, frozen=True, tag="output"):
    """Tokens of one request, with the log-probabilities of each if they were asked for. The last message of a request
    has a ``finish_reason`` and its ``stats``; without them the target has never had the request.

    ``finish_reason`` is "length", "stop" (an end-of-sequence or stop token, or a stop string), "cancelled",
    "timeout" or "error" (then ``error`` says what happened).
    """

    request: Count
    tokens: Tokens
    finish_reason: Name | None = None
    stats: RequestStats | None = None
    error: Annotated[str, Meta(max_length=4096)] | None = None
    logprobs: Annotated[list[TokenLogprobs], Meta(max_length=64)] = []


AnyMessage = Hello | Nodes | Lost | Declined | Goodbye | Open | Outcome | Begin | States | Close | Output

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(tuple[int, int, Annotated[list[AnyMessage], OfFrame]])


class _Tagged(Struct, array_like=True):
    """A message of which only the tag is read."""

    tag: str


_outline = msgspec.msgpack.Decoder(tuple[int, int, Annotated[list[_Tagged], OfFrame]])


def encode(session: int, *messages: Message) -> bytes:
    """Make a frame of messages."""
    return _encoder.encode((VERSION, session, messages))


def decode(session: int, frame: bytes | memoryview) -> list[AnyMessage]:
    """Read a frame of this session: all of its messages, or none. Laws and states are not copied: they are views of the
    frame.

    Raises:
        ProtocolError: the frame is malformed, of another version or of another session.
    """
    try:
        version, other, messages = _decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, ConfigError) as error:
        raise ProtocolError(f"no messages: {error}") from None
    if version != VERSION:
        raise ProtocolError(f"version {version}, expected {VERSION}", "version")
    if other != session:
        raise ProtocolError(f"session {other:#x}, expected {session:#x}", "session")
    return messages


def kinds(frame: bytes | memoryview) -> list[str]:
    """The tags of a frame's messages, whosever they are; none if it is malformed."""
    try:
        return [message.tag for message in _outline.decode(frame)[2]]
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return []
