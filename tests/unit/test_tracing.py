"""A timeline of what target and drafts did: what is noted, what is kept of it, and the file that it becomes."""

from __future__ import annotations

import json
import time
from collections import Counter
from itertools import count, pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from ssd_ray.actors.draft import DraftActor
from ssd_ray.actors.target import TargetActor
from ssd_ray.cluster.preflight import check
from ssd_ray.cluster.trace_file import document, write_trace
from ssd_ray.config import EngineConfig, SamplingParams
from ssd_ray.errors import ConfigError
from ssd_ray.stats import EngineStats
from ssd_ray.tracing import Lane, Recorder
from ssd_ray.transport.memory import MemoryHub, MemorySpoke
from ssd_ray.transport.traced import traced
from ssd_ray.wire import Close, Lost, Output, encode, kinds
from tests.support.pump import Pump, table_pair
from tests.support.tiny import tiny_pair

LONG = SamplingParams(max_tokens=60, seed=3)


class Traced:
    """A trace as who reads the file has it: events by actor and kind."""

    def __init__(self, trace: dict[str, Any]) -> None:
        self.events = trace["traceEvents"]
        self.other = trace["otherData"]
        self.names = {each["pid"]: each["args"]["name"] for each in self.events if each["name"] == "process_name"}

    def of(self, actor: str, kind: str) -> list[dict[str, Any]]:
        return [each for each in self.events if each["name"] == kind and self.names[each["pid"]] == actor]

    def figures(self, actor: str, kind: str, name: str) -> list[Any]:
        return [each["args"][name] for each in self.of(actor, kind)]


def run(path: Path, requests: int = 3, drafts: int = 2) -> tuple[Traced, EngineStats, list[str | None]]:
    """The trace, figures and ends of some requests to a target and drafts in one thread, in real time."""
    target, models = table_pair(drafts=drafts)
    pump = Pump(target, models, clock=lambda: perf_counter, trace=True, concurrency=4, prefill_chunk=8)
    texts = pump.run_all([([*range(1, 31)], LONG) for _ in range(requests)])
    write_trace(str(path), pump.traces)
    return Traced(json.loads(path.read_bytes())), pump.target.stats(), [text.finish_reason for text in texts]


@pytest.fixture(scope="module")
def traced_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Traced, EngineStats, list[str | None]]:
    return run(tmp_path_factory.mktemp("trace") / "trace.json")


def test_every_actor_has_a_lane_of_its_own_events(traced_run: Any) -> None:
    trace, _, _ = traced_run
    assert sorted(trace.names.values()) == ["draft-0", "draft-1", "target"]
    assert len({each["tid"] for each in trace.events}) == 3
    assert trace.other["lost"] == []
    assert set(trace.other["dropped"].values()) == {0}
    common = {"prefill", "send", "receive"}
    metadata = {"process_name", "process_labels", "process_sort_index", "thread_name", "frame"}
    for name, own in (("target", {"verify", "outcome"}), ("draft-0", {"step"}), ("draft-1", {"step"})):
        found = {each["name"] for each in trace.events if trace.names[each["pid"]] == name}
        assert found - metadata - {"idle", "wait for drafts"} == common | own


def test_the_figures_are_those_of_the_engine(traced_run: Any) -> None:
    trace, stats, ends = traced_run
    assert sum(trace.figures("target", "verify", "rows")) == stats.rounds
    assert sum(trace.figures("target", "verify", "tokens")) == stats.sums.verified
    assert sum(trace.figures("target", "outcome", "tokens")) == stats.tokens == 3 * 60
    accepted = Counter(trace.figures("target", "outcome", "accepted"))
    assert [accepted[each] for each in range(16)] == list(stats.accepted)
    following = Counter(trace.figures("target", "outcome", "next"))
    assert following["hit"] == stats.sums.hits > 0
    assert {cause: following[cause] for cause in stats.misses} == stats.misses
    assert following["length"] == len(ends) == 3
    assert sum(trace.figures("target", "prefill", "tokens")) + stats.cached_tokens == 3 * 29
    for kind, total_ms in (("verify", stats.verify_ms), ("wait for drafts", stats.wait_ms)):
        assert 1e-3 * sum(each["dur"] for each in trace.of("target", kind)) == pytest.approx(total_ms, abs=0.01)


def test_spans_of_a_lane_follow_or_contain_one_another(traced_run: Any) -> None:
    trace, _, _ = traced_run
    for actor in trace.names.values():
        spans = [each for each in trace.events if each["ph"] == "X" and trace.names[each["pid"]] == actor]
        open_until: list[float] = []
        for each in sorted(spans, key=lambda each: (each["ts"], -each["dur"])):
            start, end = round(1e3 * each["ts"]), round(1e3 * (each["ts"] + each["dur"]))
            while open_until and open_until[-1] <= start:
                open_until.pop()
            assert not open_until or end <= open_until[-1], each
            open_until.append(end)
    for actor, kind in (("target", "verify"), ("draft-0", "step"), ("draft-1", "step")):
        for one, other in pairwise(sorted(trace.of(actor, kind), key=lambda each: each["ts"])):
            assert one["ts"] + one["dur"] <= other["ts"] + 1e-3


