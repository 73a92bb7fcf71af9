"""What the driver keeps of the requests that are under way."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

import pytest

from ssd_ray.cluster.requests import Request, Requests
from ssd_ray.config import SamplingParams
from ssd_ray.errors import QueueFullError
from ssd_ray.stats import EngineStats
from ssd_ray.wire import Output, RequestStats

PARAMS = SamplingParams()


def add(requests: Requests, timeout: float | None = None) -> Request:
    return requests.add(requests.number(), [1, 2, 3], 3, PARAMS, lambda _: None, timeout)


def test_the_next_target_is_given_what_has_not_ended_and_what_has_been_delivered() -> None:
    requests = Requests(3)
    first, second, third = (add(requests) for _ in range(3))
    with pytest.raises(QueueFullError, match="3 requests are under way"):
        add(requests)
    requests.take(Output(second.number, [5, 6]))
    requests.take(Output(second.number, [7]))
    assert requests.take(Output(first.number, [4], "stop", RequestStats(tokens=1, rounds=1))) is first
    assert requests.take(Output(first.number, [4])) is None
    assert [(each.number, each.text) for each in requests.hand_over()] == [
        (second.number, [5, 6, 7]),
        (third.number, []),
    ]
    assert not requests.full
    assert [request.timeout for request in (second, third)] == [None, None]


def test_figures_are_those_of_all_targets() -> None:
    requests = Requests(10)
    one, other, lost = add(requests), add(requests), add(requests)
    requests.take(Output(one.number, [4], "stop", RequestStats(tokens=1, rounds=1)))
    knows = EngineStats(sums=RequestStats(tokens=3, rounds=2), requests=1, running=2, drafts=("draft-0",))
    assert requests.figures(knows) == knows
    gone = requests.figures(None)
    assert (gone.tokens, gone.requests, gone.running, gone.waiting, gone.drafts) == (1, 1, 0, 2, ())
    requests.hand_over()
    assert requests.figures(EngineStats(running=2)).sums == RequestStats(tokens=1, rounds=1)
    requests.take(Output(other.number, [], "error", RequestStats(), error="of its own"))
    requests.take(Output(lost.number, [], "cancelled"))  # no target has had it
    assert len(requests) == 0
    assert requests.figures(EngineStats(sums=RequestStats(tokens=5), requests=1)).requests == 2


@pytest.mark.parametrize(
    ("reason", "befall"),
    [
        ("cancelled", lambda requests, request: requests.cancel(request.number)),
        ("timeout", lambda _, request: setattr(request, "deadline", monotonic() - 1.0)),
    ],
)
def test_who_cannot_wait_for_the_next_target_ends_with_what_has_come(
    reason: str, befall: Callable[[Requests, Request], None]
) -> None:
    requests = Requests(10)
    request, patient = add(requests, timeout=60.0), add(requests)
    requests.take(Output(request.number, [5, 6]))
    assert requests.overdue() == []
    befall(requests, request)
    (end,) = requests.overdue()
    sums = RequestStats(tokens=2, prompt_tokens=3, resumed_tokens=2)
    assert end == Output(request.number, [], reason, sums)
    requests.take(end)
    assert requests.hand_over() == [patient]
    assert not requests.cancel(request.number)
    assert requests.give_up() == [patient]
    assert len(requests) == 0
