"""A Ray of the tests' own, as a user may have one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import ray

from ssd_ray.cluster.runtime import RayRuntime


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


class SharedRay:
    """A private Ray for whoever comes next."""

    def __init__(self) -> None:
        self._runtime: RayRuntime | None = None

    def runtime(self) -> RayRuntime:
        """The one that is there, or a new one."""
        if self._runtime is None:
            self._runtime = RayRuntime()
            assert self._runtime.kind == "private"
        return self._runtime

    def end(self) -> None:
        """End it, if there is one."""
        if self._runtime is not None:
            self._runtime.close()
            self._runtime = None


SHARED = SharedRay()
