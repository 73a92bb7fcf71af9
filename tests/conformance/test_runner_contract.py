"""One suite for every model runner: whatever way the KV went, logits are those of a plain forward over the tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssd_ray.models.contract import UNBOUND, ModelRunner
from ssd_ray.models.eagle import make_head
from ssd_ray.models.heads import parse_head
from ssd_ray.models.reach import EVERYTHING, Reach
from ssd_ray.models.reading import HeadRunner
from ssd_ray.models.recurrent import RecurrentRunner
from ssd_ray.models.runner import HFRunner
from ssd_ray.models.table import TableModel
from tests.support.heads import PlainHead, authors_config, layer_config, random_weights
from tests.support.tiny import FAMILIES, RECURRENT, WINDOW, tiny_config, tiny_model

LENGTH, SCRATCH, ROWS, VOCAB = 128, 64, 3, 96
TOLERANCE = 1e-5  # of the largest logit
HEAD = 5e-5  # the same where every state is made of the one before
SCANNED = 2e-4  # the same where sums run over all that a state has read


PAGES = 17
"""Pages of a pool that is smaller than its rows: 3 rows of 12 pages of 16 slots."""


@dataclass
class Subject:
    """A fresh runner, and the logits that it should give after every token of a sequence: [n] -> [n, V]."""

    runner: ModelRunner
    reference: Callable[[Sequence[int]], Tensor]
    positioned: bool = True
    tolerance: float = TOLERANCE

    def check(self, logits: Tensor, tokens: Sequence[int], last: int = 1) -> None:
        """``logits`` [last, V] are those after the last tokens of ``tokens``."""
        assert logits.dtype == torch.float32
        want = self.reference(tokens)[-last:].log_softmax(-1)
        error = (logits.cpu().log_softmax(-1) - want).abs().max() / want.abs().max()
        assert error < self.tolerance


TABLES: dict[str, dict[str, object]] = {
    "table": {},
    "table of order 2": {"order": 2},
    "table with a window": {"reaches": [Reach(WINDOW)]},
    "table with chunks and all": {"reaches": [Reach(WINDOW, chunked=True), EVERYTHING]},
}


def table_subject(name: str, **options: int) -> Subject:
    size = {"rows": ROWS, "max_length": LENGTH, "scratch": SCRATCH}
    runner = TableModel(VOCAB, **size, **TABLES[name], **options)  # type: ignore[arg-type]

    def reference(tokens: Sequence[int]) -> Tensor:
        return torch.tensor(np.log([runner.distribution(tokens[: end + 1]) for end in range(len(tokens))]))

    return Subject(runner, reference, positioned=runner.order != 2)


def head_subject() -> Callable[..., Subject]:
    """A head that goes on from its own states, whose target is silent."""
    layer = layer_config(tiny_config("llama", vocab=VOCAB, context=LENGTH))
    weights = random_weights(layer, VOCAB)
    head = parse_head(authors_config(layer, VOCAB))
    assert head is not None
    exact = {name: weight.double() for name, weight in weights.items()}

    def build(**options: int) -> Subject:
        model = make_head(head, weights, {}, torch.float32)
        runner = HeadRunner(model, rows=ROWS, max_length=LENGTH, scratch=SCRATCH, **options)
        return Subject(runner, lambda tokens: PlainHead(exact).text(tokens), tolerance=HEAD)

    return build


UNLIKE = {"llama", "gpt2", "gemma4_text", "gpt_oss", "deepseek_v3", "falcon_h1"}
"""Families that need something of a runner that no other one of them needs."""

OF_TWO_FORMS = {"zamba2": 2e-2, "nemotron_h": 5e-3}
"""By how much transformers' own forms differ, one token after the other and many at once."""

UNPOSITIONED = {"mamba", "mamba2", "jamba", "nemotron_h", "granitemoehybrid", "zamba2"}
"""Families that know the order of tokens, not their positions."""

