"""The queue between threads."""

from threading import Thread, Timer
from time import monotonic

from hypothesis import given
from hypothesis import strategies as st

from ssd_ray.cluster.refs import RefChannel
from ssd_ray.transport.channel import MAX_FRAME_BYTES
from ssd_ray.transport.hybrid import HybridChannel
from ssd_ray.transport.inbox import Inbox
from ssd_ray.transport.memory import MemoryHub


@given(st.lists(st.one_of(st.sampled_from("abc"), st.none()), max_size=60), st.integers(1, 4))
def test_it_is_a_queue_in_which_every_sender_has_its_own_bound(events, limit):
    inbox, expected = Inbox(limit), []
    for number, sender in enumerate(events):
        if sender is None:
            assert inbox.get() == (expected.pop(0) if expected else None)
            continue
        frame = bytes([number])
        fits = sum(name == sender for name, _ in expected) < limit
        assert inbox.put(sender, frame) == fits
        if fits:
            expected.append((sender, frame))
    assert inbox.get_all() == expected


def test_get_waits_and_gives_up():
    start = monotonic()
    assert Inbox().get(0.05) is None
    assert 0.04 < monotonic() - start < 15.0


def test_a_frame_and_a_close_end_the_wait():
    for act in (lambda inbox: inbox.put("peer", b"frame"), Inbox.close):
        inbox = Inbox()
        timer = Timer(0.02, act, (inbox,))
        timer.start()
        start = monotonic()
        inbox.get(30.0)
        assert monotonic() - start < 15.0
        timer.join()


def test_a_closed_inbox_is_empty_and_stays_so():
    inbox = Inbox()
    inbox.put("peer", b"frame")
    inbox.close()
    assert not inbox.put("peer", b"frame")
    assert inbox.get() is None


def test_threads_lose_and_double_nothing():
    inbox = Inbox(limit=1000)

    def fill(name):
        for number in range(500):
            inbox.put(name, number.to_bytes(2, "big"))

    threads = [Thread(target=fill, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    items = [inbox.get(5.0) for _ in range(2000)]
    for thread in threads:
        thread.join()
    assert inbox.get() is None
    for name in "abcd":
        assert [frame for sender, frame in items if sender == name] == [n.to_bytes(2, "big") for n in range(500)]


def test_an_overlong_frame_in_a_call_is_counted_and_dropped():
    refs = RefChannel("draft-0", Inbox())
    with HybridChannel(MemoryHub(), refs, 1 << 16) as channel:
        refs.deliver("target", bytes(MAX_FRAME_BYTES + 1))
        refs.deliver("target", b"next")
        assert channel.receive() == ("target", b"next")
        assert channel.receive() is None
        assert channel.refused == 1
