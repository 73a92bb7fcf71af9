"""The public names, pinned: adding or losing one is a decision, not an accident."""

import pytest

import ssd_ray

PUBLIC = {"LLM", "AsyncLLM", "EngineStats", "RequestOutput", "SamplingParams", "SsdRayError", "__version__"}


def test_public_names():
    assert set(ssd_ray.__all__) == PUBLIC
    assert set(dir(ssd_ray)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_each_name_loads(name):
    assert getattr(ssd_ray, name) is not None


def test_a_name_is_itself_whichever_way_it_is_imported():
    from ssd_ray import errors

    assert ssd_ray.SsdRayError is errors.SsdRayError


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Engine'"):
        _ = ssd_ray.Engine
    with pytest.raises(ImportError, match="Engine"):
        from ssd_ray import Engine  # noqa: F401


def test_star_import_gives_the_public_names():
    names = {}
    exec("from ssd_ray import *", names)
    assert set(names) - {"__builtins__"} == PUBLIC