SUBJECTS = [*TABLES, *FAMILIES, *RECURRENT]
ON_CUDA = [f"{family} on cuda" for family in FAMILIES]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("head", marks=pytest.mark.slow),
        *(
            name if name in UNLIKE or name.startswith("table") else pytest.param(name, marks=pytest.mark.slow)
            for name in SUBJECTS
        ),
        *(pytest.param(name, marks=pytest.mark.gpu) for name in ON_CUDA),
    ],
)
def make(request: pytest.FixtureRequest) -> Callable[..., Subject]:
    if request.param.startswith("table"):
        return lambda **options: table_subject(request.param, **options)
    if request.param == "head":
        return head_subject()
    family, _, device = request.param.partition(" on ")
    model = tiny_model(family, vocab=VOCAB, context=LENGTH)
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")

    def reference(tokens: Sequence[int]) -> Tensor:
        with torch.inference_mode():
            return plain(torch.tensor([tokens])).logits[0].double()

    def build(**options: int) -> Subject:
        there = copy.deepcopy(model).to(device) if device else model
        runner = RecurrentRunner if family in RECURRENT else HFRunner
        built = runner(there, rows=ROWS, max_length=LENGTH, scratch=SCRATCH, **options)
        tolerance = OF_TWO_FORMS.get(family, SCANNED if family in RECURRENT else TOLERANCE)
        return Subject(built, reference, positioned=family not in UNPOSITIONED, tolerance=tolerance)

    return build


@pytest.fixture(scope="module")
def subject(make: Callable[..., Subject]) -> Subject:
    """One for all tests: what others left in its slots changes nothing."""
    return make()


@pytest.fixture(scope="module")
def of_few_pages(make: Callable[..., Subject]) -> Subject:
    return make(page_slots=16, pages=PAGES)


