"""From the arguments of a Serve application to an engine's configuration and its placement group."""

import pytest

from ssd_ray.cluster import serve
from ssd_ray.config import EngineConfig
from ssd_ray.errors import ConfigError


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
