"""Calls of actors: how they are made, and what becomes of their errors and warnings."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from ssd_ray.errors import EngineError, ResourceError, SsdRayError
from ssd_ray.heap import keep_what_is_there

logger = logging.getLogger(__name__)


def deferred(kind: type) -> type:
    """Move the work of a class's constructor into ``start``.

    Ray reports an error in an actor's constructor as a death, in words alone. That of a method arrives as itself, and
    so do the warnings, which ``start`` returns.
    """

    class Deferred(kind):
        def __init__(self) -> None:
            pass

        def start(self, *args: Any, **kwargs: Any) -> list[str]:
            keep_what_is_there()
            with _warnings() as warnings:
                super().__init__(*args, **kwargs)
            return warnings

    Deferred.__name__ = Deferred.__qualname__ = kind.__name__
    return Deferred


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Keep what the library warns of."""
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    library = logging.getLogger("ssd_ray")
    library.addHandler(handler)
    try:
        yield warnings
    finally:
        library.removeHandler(handler)


def pass_on(warnings: Sequence[str]) -> None:
    """Log what an actor warned of."""
    for warning in warnings:
        logger.warning("%s", warning)


def call(method: Any, *args: Any) -> Any:
    """Call an actor's method, apart from the task that this may be; the ref of what it returns.

    Where a client leaves, Serve cancels the task of its request and, recursively, the calls that the task has made. The
    actor would wait for a call that never comes, and after half a minute drop all others.
    """
    return Context().run(method.remote, *args)


def get(ref: Any, name: str) -> Any:
    """What a call of the actor ``name`` returns.

    Raises:
        SsdRayError: what befell it.
    """
    try:
        return ray.get(ref)
    except RayError as error:
        raise own_error(error, name) from error


def own_error(error: BaseException, name: str) -> SsdRayError:
    """Say in an error of ours what befell the actor ``name``: the very error that it raised if that is one of ours."""
    if isinstance(error, SsdRayError) and not isinstance(error, RayError):
        return error
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, SsdRayError):
            return cause
        if isinstance(cause, MemoryError):
            return ResourceError(f"{name}: out of memory: {cause}")
        return EngineError(f"{name} failed: {type(cause).__name__}: {cause}")
    lines = [line for line in str(error).splitlines() if not line.startswith("\t")]  # the others are Ray's ids
    return EngineError(f"{name} died: {' '.join(lines[1:] or lines)}")
