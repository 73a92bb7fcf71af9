"""What one sequence raises ends that sequence, and neither the loop nor the others that it serves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from traceback import format_exception
from typing import Any, TypeVar

import torch

from ssd_ray.errors import EngineError

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

BROKEN: tuple[type[Exception], ...] = (EngineError, getattr(torch, "AcceleratorError", EngineError))
"""Errors after which nobody can be served, on a device or a channel that has failed: the loop has to end."""

LONGEST = 1000
"""Characters of an error that its request is told."""


class Isolation:
    """Does for sequences what a loop does for them, and takes out those for which it raises.

    Args:
        end: ends a sequence because of an error; it is given whatever was worked on.
    """

    def __init__(self, end: Callable[[Any, Exception], None]) -> None:
        self._end = end

    def each(self, sequences: Iterable[T], step: Callable[[T], R]) -> list[tuple[T, R]]:
        """Do something for one after the other; returns those that went well, and what came of them."""
        done = []
        for sequence in sequences:
            try:
                done.append((sequence, step(sequence)))
            except BROKEN:
                raise
            except Exception as error:  # whatever it is, the others go on
                logger.error("a sequence is ended by its error\n%s", _written("".join(format_exception(error))))
                self._end(sequence, error)
        return done

    def together(self, sequences: Sequence[T], step: Callable[[Sequence[T]], Iterable[R]]) -> list[tuple[T, R]]:
        """Do something for all at once that may be done again; should it fail, for each alone, to see whose fault it
        is."""
        if not sequences:
            return []
        try:
            return list(zip(sequences, step(sequences), strict=True))
        except BROKEN:
            raise
        except Exception as error:
            logger.warning("what failed for %d sequences is tried for each alone: %s", len(sequences), told(error))
        return self.each(sequences, lambda sequence: next(iter(step([sequence]))))


def told(error: Exception) -> str:
    """An error in a message: short, and a text that can be written."""
    return _written(f"{type(error).__name__}: {error}")[:LONGEST]


def _written(text: str) -> str:
    """A text as UTF-8 can write it."""
    return text.encode(errors="backslashreplace").decode()