@pytest.fixture
def paged(of_few_pages: Subject) -> Subject:
    """One whose rows have no pages yet, though there is something in them."""
    runner = of_few_pages.runner
    for row in range(ROWS):
        runner.bind(row, 0, [UNBOUND] * (runner.slots // runner.page_slots))
    return of_few_pages


def text(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def grow(
    runner: ModelRunner, row: int, trunk: int, tokens: list[int], parents: list[int], slots: list[int], news: slice
) -> Tensor:
    """Extend with the nodes ``news`` of a tree whose node i follows ``parents[i]`` (-1: the trunk); logits [n, V]."""
    extent = runner.extent(max(trunk, *slots) + 1)
    visible = torch.zeros(len(tokens), extent, dtype=torch.bool)
    depth = []
    for node, parent in enumerate(parents):
        visible[node] = visible[parent] if parent >= 0 else torch.arange(extent) < trunk
        visible[node, slots[node]] = True
        depth.append(depth[parent] + 1 if parent >= 0 else 0)
    positions = torch.tensor(depth) + trunk
    at = torch.tensor(slots)
    args = (torch.tensor(tokens)[news][None], positions[news][None], at[news][None], visible[news][None])
    return runner.extend([row], *args)[0]


def path(tokens: list[int], parents: list[int], node: int) -> list[int]:
    before = path(tokens, parents, parents[node]) if parents[node] >= 0 else []
    return [*before, tokens[node]]


TREE = [-1, -1, 0, 0, 1, 2, 4, 4, 5]  # parents; levels end after nodes 2, 5, 8 and 9
LEVELS = (slice(0, 2), slice(2, 5), slice(5, 8), slice(8, 9))
TREE_SLOTS = [LENGTH + offset for offset in (3, 9, 4, 30, 31, 12, 50, 7, 63)]


def test_append_after_prefill(subject: Subject) -> None:
    tokens = text(70)
    subject.runner.prefill(1, tokens[:60])
    subject.check(subject.runner.append([1], [tokens[60:]], [60])[0], tokens, last=10)


def test_prefill_goes_on_where_it_stopped(subject: Subject) -> None:
    tokens = text(50)
    subject.runner.prefill(0, tokens[:7])
    subject.runner.prefill(0, tokens[7:40], start=7)
    subject.check(subject.runner.append([0], [tokens[40:]], [40])[0], tokens, last=10)


def test_one_token_at_a_time(subject: Subject) -> None:
    tokens = text(12)
    logits = [subject.runner.append([2], [[token]], [at])[0][0] for at, token in enumerate(tokens)]
    subject.check(torch.stack(logits), tokens, last=12)


def test_branches_see_the_trunk_and_their_own_ancestors(subject: Subject) -> None:
    trunk, nodes = text(40), text(len(TREE), seed=1)
    subject.runner.prefill(0, trunk)
    for news in LEVELS:
        logits = grow(subject.runner, 0, 40, nodes, TREE, TREE_SLOTS, news)
        for node in range(news.start, news.stop):
            subject.check(logits[node - news.start][None], trunk + path(nodes, TREE, node))


def test_a_whole_tree_in_one_forward(subject: Subject) -> None:
    trunk, nodes = text(40), text(len(TREE), seed=1)
    subject.runner.prefill(0, trunk)
    logits = grow(subject.runner, 0, 40, nodes, TREE, TREE_SLOTS, slice(0, len(TREE)))
    for node in range(len(TREE)):
        subject.check(logits[node][None], trunk + path(nodes, TREE, node))


def test_a_moved_branch_is_the_trunk(subject: Subject) -> None:
    trunk, nodes = text(40), text(len(TREE), seed=1)
    subject.runner.prefill(0, trunk)
    grow(subject.runner, 0, 40, nodes, TREE, TREE_SLOTS, slice(0, len(TREE)))
    winner = [0, 2, 5, 8]
    subject.runner.move(0, [TREE_SLOTS[node] for node in winner], list(range(40, 44)))
    tokens = trunk + [nodes[node] for node in winner] + text(8, seed=2)
    subject.check(subject.runner.append([0], [tokens[44:]], [44])[0], tokens, last=8)


def test_an_overlapping_move_reads_before_it_writes(subject: Subject) -> None:
    trunk = text(20)
    subject.runner.prefill(0, trunk)
    at = [LENGTH, LENGTH + 1, LENGTH + 2]
    nodes = text(3, seed=1)
    grow(subject.runner, 0, 20, nodes, [-1, 0, 1], at, slice(0, 3))
    subject.runner.move(0, at, [at[1], at[2], at[2] + 1])
    logits = grow(subject.runner, 0, 20, [*nodes, 5], [-1, 0, 1, 2], [at[1], at[2], at[2] + 1, at[0]], slice(3, 4))
    subject.check(logits, [*trunk, *nodes, 5])


def test_moving_nothing_is_allowed(subject: Subject) -> None:
    subject.runner.move(0, [], [])


def test_a_move_stays_in_its_row(subject: Subject) -> None:
    tokens = text(20)
    for row in range(ROWS):
        subject.runner.prefill(row, tokens)
    subject.runner.move(1, [0, 1, 2], [10, 11, 12])
    for row in (0, 2):
        subject.check(subject.runner.append([row], [[7]], [20])[0], [*tokens, 7])


def test_rollback_is_writing_again(subject: Subject) -> None:
    tokens, others = text(40), text(20, seed=1)
    subject.runner.prefill(0, tokens)
    for start in (30, 12):
        logits = subject.runner.append([0], [others[:9]], [start])
        subject.check(logits[0], tokens[:start] + others[:9], last=9)


@pytest.mark.parametrize("rows", [[0, 1, 2], [1, 2], [2, 0]])
def test_rows_of_different_lengths_in_one_call(subject: Subject, rows: list[int]) -> None:
    starts = {0: 11, 1: 70, 2: 64}
    texts = {row: text(start + 6, seed=row) for row, start in starts.items()}
    for row, tokens in texts.items():
        subject.runner.prefill(row, tokens[:-6])
    logits = subject.runner.append(rows, [texts[row][-6:] for row in rows], [starts[row] for row in rows])
    for of_row, row in zip(logits, rows, strict=True):
        subject.check(of_row, texts[row], last=6)
        # It was written to this row and to no other one.
        subject.check(subject.runner.append([row], [[3]], [starts[row] + 6])[0], [*texts[row], 3])


def test_equal_starts_in_several_rows(subject: Subject) -> None:
    texts = [text(30, seed=row) for row in range(ROWS)]
    for row, tokens in enumerate(texts):
        subject.runner.prefill(row, tokens[:25])
    logits = subject.runner.append(range(ROWS), [tokens[25:] for tokens in texts], [25] * ROWS)
    for of_row, tokens in zip(logits, texts, strict=True):
        subject.check(of_row, tokens, last=5)


@pytest.mark.parametrize("counts", [[1, 9, 4], [6, 1, 1], [2, 16, 3]])
def test_every_row_has_as_many_tokens_as_it_likes(subject: Subject, counts: list[int]) -> None:
    starts = [11, 70, 62]
    texts = [text(start + count, seed=row) for row, (start, count) in enumerate(zip(starts, counts, strict=True))]
    for row, start in enumerate(starts):
        subject.runner.prefill(row, texts[row][:start])
    rows = [2, 0, 1]
    logits = subject.runner.append(rows, [texts[row][starts[row] :] for row in rows], [starts[row] for row in rows])
    for of_row, row in zip(logits, rows, strict=True):
        assert of_row.shape == (counts[row], VOCAB)
        subject.check(of_row, texts[row], last=counts[row])
        subject.check(subject.runner.append([row], [[3]], [starts[row] + counts[row]])[0], [*texts[row], 3])


def test_padding_is_overwritten(subject: Subject) -> None:
    tokens = text(40)
    subject.runner.prefill(0, tokens[:30])
    for end in (33, 34, 40):
        start = {33: 30, 34: 33, 40: 34}[end]
        padded = tokens[start:end] + [0] * (8 - (end - start))
        logits = subject.runner.append([0], [padded], [start])[0]
        subject.check(logits[: end - start], tokens[:end], last=end - start)


def test_a_token_that_sees_nothing_harms_nobody(subject: Subject) -> None:
    trunk = text(20)
    subject.runner.prefill(0, trunk)
    extent = subject.runner.extent(LENGTH + 2)
    visible = torch.zeros(1, 2, extent, dtype=torch.bool)
    visible[0, 0, :20] = visible[0, 0, LENGTH] = True
    slots = torch.tensor([[LENGTH, LENGTH + 1]])
    logits = subject.runner.extend([0], torch.tensor([[4, 0]]), torch.tensor([[20, 0]]), slots, visible)
    subject.check(logits[0, :1], [*trunk, 4])
    logits = grow(subject.runner, 0, 20, [4, 5], [-1, 0], [LENGTH, LENGTH + 2], slice(1, 2))
    subject.check(logits, [*trunk, 4, 5])


@pytest.mark.parametrize("length", [15, 16, 17, 64, LENGTH])
def test_bucket_borders(subject: Subject, length: int) -> None:
    tokens = text(length)
    subject.runner.prefill(0, tokens[:-2])
    subject.check(subject.runner.append([0], [tokens[-2:]], [length - 2])[0], tokens, last=2)


def test_the_last_slot_can_be_used(subject: Subject) -> None:
    trunk = text(5)
    subject.runner.prefill(1, trunk)
    last = subject.runner.slots - 1
    logits = grow(subject.runner, 1, 5, [8, 9], [-1, 0], [last, last - 1], slice(0, 2))
    subject.check(logits[1][None], [*trunk, 8, 9])


def test_extent_rounds_up_to_at_most_all_slots(subject: Subject) -> None:
    runner = subject.runner
    extents = [runner.extent(needed) for needed in range(1, runner.slots + 1)]
    assert all(needed <= extent <= runner.slots for needed, extent in enumerate(extents, 1))
    assert extents == sorted(extents)
    assert len(set(extents)) < runner.slots / 8


def test_prefill_writes_its_own_slots_only(make: Callable[..., Subject]) -> None:
    subject = make()  # its slots are empty
    trunk, nodes = text(20), text(3, seed=1)
    subject.runner.prefill(0, trunk)
    at = [30, 21, 25]
    grow(subject.runner, 0, 20, nodes, [-1, 0, 1], at, slice(0, 3))
    subject.runner.prefill(0, trunk)
    logits = grow(subject.runner, 0, 20, [*nodes, 6], [-1, 0, 1, 2], [*at, 40], slice(3, 4))
    subject.check(logits, [*trunk, *nodes, 6])


def test_prefill_reaches_the_last_slot(subject: Subject) -> None:
    runner = subject.runner
    runner.prefill(0, text(20))
    runner.prefill(0, text(3), start=runner.slots - 3)
    subject.check(runner.append([0], [[1]], [20])[0], [*text(20), 1])


def test_slots_beyond_the_row_are_refused(subject: Subject) -> None:
    slots = subject.runner.slots
    with pytest.raises(ValueError, match="slots"):
        subject.runner.append([0], [[1, 2]], [slots - 1])
    with pytest.raises(ValueError, match="slots"):
        subject.runner.prefill(0, [1, 2], start=slots - 1)


def shuffled(subject: Subject, seed: int = 0) -> tuple[Subject, list[list[int]]]:
    """A subject whose rows have 5 pages each, scattered over the pool, and those pages."""
    pages = np.random.default_rng(seed).permutation(PAGES).tolist()
    of_rows = [pages[5 * row : 5 * row + 5] for row in range(ROWS)]
    for row, of_row in enumerate(of_rows):
        subject.runner.bind(row, 0, of_row)
    return subject, of_rows


class Deal:
    """Deals the pages of a runner's pools to row 0: those behind windows come back, and are taken again first."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner, self.last = runner, 0
        self.free = [np.random.default_rng(0).permutation(pool.pages).tolist() for pool in runner.pools]
        self.bound: list[dict[int, int]] = [{} for _ in runner.pools]
        self.most = [0 for _ in runner.pools]

    def cover(self, start: int, places: Sequence[int]) -> None:
        """Bind what tokens from ``start`` on see, and these places."""
        for index, pool in enumerate(self.runner.pools):
            of_pool, free = self.bound[index], self.free[index]
            for place in [place for place in of_pool if place < pool.reach.start(start) // 16]:
                self.runner.bind(0, place, [UNBOUND], index)
                free.append(of_pool.pop(place))
            for place in places:
                if place not in of_pool:
                    of_pool[place] = free.pop()
                    self.runner.bind(0, place, [of_pool[place]], index)
            self.most[index] = max(self.most[index], len(of_pool))


def test_pages_that_nobody_sees_any_more_can_be_given_back(paged: Subject) -> None:
    subject, runner, tokens, deal = paged, paged.runner, text(110), Deal(paged.runner)
    for start, end, prefills in ((0, 30, True), (30, 47, True), (47, 48, False), (48, 60, False), (60, 100, True)):
        deal.cover(start, range(start // 16, (end - 1) // 16 + 1))
        if prefills:
            runner.prefill(0, tokens[start:end], start)
        else:
            subject.check(runner.append([0], [tokens[start:end]], [start])[0], tokens[:end], last=end - start)
    deal.cover(100, [6, *range(LENGTH // 16, LENGTH // 16 + 4)])
    nodes = text(len(TREE), seed=1)
    logits = grow(runner, 0, 100, nodes, TREE, TREE_SLOTS, slice(0, len(TREE)))
    for node in range(len(TREE)):
        subject.check(logits[node][None], tokens[:100] + path(nodes, TREE, node))
    winner = [0, 2, 5, 8]
    runner.move(0, [TREE_SLOTS[node] for node in winner], list(range(100, 104)))
    deal.cover(104, [6, 7])
    whole = tokens[:100] + [nodes[node] for node in winner] + tokens[104:]
    subject.check(runner.append([0], [whole[104:]], [104])[0], whole, last=6)
    for pool, most in zip(runner.pools, deal.most, strict=True):
        assert most <= 7 if pool.reach.size else most == 12
        if pool.reach.size:  # what is seen has to be there
            runner.bind(0, pool.reach.start(110) // 16, [UNBOUND], runner.pools.index(pool))
            with pytest.raises(ValueError, match="not bound"):
                runner.append([0], [[1]], [110])


def test_the_pool_is_described(subject: Subject, paged: Subject) -> None:
    whole, small = subject.runner, paged.runner
    assert whole.slots % whole.page_slots == 0
    assert whole.num_pages == ROWS * whole.slots // whole.page_slots
    assert (small.page_slots, small.num_pages, small.slots) == (16, PAGES, LENGTH + SCRATCH)
    assert whole.page_bytes * small.page_slots == small.page_bytes * whole.page_slots > 0


def test_pages_may_lie_anywhere(paged: Subject) -> None:
    subject, _ = shuffled(paged)
    tokens = text(70)
    subject.runner.prefill(1, tokens[:45])
    subject.check(subject.runner.append([1], [tokens[45:61]], [45])[0], tokens[:61], last=16)
    subject.check(subject.runner.append([1], [tokens[61:]], [61])[0], tokens, last=9)


@pytest.mark.parametrize("rows", [[0, 1, 2], [1, 2], [2, 0]])
def test_scattered_rows_of_different_lengths_in_one_call(paged: Subject, rows: list[int]) -> None:
    subject, _ = shuffled(paged)
    starts = {0: 11, 1: 70, 2: 42}
    texts = {row: text(start + 6, seed=row) for row, start in starts.items()}
    for row, tokens in texts.items():
        subject.runner.prefill(row, tokens[:-6])
    logits = subject.runner.append(rows, [texts[row][-6:] for row in rows], [starts[row] for row in rows])
    for of_row, row in zip(logits, rows, strict=True):
        subject.check(of_row, texts[row], last=6)
        subject.check(subject.runner.append([row], [[3]], [starts[row] + 6])[0], [*texts[row], 3])


def test_a_shared_beginning(paged: Subject) -> None:
    """Two rows read one row's first two pages, and go on differently on pages of their own."""
    subject, pages = shuffled(paged)
    prefix = text(32)
    subject.runner.prefill(0, [*prefix, *text(20, seed=1)])
    rests = {row: text(20, seed=row) for row in range(ROWS)}
    for row in (1, 2):
        subject.runner.bind(row, 0, pages[0][:2])
        subject.runner.prefill(row, rests[row][:9], start=32)
    rows = [1, 2]
    logits = subject.runner.append(rows, [rests[row][9:] for row in rows], [41, 41])
    for of_row, row in zip(logits, rows, strict=True):
        subject.check(of_row, prefix + rests[row], last=11)
    subject.check(subject.runner.append([0], [[5]], [52])[0], [*prefix, *text(20, seed=1), 5])


def test_pages_can_change_their_owner(paged: Subject) -> None:
    subject, pages = shuffled(paged)
    tokens = text(60)
    subject.runner.prefill(0, tokens[:50])
    subject.runner.bind(2, 0, pages[0])
    subject.runner.bind(0, 0, pages[2])
    subject.check(subject.runner.append([2], [tokens[50:]], [50])[0], tokens, last=10)
    others = text(40, seed=1)
    subject.runner.prefill(0, others)
    subject.check(subject.runner.append([0], [[1]], [40])[0], [*others, 1])
    subject.check(subject.runner.append([2], [[2]], [60])[0], [*tokens, 2])


def test_a_row_can_be_bound_piece_by_piece(paged: Subject) -> None:
    """Also where nothing is bound in between, as before a window of scratch slots."""
    subject = paged
    trunk, nodes = text(30), text(len(TREE), seed=1)
    subject.runner.bind(0, 0, [7])
    subject.runner.bind(0, 1, [3])
    subject.runner.bind(0, LENGTH // 16, [16, 2, 11, 9])
    subject.runner.prefill(0, trunk)
    logits = grow(subject.runner, 0, 30, nodes, TREE, TREE_SLOTS, slice(0, len(TREE)))
    for node in range(len(TREE)):
        subject.check(logits[node][None], trunk + path(nodes, TREE, node))
    winner = [0, 2, 5, 8]
    subject.runner.bind(0, 2, [5])
    subject.runner.move(0, [TREE_SLOTS[node] for node in winner], list(range(30, 34)))
    tokens = trunk + [nodes[node] for node in winner] + text(8, seed=2)
    subject.check(subject.runner.append([0], [tokens[34:]], [34])[0], tokens, last=8)


def test_trees_of_several_rows_in_one_forward(paged: Subject) -> None:
    subject, _ = shuffled(paged)
    trunks = {0: text(9), 2: text(50, seed=2)}
    for row, trunk in trunks.items():
        subject.runner.prefill(row, trunk)
    extent = subject.runner.extent(80)  # more than any of them needs
    visible = torch.zeros(2, 2, extent, dtype=torch.bool)
    slots = torch.tensor([[14, 12], [59, 55]])
    for place, trunk in enumerate(trunks.values()):
        visible[place, :, : len(trunk)] = visible[place, :, slots[place, 0]] = True
        visible[place, 1, slots[place, 1]] = True
    positions = torch.tensor([[len(trunk), len(trunk) + 1] for trunk in trunks.values()])
    logits = subject.runner.extend(list(trunks), torch.tensor([[1, 2], [3, 4]]), positions, slots, visible)
    subject.check(logits[0], [*trunks[0], 1, 2], last=2)
    subject.check(logits[1], [*trunks[2], 3, 4], last=2)


def test_what_is_not_bound_is_not_written(paged: Subject) -> None:
    runner = paged.runner
    runner.bind(1, 0, [4, 5, 6])
    runner.bind(1, 1, [UNBOUND])
    operations = (
        lambda: runner.append([1], [[1, 2]], [15]),
        lambda: runner.append([1], [[1, 2]], [33]),
        lambda: runner.prefill(1, text(17)),
        lambda: runner.move(1, [3], [16]),
        lambda: runner.move(1, [16], [3]),
        lambda: grow(runner, 1, 3, [1], [-1], [20], slice(0, 1)),
        lambda: runner.append([0], [[1]], [0]),
    )
    for operation in operations:
        with pytest.raises(ValueError, match="not bound"):
            operation()
    runner.append([1], [[1] * 16], [0])


@pytest.mark.parametrize(("first", "pages"), [(0, [PAGES]), (0, [-2]), (12, [0]), (11, [0, 1]), (-1, [0])])
def test_pages_that_are_not_there_are_refused(paged: Subject, first: int, pages: list[int]) -> None:
    with pytest.raises(ValueError, match="pages"):
        paged.runner.bind(0, first, pages)


def test_the_suite_can_fail(subject: Subject) -> None:
    """A hidden token, a wrong position and a stale slot change the logits by far more than the tolerance."""
    tokens = text(12)
    subject.runner.prefill(0, tokens[:-1])
    at = torch.tensor([[11]])
    visible = torch.arange(subject.runner.extent(12))[None, None] < 12
    last = torch.tensor([tokens[-1:]])
    subject.check(subject.runner.extend([0], last, at, at, visible)[0], tokens)
    hidden = visible.clone()
    hidden[..., 10] = False
    with pytest.raises(AssertionError):
        subject.check(subject.runner.extend([0], last, at, at, hidden)[0], tokens)
    if subject.positioned:
        with pytest.raises(AssertionError):
            subject.check(subject.runner.extend([0], last, at + 9, at, visible)[0], tokens)
    subject.runner.move(0, [3], [10])
    with pytest.raises(AssertionError):
        subject.check(subject.runner.extend([0], last, at, at, visible)[0], tokens)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_prefill_chunks_do_not_change_the_model(architecture: str) -> None:
    model = tiny_model(architecture, vocab=VOCAB, context=LENGTH)
    tokens = text(60)
    logits = []
    for chunk in (8, 16, 64):
        runner = HFRunner(model, rows=1, max_length=LENGTH, scratch=SCRATCH, prefill_chunk=chunk, page_slots=32)
        runner.prefill(0, tokens)
        logits.append(runner.append([0], [[1]], [60]))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[2], logits[0], rtol=1e-5, atol=1e-5)


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], list[int]]:
    """A trunk, and a tree's tokens, parents and slots (distinct, in any order, after the trunk)."""
    trunk = draw(st.lists(st.integers(0, 7), min_size=1, max_size=20))
    count = draw(st.integers(1, 14))
    parents = [draw(st.integers(-1, node - 1)) for node in range(count)]
    tokens = draw(st.lists(st.integers(0, 7), min_size=count, max_size=count))
    slots = draw(st.lists(st.integers(len(trunk) + count, 63), min_size=count, max_size=count, unique=True))
    return trunk, tokens, parents, slots


@settings(max_examples=60, deadline=None)
@given(tree=trees(), winner=st.integers(0, 13), split=st.integers(1, 14), order=st.sampled_from([None, 2]))
def test_random_trees(
    tree: tuple[list[int], list[int], list[int], list[int]], winner: int, split: int, order: int | None
) -> None:
    trunk, tokens, parents, slots = tree
    model = TableModel(8, order=order, max_length=48, scratch=16)
    model.prefill(0, trunk)
    split = min(split, len(tokens))
    parts = [slice(0, split), slice(split, len(tokens))] if split < len(tokens) else [slice(0, split)]
    logits = torch.cat([grow(model, 0, len(trunk), tokens, parents, slots, part) for part in parts])
    for node in range(len(tokens)):
        want = model.distribution(trunk + path(tokens, parents, node))
        np.testing.assert_allclose(logits[node].double().softmax(-1).numpy(), want, atol=1e-12)
    branch, node = [], winner % len(tokens)
    while node >= 0:
        branch.insert(0, node)
        node = parents[node]
    moved = list(range(len(trunk), len(trunk) + len(branch)))
    model.move(0, [slots[node] for node in branch], moved)
    whole = trunk + [tokens[node] for node in branch] + [3]
    after = model.append([0], [[3]], [len(whole) - 1])[0][0]
    np.testing.assert_allclose(after.double().softmax(-1).numpy(), model.distribution(whole), atol=1e-12)
