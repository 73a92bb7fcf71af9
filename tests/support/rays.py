"""A Ray of the tests' own, as a user may have one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import ray


@contextmanager
def own_ray(**resources: float) -> Iterator[None]:
    """Start a Ray with these resources; nothing of it stays."""
    # Short, since Ray's sockets lie there. Ray's processes may still write while it is removed.
    with TemporaryDirectory(prefix="ssd-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(_temp_dir=folder, include_dashboard=False, log_to_driver=False, **resources)
        try:
            yield
        finally:
            ray.shutdown()
