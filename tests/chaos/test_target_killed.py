"""Targets that are killed, stop or hang under running requests: no text changes, and nobody sees an error."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import ray

from ssd_ray import LLM, SamplingParams
from ssd_ray.cluster.placement import Placer
from ssd_ray.errors import EngineError, ResourceError
from ssd_ray.llm import TextStream
from tests.support.actors import info, wait_until
from tests.support.tiny import tiny_pair

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

PROMPT = "def add(a, b):"
PARAMS = [SamplingParams(max_tokens=400, seed=seed, temperature=seed % 2, ignore_eos=True) for seed in range(6)]


def kill(llm: LLM, name: str) -> None:
    os.kill(info(llm, name)["pid"], signal.SIGKILL)


def hang(llm: LLM, name: str) -> None:
    """Let a loop stay in a call, while its process answers."""

    def stick(process: Any) -> None:
        loop = getattr(process._actor, "_target", None) or process._actor._draft

        def turn(*_: object) -> bool:

            sleep(10_000.0)
            return True

        loop.turn = turn

    handle = llm._engine.driver.actors[name]
    ray.get(handle.__ray_call__.options(concurrency_group="inbox").remote(stick))


def freeze(llm: LLM, name: str) -> None:
    os.kill(info(llm, name)["pid"], signal.SIGSTOP)


def begun(llm: LLM) -> list[TextStream]:
    streams = [llm.stream(PROMPT, each) for each in PARAMS]
    for stream in streams:
        next(stream)
    return streams


@contextmanager
def undisturbed(llm: LLM) -> Iterator[list[TextStream]]:
    """Texts under way, which have to be those of a run without what is done meanwhile."""
    calm = [output.token_ids for output in llm.generate([PROMPT] * len(PARAMS), PARAMS)]
    streams = begun(llm)
    yield streams
    assert [stream.wait().token_ids for stream in streams] == calm


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny_pair(tmp_path_factory.mktemp("pair"), context=512)


@pytest.fixture(scope="module")
def llm(cluster: Any, pair: tuple[str, str]) -> Iterator[LLM]:
    with LLM(*pair, stall_timeout=3.0, max_restarts=100) as engine:
        yield engine


@pytest.mark.parametrize("harm", [kill, freeze, hang])
def test_a_target(llm: LLM, harm: Callable[[LLM, str], None], caplog: pytest.LogCaptureFixture) -> None:
    before = llm.stats().target_restarts
    with undisturbed(llm):
        harm(llm, "target")
    assert llm.stats().target_restarts == before + 1
    if harm is not kill:
        assert re.search(r"target has made no progress for \d+ seconds; requests wait", caplog.text)
    wait_until(lambda: len(llm.stats().drafts) == 1, 60.0)


@pytest.mark.parametrize("harm", [freeze, hang])
def test_a_draft(llm: LLM, harm: Callable[[LLM, str], None]) -> None:
    (victim,) = llm.stats().drafts
    before = llm.stats().draft_restarts
    with undisturbed(llm):
        harm(llm, victim)
    wait_until(lambda: llm.stats().draft_restarts == before + 1, 60.0)
    wait_until(lambda: len(llm.stats().drafts) == 1, 60.0)
    assert victim not in llm.stats().drafts


def test_whoever_comes_while_there_is_no_target(llm: LLM) -> None:
    """It waits, and may give up; figures can be had, and drafts can be scaled."""
    before = llm.stats()
    with undisturbed(llm) as streams:
        cancelled = llm.stream(PROMPT, PARAMS[0])
        next(cancelled)
        kill(llm, "target")
        wait_until(lambda: llm.stats().running == 0, 60.0)
        cancelled.cancel()
        assert cancelled.wait().finish_reason == "cancelled"
        assert llm.generate(PROMPT, PARAMS[0], timeout=0.3)[0].finish_reason == "timeout"
        assert llm.stats().target_restarts == before.target_restarts
        assert llm.stats().waiting == len(streams)
        late = llm.stream(PROMPT, PARAMS[1])
        llm.scale_drafts(2)
    assert late.wait().finish_reason == "length"
    after = llm.stats()
    assert after.requests == before.requests + 2 * len(PARAMS) + 3
    wait_until(lambda: len(llm.stats().drafts) == 2, 60.0)
    llm.scale_drafts(1)


def test_a_spare_takes_over_at_once(cluster: Any, pair: tuple[str, str]) -> None:
    with LLM(*pair, spare_targets=1) as llm:
        for restarts in (1, 2):
            wait_until(lambda: llm.stats().spare_targets == 1, 60.0)
            with undisturbed(llm) as streams:
                tokens = llm._engine.driver._requests._under_way[streams[0]._number].text
                kill(llm, "target")
                wait_until(lambda: llm.stats().target_restarts == restarts, 5.0)  # noqa: B023
                seen = len(tokens)
                took = wait_until(lambda: len(tokens) > seen, 5.0)  # noqa: B023
                assert took < 1.0
        wait_until(lambda: llm.stats().spare_targets == 1, 60.0)
        kill(llm, "spare-2")
        wait_until(lambda: llm.stats().spare_targets == 0, 60.0)
        wait_until(lambda: llm.stats().spare_targets == 1, 60.0)


def test_when_all_tries_are_spent_everybody_is_told_why(
    cluster: Any, pair: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The model's folder is gone; a draft was not replaced before, and that was said once."""
    target = tmp_path / "target"
    shutil.copytree(pair[0], target)
    with LLM(str(target), pair[1], max_restarts=1) as llm:
        (draft,) = llm.stats().drafts
        kill(llm, draft)
        wait_until(lambda: llm.stats().draft_restarts == 1, 60.0)
        kill(llm, *llm.stats().drafts)
        wait_until(lambda: "0 drafts are left: texts stay the same, speed does not" in caplog.text, 60.0)
        assert caplog.text.count("it is not started again, as max_restarts=1 has it") == 1
        long = replace(PARAMS[0], max_tokens=400)
        streams = [llm.stream(PROMPT, long) for _ in range(20)]
        next(streams[0])
        shutil.rmtree(target)
        kill(llm, "target")
        told = set()
        for stream in streams[1:]:
            with pytest.raises(EngineError) as error:
                stream.wait()
            told.add(str(error.value))
        (words,) = told
        assert re.match(rf"target died: .*; no other could take its place: target: .*{re.escape(str(target))}", words)


def test_no_room_for_another_target(cluster: Any, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise ResourceError("no room for the target")

    words = r"target died: .*; no other could take its place: no room for the target$"
    with LLM(*pair, num_drafts=0, max_restarts=2) as llm:
        monkeypatch.setattr(Placer, "place", full)
        kill(llm, "target")
        with pytest.raises(EngineError, match=words):
            llm.generate([PROMPT] * 3, PARAMS[0])
        with pytest.raises(EngineError, match=words):
            llm.stats()
