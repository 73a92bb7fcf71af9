"""Where actors live: each on its own GPU, or on its own cores where there are none.

Every actor has a placement group of one bundle, so that the pool is elastic: a draft that leaves gives its place back
to whoever comes next, another engine included.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ssd_ray.errors import ResourceError

logger = logging.getLogger(__name__)

Role = Literal["target", "draft"]

PLACEMENT_SECONDS = 30.0
"""How long a place may take to become free: an actor that has just ended gives its own back a moment later."""

SHARED_GPU = 0.1
"""Each actor's part of the GPU where there is only one; Ray counts parts, it does not enforce them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Room for one actor.

    Attributes:
        group: its placement group, of one bundle.
        gpus: GPUs in the bundle.
        cores: cores of its own, or None on a GPU.
        node: Ray's id of the machine.
    """

    group: PlacementGroup
    gpus: float
    cores: tuple[int, ...] | None
    node: str

    def options(self) -> dict[str, Any]:
        """Ray options that put an actor there."""
        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=0)
        return {"num_cpus": 1, "num_gpus": self.gpus, "scheduling_strategy": strategy}


class Placer:
    """Deals out places.

    Args:
        device: as in :class:`~ssd_ray.config.EngineConfig`; "auto" takes GPUs if the cluster has any.
        drafts: how many drafts to plan for when cores are divided. More can come: they share the drafts' cores.

    Raises:
        ResourceError: ``device`` is "cuda" and the cluster has no GPU.
    """

    def __init__(self, device: str, drafts: int) -> None:
        gpus = ray.cluster_resources().get("GPU", 0.0)
        if device.startswith("cuda") and not gpus:
            raise ResourceError("device: 'cuda' needs a GPU, and Ray sees none; use device='cpu'")
        self._gpus = 0.0 if device == "cpu" or not gpus else 1.0 if gpus > 1 else SHARED_GPU
        if self._gpus == SHARED_GPU and drafts:
            logger.warning("there is one GPU: target and drafts share it and slow each other down")
        self._drafts = drafts
        self._cores: dict[str, Cores] = {}

    def place(self, role: Role) -> Place:
        """Wait for room.

        Raises:
            ResourceError: there is none.
        """
        bundle = {"CPU": 1.0} | ({"GPU": self._gpus} if self._gpus else {})
        group = placement_group([bundle])
        if not group.wait(PLACEMENT_SECONDS):
            remove_placement_group(group)
            free = {name: ray.available_resources().get(name, 0.0) for name in bundle}
            raise ResourceError(f"no room for the {role}: it needs {_words(bundle)}, and free are {_words(free)}")
        node = placement_group_table(group)["bundles_to_node_id"][0]
        cores = None if self._gpus else self._cores_of(node).take(role)
        return Place(group=group, gpus=self._gpus, cores=cores, node=node)

    def release(self, place: Place) -> None:
        """Give a place back; an actor that is still there ends."""
        if place.cores is not None:
            self._cores_of(place.node).give_back(place.cores)
        remove_placement_group(place.group)

    def _cores_of(self, node: str) -> Cores:
        if node not in self._cores:
            self._cores[node] = Cores(_usable_cores(node), self._drafts)
        return self._cores[node]


class Cores:
    """The cores of one machine, divided: one half for the target, the other for drafts, if any are planned.

    Args:
        cores: their numbers.
        drafts: how many drafts the second half is divided among. Further ones take the cores that fewest drafts use.
    """

    def __init__(self, cores: Sequence[int], drafts: int) -> None:
        middle = max(1, len(cores) // 2) if drafts else len(cores)
        self._target = tuple(cores[:middle])
        self._rest = tuple(cores[middle:]) or self._target
        self._share = max(1, len(self._rest) // max(1, drafts))
        self._users: Counter[int] = Counter()

    def take(self, role: Role) -> tuple[int, ...]:
        """Cores for one more actor."""
        chosen = self._target if role == "target" else self._least_used()
        self._users.update(chosen)
        return chosen

    def give_back(self, cores: Sequence[int]) -> None:
        """The actor that had them is gone."""
        self._users.subtract(cores)

    def _least_used(self) -> tuple[int, ...]:
        return tuple(sorted(sorted(self._rest, key=self._users.__getitem__)[: self._share]))


def _usable_cores(node: str) -> list[int]:
    """Cores that processes of a machine may use."""
    if node == ray.get_runtime_context().get_node_id():
        return _own_cores()
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    ask: Callable[..., Any] = ray.remote(num_cpus=0, scheduling_strategy=strategy)(_own_cores).remote
    return list(ray.get(ask()))


def _own_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _words(resources: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())
