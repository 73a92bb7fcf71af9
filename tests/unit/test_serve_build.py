"""From the arguments of a Serve application to an engine's configuration, its placement group, and what it says if it
does not start."""

from types import SimpleNamespace

import pytest

from ssd_ray.cluster import serve
from ssd_ray.config import EngineConfig
from ssd_ray.errors import ConfigError, EngineError, UnsupportedModelError


@pytest.fixture
def built(monkeypatch):
    """The configuration that an application is built of."""
    monkeypatch.setattr(serve, "application", lambda config: config)
    return serve.build


def test_words_of_a_command_line_become_values(built):
    words = {"num_drafts": "2", "lookahead": "auto", "budget": "8", "compile": "true", "target": "a/b"}
    expected = EngineConfig(num_drafts=2, lookahead="auto", budget=8, compile=True, target="a/b")
    assert built(words) == expected
    assert built({"num_drafts": 2, "budget": 8, "compile": True, "target": "a/b"}) == expected
    assert built({}) == EngineConfig()


@pytest.mark.parametrize(
    ("field", "value"), [("num_drafts", "two"), ("num_drafts", "-1"), ("colour", "red"), ("method", "magic")]
)
def test_bad_arguments(built, field, value):
    with pytest.raises(ConfigError, match=field):
        built({field: value})


@pytest.mark.parametrize(
    ("fields", "cluster", "bundles"),
    [
        ({"num_drafts": 2}, {"CPU": 8.0}, [{"CPU": 1.0}] * 4),
        ({"num_drafts": 2}, {"CPU": 2.0}, [{"CPU": 0.5}] * 4),
        ({"method": "sd"}, {"CPU": 8.0}, [{"CPU": 1.0}] * 2),
        ({}, {"CPU": 8.0, "GPU": 4.0}, [{"CPU": 1.0}] + [{"CPU": 1.0, "GPU": 1.0}] * 2),
        ({"device": "cpu"}, {"CPU": 8.0, "GPU": 4.0}, [{"CPU": 1.0}] * 3),
    ],
)
def test_a_replica_and_each_of_its_actors_have_a_bundle(fields, cluster, bundles):
    assert serve.bundles(EngineConfig(**fields), cluster) == bundles


REFUSAL = "target: LlamaForCausalLM does not take positions and mask as they are given"


@pytest.fixture
def fails(monkeypatch):
    """Lets Serve fail to start an application, with a message of its replica."""

    def fail(message):
        deployments = {serve.NAME: SimpleNamespace(message=message)}
        status = SimpleNamespace(applications={serve.NAME: SimpleNamespace(deployments=deployments)})
        monkeypatch.setattr(serve.serve, "status", lambda: status)

    def run(*_, **__):
        raise RuntimeError("Failed to update the deployments ['ssd-ray'].")

    monkeypatch.setattr(serve.serve, "run", run)
    return fail


def test_the_replicas_words_reach_whoever_starts_a_server(fails):
    fails(
        "The deployment failed to start 1 times in a row. Error:\nTraceback (most recent call last):\n"
        f"  File ...\nssd_ray.errors.UnsupportedModelError: {REFUSAL}\n"
    )
    with pytest.raises(UnsupportedModelError, match=f"^{REFUSAL}$"):
        serve._run(None)


def test_what_is_no_error_of_ours_is_told_in_serves_words(fails):
    fails("a node died")
    with pytest.raises(EngineError, match="the server does not start: Failed to update the deployments"):
        serve._run(None)


def test_a_replica_that_is_refused_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(serve, "_cluster_resources", lambda: {"CPU": 8.0})
    deployment = serve.application(EngineConfig())._bound_deployment
    assert deployment._deployment_config.max_constructor_retry_count == 1
