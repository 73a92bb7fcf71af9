"""The dashboard for Grafana asks for what an engine's metrics are, and for nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ssd_ray.cluster import metrics
from ssd_ray.cluster.metrics import Metrics

FILE = Path(metrics.__file__).parent / "manifests" / "grafana.json"

Tags = dict[str, set[str]]


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Tags:
    """The series that Ray makes of an engine's metrics, and the tags of each."""
    series: Tags = {}

    def kind(*ends: str, **of_buckets: str) -> Any:
        class Metric:
            def __init__(self, name: str, *, tag_keys: tuple[str, ...], **_: Any) -> None:
                for end in ends:
                    series[f"ray_{name}{end}"] = {*tag_keys, *of_buckets.get(end.strip("_"), "").split()}

            def set_default_tags(self, tags: dict[str, str]) -> None:
                pass

        return Metric

    monkeypatch.setattr(metrics.metrics, "Counter", kind("_total"))
    monkeypatch.setattr(metrics.metrics, "Histogram", kind("_bucket", "_sum", "_count", bucket="le"))
    Metrics("a-model")
    return series


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    made: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return made


def graphs(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions(dashboard: dict[str, Any]) -> Iterator[str]:
    return (target["expr"] for panel in graphs(dashboard) for target in panel["targets"])


def test_every_series_is_one_of_an_engine(dashboard: dict[str, Any], exported: Tags) -> None:
    for expression in expressions(dashboard):
        named = re.findall(r"\bray_\w+", expression)
        assert named
        assert set(named) <= exported.keys()
        tags = set.intersection(*(exported[name] for name in named))
        kept = set(re.findall(r"by \((\w+)\)", expression)) - set(re.findall(r"ignoring\((\w+)\)", expression))
        assert kept <= tags
        assert expression.count('{model_name=~"$model_name"}') == len(named)
        assert expression.count("(") == expression.count(")")


def test_tags_that_are_ignored_are_those_of_one_side(dashboard: dict[str, Any], exported: Tags) -> None:
    (expression,) = (each for each in expressions(dashboard) if "ignoring" in each)
    left, right = (exported[name] for name in re.findall(r"\bray_\w+", expression))
    assert left - right == {"position"}


def test_legends_name_tags_by_which_their_series_are_apart(dashboard: dict[str, Any]) -> None:
    for panel in graphs(dashboard):
        for target in panel["targets"]:
            for tag in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert f"by ({tag})" in target["expr"]


def test_models_and_data_source_are_variables(dashboard: dict[str, Any], exported: Tags) -> None:
    variables = {each["name"]: each for each in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    series, tag = re.findall(r"label_values\((\w+), (\w+)\)", variables["model_name"]["query"]["query"])[0]
    assert tag in exported[series]
    assert {panel["datasource"]["uid"] for panel in graphs(dashboard)} == {"${datasource}"}


def test_panels_have_ids_and_places_of_their_own(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    squares = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(squares) == len(set(squares))
    assert max(x for x, _ in squares) == 23
    assert all(panel["title"] and panel["description"] for panel in graphs(dashboard))


def test_ratios_of_what_may_never_happen_are_drawn(dashboard: dict[str, Any]) -> None:
    """A counter that has not counted has no series, and whatever is added to nothing, or taken from it, is nothing."""
    for expression in expressions(dashboard):
        terms = re.split(r" [+-] ", expression)
        assert len(terms) == 1 or all("or vector(0)" in term for term in terms[1:]), expression
