"""The slot-addressed KV cache against a dictionary."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_ray.models import slots as slots_module
from ssd_ray.models.slots import LayerShape, SlotCache, group, strided

ROWS, SLOTS, PAGE = 4, 12, 4
PAGES = [[5, 9, 0], [1, 2, 3], [11, 4, 10], [6, 7, 8]]
SHAPES = [LayerShape(2, 4, 4), LayerShape(1, 6, 3), LayerShape(2, 4, 5)]


def make() -> SlotCache:
    size = {"rows": ROWS, "slots": SLOTS, "page_slots": PAGE, "pages": ROWS * SLOTS // PAGE}
    cache = SlotCache(SHAPES, **size, dtype=torch.float32, device=torch.device("cpu"))
    for row, pages in enumerate(PAGES):
        cache.table.bind(row, 0, pages)
    return cache


def states(layer: int, count: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as a model hands them over: heads and tokens transposed in memory."""
    shape = SHAPES[layer]
    random = torch.Generator().manual_seed(seed * 10 + layer)
    keys = torch.randn(count, tokens, shape.heads, shape.key_dim, generator=random)
    return keys.transpose(1, 2), torch.randn(count, tokens, shape.heads, shape.value_dim, generator=random).transpose(
        1, 2
    )


@st.composite
def writes(draw: st.DrawFn) -> tuple[list[int], list[list[int]], int, int]:
    """Rows, slots (one list for all rows, or one each), extent and the number of padding tokens."""
    rows = draw(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=ROWS, unique=True))
    tokens = draw(st.integers(1, 5))
    some = st.lists(st.integers(0, SLOTS - 1), min_size=tokens, max_size=tokens, unique=True)
    lists = draw(st.one_of(st.tuples(some).map(list), st.lists(some, min_size=len(rows), max_size=len(rows))))
    return rows, lists, draw(st.integers(1, SLOTS)), draw(st.integers(0, 2))


moves = st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=6, unique=True)


@settings(max_examples=80)
@given(
    steps=st.lists(
        st.one_of(writes(), st.tuples(st.integers(0, ROWS - 1), moves, moves)),
        min_size=1,
        max_size=8,
    )
)
def test_any_sequence_of_writes_and_moves(steps: list[tuple]) -> None:
    cache = make()
    naive = [
        (torch.zeros(ROWS, s.heads, SLOTS, s.key_dim), torch.zeros(ROWS, s.heads, SLOTS, s.value_dim)) for s in SHAPES
    ]
    for seed, step in enumerate(steps):
        if len(step) == 3:
            row, source, destination = step
            count = min(len(source), len(destination))
            cache.move(row, source[:count], destination[:count])
            for tensors in naive:
                for tensor in tensors:
                    tensor[row, :, destination[:count]] = tensor[row, :, source[:count]].clone()
            continue
        rows, lists, extent, padding = step
        places = zip(rows, lists if len(lists) > 1 else lists * len(rows), strict=True)
        written = torch.tensor([cache.table.locate(row, slots) for row, slots in places])
        cache.aim(rows, [range(extent)], [written])
        for layer in range(len(SHAPES)):
            keys, values = states(layer, len(rows), len(lists[0]) + padding, seed)
            for place, row in enumerate(rows):
                into = lists[place if len(lists) > 1 else 0]
                naive[layer][0][row, :, into] = keys[place, :, : len(into)]
                naive[layer][1][row, :, into] = values[place, :, : len(into)]
            read = cache.update(keys, values, layer)
            for got, whole in zip(read, naive[layer], strict=True):
                assert torch.equal(got, whole[rows][:, :, :extent])
    for layer, tensors in zip(cache.layers, naive, strict=True):
        for pool, whole in zip((layer.keys, layer.values), tensors, strict=True):
            pages = pool[0].unflatten(1, (-1, PAGE))  # [heads, pages, slots, dim]
            assert torch.equal(pages[:, torch.tensor(PAGES)].flatten(2, 3).transpose(0, 1), whole)
            assert not pages[:, cache.table.spare].any()


def test_layers_of_one_shape_share_a_bank() -> None:
    assert sorted(bank.shape[0] for bank in make().banks) == [1, 1, 1, 3]
    like = SlotCache([SHAPES[0]] * 5, rows=2, slots=8, page_slots=4, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert [tuple(bank.shape) for bank in like.banks] == [(10, 2, 5 * 4, 4)]
    assert like.pools[0].described.page_bytes == 10 * 4 * 2 * 4 * 2


def test_pages_that_follow_one_another_are_read_without_a_copy() -> None:
    cache = make()
    cache.aim([1], [range(12)], [torch.tensor([[7]])])
    keys, values = cache.update(*states(0, 1, 1, 0), 0)
    assert keys.data_ptr() == cache.layers[0].keys[:, :, PAGE:].data_ptr()
    assert values.data_ptr() == cache.layers[0].values[:, :, PAGE:].data_ptr()


def test_kept_views_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module, "MAX_VIEWS", 3)
    cache = make()
    for extent in (4, 5, 6, 7, 8, 4):
        cache.aim([1], [range(extent)], [torch.tensor([[0]])])
        assert cache.update(*states(0, 1, 1, extent), 0)[0].shape[2] == extent
        assert len(cache.layers[0]._views) <= 3


def test_rows_at_equal_distances_are_read_together_without_a_copy() -> None:
    extents = [64, 64, 128, 64, 64, 64, 512, 512]
    firsts = [0, 640, 64, None, 320, None, None, None]
    assert group(extents, firsts) == [[0, 4, 1], [2], [3, 5], [6], [7]]  # what lies scattered is copied, if it is short
    assert group([64] * 5, [0, 64, 256, 320, 384]) == [[0, 1], [2, 3, 4]]
    assert group([64], [128]) == [[0]]


def test_a_strided_view_is_what_would_be_gathered() -> None:
    bank = torch.randn(3, 2, 40, 4)
    for pool in bank[:, None]:
        view = strided(pool, range(4, 40, 12), 8)
        assert view.shape == (3, 2, 8, 4)
        assert all(torch.equal(view[i], pool[0, :, first : first + 8]) for i, first in enumerate((4, 16, 28)))
        assert view.untyped_storage().data_ptr() == bank.untyped_storage().data_ptr()
        assert torch.equal(strided(pool, range(7, 8), 30)[0], pool[0, :, 7:37])