def test_an_arrow_goes_from_each_sending_to_its_receipt(traced_run: Any) -> None:
    trace, _, _ = traced_run
    starts, ends = ({each["id"]: each for each in trace.events if each["ph"] == phase} for phase in "sf")
    assert starts.keys() == ends.keys()
    assert len(starts) == sum(len(trace.of(name, "receive")) for name in trace.names.values()) > 0
    assert all(starts[each]["ts"] <= ends[each]["ts"] for each in starts)
    assert all(starts[each]["pid"] != ends[each]["pid"] for each in starts)
    said = {actor: set(trace.figures(actor, "send", "kinds")) for actor in trace.names.values()}
    assert said["draft-0"] <= {"hello", "nodes", "lost", "declined", "goodbye"}
    assert {"open", "outcome", "output"} <= said["target"]
    assert {"target"} == set(trace.figures("draft-1", "receive", "peer"))


def test_nothing_is_noted_unless_it_is_asked_for() -> None:
    target, models = table_pair()
    pump = Pump(target, models)
    pump.run([1, 2, 3], LONG)
    assert pump.traces == []
    hub = MemoryHub()
    assert traced(hub, None) is hub


def test_the_text_is_the_same_with_a_trace() -> None:
    target, models = table_pair()
    plain, noted = (Pump(target, models, trace=trace).run([1, 2, 3], LONG) for trace in (False, True))
    assert plain.tokens == noted.tokens


def test_the_oldest_events_make_room_and_are_counted() -> None:
    ticks = count()
    recorder = Recorder("target", clock=lambda: float(next(ticks)), limit=3)
    for each in range(5):
        recorder.mark("outcome", each, 0, 1, "hit")
    lane = recorder.lane
    assert [event[3] for event in lane.events] == [2, 3, 4]
    assert lane.dropped == 2
    trace = Traced(document([("target", [lane])]))
    assert trace.other["dropped"] == {"target": 2}
    assert [each["ts"] for each in trace.of("target", "outcome")] == [0.0, 1e6, 2e6]


def test_lanes_of_processes_that_started_at_other_times_are_on_one_clock() -> None:
    now = time.time()
    lanes = [
        Lane(name, [("idle", 1.0 - shift, 2.0 - shift)], 0, now + shift) for name, shift in (("a", 0.0), ("b", 50.0))
    ]
    trace = Traced(document([(lane.name, [lane]) for lane in lanes]))
    assert [trace.of(name, "idle")[0]["ts"] for name in "ab"] == pytest.approx([0.0, 0.0], abs=1.0)


def test_what_a_dead_actor_did_is_lost_and_the_file_says_so(tmp_path: Path) -> None:
    recorder = Recorder("draft-1")
    recorder.span("step", 1.0, 2.0, 8, 1)
    write_trace(str(tmp_path / "t.json"), [("target", None), ("draft-1", [recorder.lane])])
    trace = Traced(json.loads((tmp_path / "t.json").read_bytes()))
    assert trace.other["lost"] == ["target"]
    assert len(trace.of("draft-1", "step")) == 1
    (label, _) = (each["args"]["labels"] for each in trace.events if each["name"] == "process_labels")
    assert "lost" in label
    assert list(tmp_path.iterdir()) == [tmp_path / "t.json"]


def test_a_trace_of_nothing_is_one() -> None:
    assert document([])["traceEvents"] == []


def test_what_cannot_be_written_at_the_end_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_trace(str(tmp_path / "gone" / "t.json"), [])
    assert "trace: not written" in caplog.text


@pytest.mark.parametrize("path", ["gone/t.json", ".", f"{'t' * 300}.json"])
def test_a_path_that_cannot_be_written_is_refused_before_anything_is_looked_at(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^trace: expected a file that can be written, got "):
        check(EngineConfig(target="no-such-model", trace=path))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_file_is_not_replaced() -> None:
    with pytest.raises(ConfigError, match="no regular file"):
        check(EngineConfig(target="no-such-model", trace="/dev/null"))


def test_a_path_is_made_absolute_where_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    given = ("t.json", "~/t.json", tmp_path / "t.json")
    assert {EngineConfig.from_kwargs(trace=each).trace for each in given} == {str(tmp_path / "t.json")}


def test_kinds_of_messages_are_read_from_the_frame() -> None:
    assert kinds(encode(5, Lost(1), Close(2), Output(3, [4]))) == ["lost", "close", "output"]
    assert kinds(memoryview(encode(5))) == []
    assert kinds(b"\xffgarbage") == kinds(b"") == []


def test_actors_hand_over_a_lane_for_each_of_their_loops(tmp_path: Path) -> None:
    target, draft = tiny_pair(tmp_path, context=64)
    config = EngineConfig(target=target, draft=draft, method="sd", trace=str(tmp_path / "t.json"), max_num_seqs=1)
    actor = TargetActor(config, hub := MemoryHub(), session=1, cores=None)
    actor.submit(1, [1, 2, 3], SamplingParams(max_tokens=8, ignore_eos=True))
    while not actor.stats().requests:
        actor._target.turn(0.0)
    lanes = {lane.name: {event[0] for event in lane.events} for lane in actor.lanes}
    assert {"verify", "outcome", "wait for drafts", "idle"} <= lanes["target"]
    assert {"step", "receive"} <= lanes["inline"]
    spoke = MemorySpoke(hub.address, "draft-0")
    (lane,) = DraftActor(config, spoke, session=1, cores=None).lanes
    assert lane.name == "draft-0"
