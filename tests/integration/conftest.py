"""A pair of tiny models."""

import pytest

from tests.support.tiny import tiny_pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Folders of a tiny target and a tiny draft."""
    return tiny_pair(tmp_path_factory.mktemp("pair"), context=512)
