"""The progress line: results pass through it, and it is silent unless it is wanted."""

from types import SimpleNamespace

import pytest

from ssd_ray.progress import track
from ssd_ray.stats import Stats
from ssd_ray.wire import Misses, RequestStats

TEXT = SimpleNamespace(stats=Stats(sums=RequestStats(tokens=5, rounds=2, hits=1, misses=Misses(late=3))))
OUTPUT = SimpleNamespace(outputs=[TEXT, TEXT])


@pytest.mark.parametrize("show", [None, False])
def test_nothing_is_shown_elsewhere_than_on_a_terminal(capfd, show):
    assert list(track([OUTPUT] * 3, total=3, show=show)) == [OUTPUT] * 3
    assert capfd.readouterr() == ("", "")


def test_what_is_shown_when_asked(capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes it for a terminal
    monkeypatch.setenv("COLUMNS", "200")
    assert list(track([OUTPUT] * 3, total=4, done=1, show=True)) == [OUTPUT] * 3
    out, err = capfd.readouterr()
    assert out == ""
    for words in ("4/4", "tokens/s", "hits 25%"):
        assert words in err
