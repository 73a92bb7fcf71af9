"""What the supervisor relies on, and what it says, without Ray."""

import inspect
from contextvars import ContextVar
from types import SimpleNamespace

import pytest

from ssd_ray.actors.pulse import FADING, Heart, Pulse
from ssd_ray.cluster import calls
from ssd_ray.cluster import supervisor as module
from ssd_ray.cluster.calls import call
from ssd_ray.cluster.processes import DraftProcess, TargetProcess
from ssd_ray.cluster.refs import CONCURRENCY_GROUPS
from ssd_ray.cluster.supervisor import Member, Supervisor
from ssd_ray.cluster.tries import FIRST_SECONDS, GOOD_SECONDS, MOST_SECONDS, Tries
from ssd_ray.cluster.watch import TURNS, Watch
from ssd_ray.config import EngineConfig
from ssd_ray.errors import ModelError


@pytest.mark.parametrize("process", [TargetProcess, DraftProcess])
def test_every_call_is_answered_while_run_is_under_way(process):
    """``run`` holds the main thread until the engine stops, so no other call may wait for it."""
    methods = {name: method for name, method in inspect.getmembers(process, inspect.isfunction) if name[0] != "_"}
    assert {"run", "info", "stop", "deliver"} <= methods.keys()
    del methods["run"]
    groups = {name: getattr(method, "__ray_concurrency_group__", None) for name, method in methods.items()}
    assert {name for name, group in groups.items() if group not in CONCURRENCY_GROUPS} == set()


class Handle:
    """An actor that loads for ever, or fails."""

    def __init__(self, error):
        self.error = error
        self.start = self

    def remote(self, *_, **__):
        return self


def test_the_first_draft_that_fails_is_told_while_others_load(monkeypatch):
    error = ModelError("draft: no weights")
    slow, failed = Handle(None), Handle(error)

    def get(ref):
        assert ref is failed, "somebody waits for a draft that loads"
        raise ref.error

    monkeypatch.setattr(calls.ray, "get", get)
    monkeypatch.setattr(module.ray, "wait", lambda refs: ([failed], [slow]))
    supervisor = Supervisor(EngineConfig(), {}, None, lambda _: None, lambda _: None)
    handles = [("draft-0", slow), ("draft-1", failed)]
    place = type("Place", (), {"cores": None})
    with pytest.raises(ModelError, match="no weights"):
        supervisor._join([Member(name, handle, place, Tries(0), Watch(1.0)) for name, handle in handles])
    supervisor.close()


def test_calls_are_apart_from_the_task_that_makes_them():
    """Else they are cancelled with it, as that of a client that leaves a server is."""
    task = ContextVar("task", default=None)
    task.set("a request")
    method = SimpleNamespace(remote=lambda *args: (task.get(), args))
    assert call(method, 1, 2) == (None, (1, 2))
    assert task.get() == "a request"


def test_tries_come_ever_later_and_a_good_run_gives_them_back():
    tries = Tries(12)
    waits = [tries.next(1.0) for _ in range(12)]
    assert waits[:4] == [0.0, FIRST_SECONDS, 2 * FIRST_SECONDS, 4 * FIRST_SECONDS]
    assert waits[-1] == MOST_SECONDS
    assert tries.next(GOOD_SECONDS - 1.0) is None
    assert tries.next(GOOD_SECONDS) == 0.0
    assert tries.next(0.0) == FIRST_SECONDS
    assert Tries(0).next(GOOD_SECONDS) is None


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_loop_that_makes_no_turn_is_found_by_the_measure_of_its_own():
    clock = Clock()
    heart, watch = Heart(2.0, clock), Watch(30.0, clock)

    def silence(answers=True):
        """Seconds after which the alarm is given, looked at every second."""
        for _ in range(10_000):
            clock.now += 1.0
            if (silent := watch.look(heart.pulse if answers else None)) is not None:
                return silent
        return None

    assert silence() == 2.0 * TURNS + 1.0  # by what was measured before the first turn
    for _ in range(1000):
        clock.now += 0.01
        heart.beat(worked=True)
    assert watch.look(heart.pulse) is None
    assert silence() == 31.0
    heart.begin()
    clock.now += 5.0
    heart.beat(worked=True)  # slow once, as a prompt's chunk may be
    clock.now += 8.0
    heart.beat(worked=False)  # a rest is no measure
    assert watch.look(heart.pulse) is None
    assert silence() == 5.0 * TURNS + 1.0
    heart.begin()
    for _ in range(500):
        heart.beat(worked=True)
    assert heart.pulse.longest_s == pytest.approx(5.0 * FADING**500)
    assert watch.look(heart.pulse) is None
    assert silence(answers=False) == 31.0


def test_who_watches_may_stand_still_too():
    clock = Clock()
    watch = Watch(30.0, clock)
    clock.now += 1000.0
    assert watch.look(Pulse(0, 0.0)) is None
    clock.now += 1000.0
    assert watch.look(Pulse(0, 0.0)) is None
    assert watch.limit_s == 30.0
