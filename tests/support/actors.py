"""What tests ask an engine's actors, and how they wait for what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic, sleep
from typing import Any

import ray

from ssd_ray import LLM


def info(llm: LLM, name: str) -> dict[str, Any]:
    """What an actor says of its process."""
    handle = llm._engine.driver.actors[name]
    return ray.get(handle.info.remote())


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> float:
    """Seconds that it took."""
    start = monotonic()
    while not condition():
        assert monotonic() < start + seconds, "it did not happen in time"
        sleep(0.005)
    return monotonic() - start
