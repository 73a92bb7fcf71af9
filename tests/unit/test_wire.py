"""Messages survive the wire; nothing else passes."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_ray import wire
from ssd_ray.config import SamplingParams
from ssd_ray.errors import ProtocolError

NUMBER = st.integers(0, 2**53)
TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=20)
FACTORS = st.floats(0, 1)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100),
    top_p=st.floats(0.01, 1),
    seed=st.integers(0, 2**63 - 1),
    stop=st.lists(st.text(min_size=1), max_size=3).map(tuple),
    repetition_penalty=st.floats(0.01, 100),
    logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=3),
    logprobs=st.none() | st.integers(0, 20),
    skip_special_tokens=st.booleans(),
    include_stop_str_in_output=st.booleans(),
    bad_words_ids=st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1), max_size=3),
)
LOGPROBS = st.builds(
    wire.TokenLogprobs,
    st.integers(0, 2**31 - 1),
    st.floats(max_value=0.0, allow_nan=False),
    NUMBER,
    st.dictionaries(st.integers(0, 2**31 - 1), st.floats(max_value=0.0), max_size=20),
)
MESSAGES = st.one_of(
    st.builds(wire.Hello, st.text(max_size=64), st.booleans()),
    st.builds(wire.Nodes, NUMBER, NUMBER, NUMBER, st.lists(st.integers(-65, 2**53)), TOKENS, st.floats(0, 1e6)),
    st.builds(wire.Lost, NUMBER, NUMBER),
    st.builds(wire.Goodbye, st.text(max_size=64)),
    st.builds(wire.Open, NUMBER, NUMBER, TOKENS, TOKENS, PARAMS, FACTORS, NUMBER, st.integers(1, 4096)),
    st.builds(wire.Outcome, NUMBER, NUMBER, NUMBER, NUMBER, st.integers(0, 9), TOKENS, st.booleans(), NUMBER, FACTORS),
    st.builds(wire.Begin, NUMBER, NUMBER, TOKENS),
    st.builds(wire.Close, NUMBER),
    st.builds(wire.States, NUMBER, NUMBER, st.integers(1, 99), st.just("bfloat16"), st.binary().map(memoryview)),
    st.builds(
        wire.Output,
        NUMBER,
        TOKENS,
        st.none() | st.text(max_size=64),
        st.none() | st.just(wire.RequestStats()),
        logprobs=st.lists(LOGPROBS, max_size=3),
    ),
)


@given(session=st.integers(0, 2**63 - 1), messages=st.lists(MESSAGES, max_size=3))
def test_round_trip(session: int, messages: list[wire.Message]) -> None:
    assert wire.decode(session, wire.encode(session, *messages)) == messages


@given(st.binary(max_size=200))
def test_noise_is_refused(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        wire.decode(1, frame)


@given(message=MESSAGES, data=st.data())
def test_a_damaged_frame_is_refused_or_still_a_message(message: wire.Message, data: st.DataObject) -> None:
    frame = bytearray(wire.encode(1, message))
    frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        assert all(isinstance(each, wire.Message) for each in wire.decode(1, bytes(frame)))


def test_other_sessions_and_versions_are_refused() -> None:
    with pytest.raises(ProtocolError, match="session") as error:
        wire.decode(2, wire.encode(1, wire.Close(1)))
    assert error.value.fault == "session"
    other = msgspec.msgpack.encode((wire.VERSION + 1, 1, [wire.Close(1)]))
    with pytest.raises(ProtocolError, match="version") as error:
        wire.decode(1, other)
    assert error.value.fault == "version"


@pytest.mark.parametrize(
    "body",
    [
        ["unknown", 1],
        ["close", -1],
        ["hello", "x" * 65],
        ["nodes", 1, 1, 1, [-66], [1], 0.0],
        ["nodes", 1, 1, 1, [-1], [1], float("inf")],
        ["nodes", 1, 1, 1, [0] * 4097, [1] * 4097, 0.0],
        ["begin", 1, 1, [1] * 65],
        ["open", 1, 1, [1], [], {"temperature": -1.0}],
        ["open", 1, 1, [1], [], {"logit_bias": [[1, 101.0]]}],
        ["output", 1, [1], None, None, None, [[1, -0.5, 1, dict.fromkeys(range(21), -1.0)]]],
    ],
    ids=lambda body: body[0],
)
def test_values_out_of_range_are_refused(body: list[object]) -> None:
    with pytest.raises(ProtocolError):
        wire.decode(1, msgspec.msgpack.encode((wire.VERSION, 1, [body])))
