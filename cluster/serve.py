"""A Ray Serve application: OpenAI's API over engines of this package.

    serve run ssd_ray.cluster.serve:build target=DIR draft=DIR num_drafts=2

One replica is one engine: a target and its drafts. Serve reserves a placement group for each replica, whose first
bundle holds the replica itself (HTTP, tokens to text) and whose further ones hold the target and the drafts of the
configuration, so a replica starts as a whole or waits as a whole, and Serve's autoscaling counts what it really takes.
Drafts that join later take placement groups of their own. Where the cluster has fewer CPUs than a replica has
processes, they share them.

A replica's own queue is the engine's ``max_queue``; beyond it clients get status 429. Serve replaces a replica whose
engine has failed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from math import floor
from socket import AF_INET, AF_INET6, SO_REUSEADDR, SOL_SOCKET, socket
from typing import Any, get_type_hints

import ray
from fastapi import FastAPI
from pydantic import TypeAdapter, ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.config import HTTPOptions

from ssd_ray.async_llm import AsyncLLM
from ssd_ray.cluster.placement import gpus_of_an_actor
from ssd_ray.cluster.preflight import check
from ssd_ray.cluster.routes import make_app
from ssd_ray.cluster.runtime import RayRuntime, require_cluster
from ssd_ray.config import EngineConfig
from ssd_ray.errors import ConfigError, EngineError, SsdRayError, quoted_error

NAME = "ssd-ray"
"""The application's name in Serve."""

REFUSALS = 64
"""Requests beyond ``max_queue`` that a replica takes at the same time, to refuse them."""


class Replica:
    """One engine behind HTTP."""

    async def __init__(self, config: EngineConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        self.llm = await AsyncLLM(**asdict(config)).start()

    async def check_health(self) -> None:
        """Raise an error of ours if the engine has failed."""
        await self.llm.stats()

    async def __del__(self) -> None:
        if hasattr(self, "llm"):
            await self.llm.close()


def build(args: dict[str, Any]) -> Application:
    """Build the application from fields of :class:`~ssd_ray.config.EngineConfig`, as strings or as what they are.

    Raises:
        ConfigError: a field is unknown or has a value that it does not take.
    """
    hints = get_type_hints(EngineConfig)
    return application(EngineConfig.from_kwargs(**{name: _parse(name, hints, args[name]) for name in args}))


def application(config: EngineConfig) -> Application:
    """The application of a configuration, for the cluster that this process is, or will be, connected to."""
    group = bundles(config, _cluster_resources())
    deployment = serve.deployment(
        name=NAME,
        max_ongoing_requests=config.max_queue + REFUSALS,
        max_constructor_retry_count=1,  # an engine that is refused once is refused again; later replicas are retried
        ray_actor_options={"num_cpus": group[0]["CPU"]},
        placement_group_bundles=group,
    )
    return deployment(serve.ingress(_app)(Replica)).bind(config)


def bundles(config: EngineConfig, resources: Mapping[str, float]) -> list[dict[str, float]]:
    """The placement group of a replica: its own bundle, the target's, and one for each draft and spare.

    Args:
        resources: of the cluster.

    Raises:
        ResourceError: ``device`` is "cuda" and the cluster has no GPU.
    """
    actors = 1 + config.draft_actors + config.spare_targets
    share = floor(100 * resources.get("CPU", 1.0) / (1 + actors)) / 100
    cpu = {"CPU": max(0.01, min(1.0, share))}
    gpus = gpus_of_an_actor(config.device, resources)
    return [cpu, *[cpu | ({"GPU": gpus} if gpus else {}) for _ in range(actors)]]


def _cluster_resources() -> Mapping[str, float]:
    """What the cluster has. `serve run` builds an application before it connects: this does so for a moment then."""
    if ray.is_initialized():
        resources: Mapping[str, float] = ray.cluster_resources()
        return resources
    require_cluster()
    with ray.init(log_to_driver=False, logging_level=logging.ERROR):
        return _cluster_resources()


@contextmanager
def serving(config: EngineConfig, host: str, port: int) -> Iterator[str]:
    """Serve until the block is left; the address. Leaving it takes down whatever was started.

    Raises:
        SsdRayError: the application does not start.
    """
    checked = check(config)
    _require_free(host, port)
    runtime = RayRuntime()
    try:
        serve.start(http_options=HTTPOptions(host=host, port=port))
        try:
            _run(application(checked.config))
            yield f"http://{host}:{port}"
        finally:
            serve.delete(NAME)
            if runtime.kind != "private" and not serve.status().applications:
                serve.shutdown()  # a private Ray takes Serve with it
    finally:
        runtime.close()


def _require_free(host: str, port: int) -> None:
    try:
        with socket(AF_INET6 if ":" in host else AF_INET) as probe:
            probe.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ConfigError("port", f"one that is free on {host} ({error})", port) from None


def _run(app: Application) -> None:
    try:
        serve.run(app, name=NAME, route_prefix="/")
    except RuntimeError as error:
        raise _replicas_error() or EngineError(f"the server does not start: {error}") from error


def _replicas_error() -> SsdRayError | None:
    """Why a replica did not start, in its own words, which Serve keeps as text and does not pass on."""
    application = serve.status().applications.get(NAME)
    deployments = application.deployments.values() if application is not None else ()
    errors = (quoted_error(deployment.message) for deployment in deployments)
    return next(filter(None, errors), None)


def _app() -> FastAPI:
    """Called in the replica."""
    return make_app(lambda: serve.get_replica_context().servable_object.llm)


def _parse(name: str, hints: dict[str, Any], value: Any) -> Any:
    if name not in hints:
        return value  # refused with the others' names
    try:
        return TypeAdapter(hints[name]).validate_python(value)
    except ValidationError as error:
        raise ConfigError(name, error.errors()[0]["msg"], value) from None
