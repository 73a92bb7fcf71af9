"""The garbage collector is put aside for a while, and is then as it was."""

import gc
from contextlib import suppress

import pytest

from ssd_ray.heap import collector_rests, keep_what_is_there


@pytest.fixture(autouse=True)
def collector():
    """Other tests find it as they left it."""
    enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    yield
    if not frozen:
        gc.unfreeze()
    (gc.enable if enabled else gc.disable)()


@pytest.mark.parametrize("set_it", [gc.enable, gc.disable])
def test_it_rests_and_is_as_it_was(set_it):
    set_it()
    before = gc.isenabled()
    with suppress(ImportError), collector_rests():
        with collector_rests():
            pass
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() == before


def test_what_is_kept_is_not_looked_at():
    kept = [[]]
    keep_what_is_there()
    assert not any(each is kept for each in gc.get_objects())
