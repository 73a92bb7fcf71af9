"""What the supervisor relies on, and what it says, without Ray."""

import inspect
from contextvars import ContextVar
from types import SimpleNamespace

import pytest

from ssd_ray.cluster import supervisor as module
from ssd_ray.cluster.processes import DraftProcess, TargetProcess
from ssd_ray.cluster.refs import CONCURRENCY_GROUPS
from ssd_ray.cluster.supervisor import Member, Supervisor, call
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

    monkeypatch.setattr(module.ray, "get", get)
    monkeypatch.setattr(module.ray, "wait", lambda refs: ([failed], [slow]))
    supervisor = Supervisor(EngineConfig(), {}, 1, None, lambda _: None)
    supervisor._target = object.__new__(Member)
    supervisor._target.handle = None
    place = type("Place", (), {"cores": None})
    with pytest.raises(ModelError, match="no weights"):
        supervisor._join([Member("draft-0", slow, place), Member("draft-1", failed, place)])
    supervisor.close()


def test_calls_are_apart_from_the_task_that_makes_them():
    """Else they are cancelled with it, as that of a client that leaves a server is."""
    task = ContextVar("task", default=None)
    task.set("a request")
    method = SimpleNamespace(remote=lambda *args: (task.get(), args))
    assert call(method, 1, 2) == (None, (1, 2))
    assert task.get() == "a request"
