"""The clock by which forwards are timed at load."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter, thread_time

import torch


def forward_clock(device: torch.device) -> Callable[[], float]:
    """Seconds of this thread's own work, where it does all of it: others at work on the machine do not count then."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return thread_time if alone else perf_counter
