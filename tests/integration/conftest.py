"""A pair of tiny models, and a Ray that the engines of a module share."""

import pytest

from ssd_ray.cluster.runtime import RayRuntime
from tests.support.tiny import tiny_pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Folders of a tiny target and a tiny draft."""
    return tiny_pair(tmp_path_factory.mktemp("pair"), context=512)


@pytest.fixture(scope="module")
def cluster():
    """A private Ray; engines that are made while it is there take it as given."""
    runtime = RayRuntime()
    assert runtime.kind == "private"
    yield runtime
    runtime.close()
