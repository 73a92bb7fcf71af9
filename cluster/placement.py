"""Where actors live: each on its own GPU, or on its own cores where there are none.

Every actor has a placement group of one bundle, so that the pool is elastic: a draft that leaves gives its place back
to whoever comes next, another engine included. An engine inside a placement group that captures what its members start,
as a Ray Serve replica is, first fills the bundles behind that of its own process.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ssd_ray.errors import ResourceError

logger = logging.getLogger(__name__)

Role = Literal["target", "draft"]

PLACEMENT_SECONDS = 30.0
"""How long a place may take to become free: an actor that has just ended gives its own back a moment later."""

SHARED_GPU = 0.1
"""Each actor's part of the GPU where there is only one; Ray counts parts, it does not enforce them."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle of a placement group.

    Attributes:
        group: the placement group.
        index: the bundle's number in it.
        resources: what the bundle has.
        given: whether the group was there before and stays.
    """

    group: PlacementGroup
    index: int
    resources: Mapping[str, float]
    given: bool = False

    def options(self) -> dict[str, Any]:
        """Ray options of an actor that takes all of it."""
        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=self.index)
        amounts = {"num_cpus": self.resources["CPU"], "num_gpus": self.resources.get("GPU", 0.0)}
        return amounts | {"scheduling_strategy": strategy}

    def node(self) -> str:
        """Ray's id of the machine."""
        return str(placement_group_table(self.group)["bundles_to_node_id"][self.index])


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Room for one actor.

    Attributes:
        bundle: where in which placement group.
        cores: cores of its own, or None on a GPU.
        node: Ray's id of the machine.
    """

    bundle: Bundle
    cores: tuple[int, ...] | None
    node: str

    def options(self) -> dict[str, Any]:
        """Ray options that put an actor there."""
        return self.bundle.options()


class Placer:
    """Deals out places, to any thread.

    Args:
        device: as in :class:`~ssd_ray.config.EngineConfig`; "auto" takes GPUs if the cluster has any.
        drafts: how many drafts to plan for when cores are divided. More can come: they share the drafts' cores.

    Raises:
        ResourceError: ``device`` is "cuda" and the cluster has no GPU.
    """

    def __init__(self, device: str, drafts: int) -> None:
        self._gpus = gpus_of_an_actor(device, ray.cluster_resources())
        if self._gpus == SHARED_GPU and drafts:
            logger.warning("there is one GPU: target and drafts share it and slow each other down")
        self._drafts = drafts
        self._cores: dict[str, Cores] = {}
        self._dealing = threading.Lock()  # guards what has been dealt, not the wait for more
        self._given = [bundle for bundle in _given_bundles() if bundle.resources.get("GPU", 0.0) >= self._gpus]

    def place(self, role: Role) -> Place:
        """Wait for room.

        Raises:
            ResourceError: there is none.
        """
        with self._dealing:
            given = self._given.pop(0) if self._given else None
        bundle = given or self._reserve(role)
        node = bundle.node()
        with self._dealing:
            cores = None if self._gpus else self._cores_of(node).take(role)
        return Place(bundle=bundle, cores=cores, node=node)

    def release(self, place: Place) -> None:
        """Give a place back; an actor that is still there ends."""
        with self._dealing:
            if place.cores is not None:
                self._cores_of(place.node).give_back(place.cores)
            if place.bundle.given:
                self._given.append(place.bundle)
        if not place.bundle.given:
            remove_placement_group(place.bundle.group)

    def _reserve(self, role: Role) -> Bundle:
        resources = {"CPU": 1.0} | ({"GPU": self._gpus} if self._gpus else {})
        group = placement_group([resources])
        if not group.wait(PLACEMENT_SECONDS):
            remove_placement_group(group)
            free = {name: ray.available_resources().get(name, 0.0) for name in resources}
            raise ResourceError(f"no room for the {role}: it needs {_words(resources)}, and free are {_words(free)}")
        return Bundle(group, 0, resources)

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


def gpus_of_an_actor(device: str, resources: Mapping[str, float]) -> float:
    """GPUs that each actor takes on a cluster with these resources: one, its part of the only one, or none.

    Raises:
        ResourceError: ``device`` is "cuda" and the cluster has no GPU.
    """
    gpus = resources.get("GPU", 0.0)
    if device.startswith("cuda") and not gpus:
        raise ResourceError("device: 'cuda' needs a GPU, and Ray sees none; use device='cpu'")
    return 0.0 if device == "cpu" or not gpus else 1.0 if gpus > 1 else SHARED_GPU


def _given_bundles() -> list[Bundle]:
    """Those behind the first one, which is this process's own, of the placement group that captures what it starts."""
    group = get_current_placement_group()
    if group is None or not ray.get_runtime_context().should_capture_child_tasks_in_placement_group:
        return []
    return [Bundle(group, index, bundle, given=True) for index, bundle in enumerate(group.bundle_specs) if index > 0]


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
