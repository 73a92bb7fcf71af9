"""The runner of models with recurrent layers: their state is kept at the points that a text may go back to.

Attention layers keep K and V by slot, and a mask says what a token sees. A recurrent layer keeps one state of all that
it has read, which can be neither masked nor rolled back. So the state after a token is kept beside the token's address,
where it is as good as its K and V: a tree forks it, a move takes it along, and rows that share a page share it. Not all
can be kept: what is asked for and is not there is computed again from the last one before it that is. That reads K and
V which are there and writes none.

Tokens of a row that follow one another are run together, rows with as many tokens as one batch; nodes of a tree level
by level, a batch each.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionLayer

from ssd_ray.errors import UnsupportedModelError
from ssd_ray.models.attention import choose_attention
from ssd_ray.models.calibration import Calibration
from ssd_ray.models.contract import PAGE_SLOTS, ModelRunner
from ssd_ray.models.float32 import in_float32
from ssd_ray.models.formats import weights_alone
from ssd_ray.models.graphs import cache_name
from ssd_ray.models.reach import Sight
from ssd_ray.models.rotary import fix_frequencies
from ssd_ray.models.slots import LayerShape, SlotCache, SlotLayer
from ssd_ray.models.taps import Taps

MOST_AGAIN = 8
"""Tokens of a text that are run again together with new ones; more are run before them, and their state is kept."""

STATE_BYTES = 1 << 30
"""Memory for states."""

FEWEST = 8
"""States for each row that are kept at least."""

TOLERANCE = 1e-3
"""Relative error of logits in float32 that rounding may cause; one state that is not the right one gives far more."""

ALIKE = 1e-4
"""The same between tokens run at once and one by one, so that a text does not depend on which."""

CHECKED_ROWS, BEFORE, AFTER = 8, 4, 8
"""Rows that are compared together, and tokens of each before and after the state that is gone back to: many, since what
a model does otherwise one by one it may do for some tokens alone."""


State = Sequence[Tensor]
"""What recurrent layers have after a token, [1, ..] each."""


@dataclass(frozen=True, slots=True)
class Job:
    """Tokens of one row that follow one another.

    Attributes:
        row: KV row.
        tokens: what is run: some that are there, maybe, and then new ones.
        slots: of all tokens that they see, in order, and of themselves, the last ones.
        again: how many of the tokens are there and are not written.
        state: after the token before them.
        shift: by how much their positions exceed their places in that order, as they do in no text.
    """

    row: int
    tokens: Sequence[int]
    slots: Sequence[int]
    again: int
    state: State
    shift: int = 0

    @property
    def first(self) -> int:
        """The place of the first token in the order."""
        return len(self.slots) - len(self.tokens)

    def only(self, step: int, state: State) -> Job:
        """One of its tokens, after a state."""
        end = self.first + step + 1
        return Job(self.row, self.tokens[step : step + 1], self.slots[:end], int(step < self.again), state, self.shift)


class HybridLayer(LinearAttentionLayer, SlotLayer):
    """A layer that has attention and a state."""

    def __init__(self, keys: Tensor, values: Tensor, page_slots: int, window: Any) -> None:
        SlotLayer.__init__(self, keys, values, page_slots, window)
        LinearAttentionLayer.__init__(self)


class RecurrentRunner(ModelRunner):
    """Runs one model with recurrent layers; see :class:`~ssd_ray.models.contract.ModelRunner` for the operations.

    Tokens give the same logits up to rounding, not to the last bit, in whatever company they come.

    Args:
        model, rows, max_length, scratch, prefill_chunk, page_slots, pages, vocab_size, quantize, taps: as of
            :class:`~ssd_ray.models.runner.HFRunner`.
        checked: whether the model is prepared, and its logits over states that were taken and rolled back are compared
            with those of a plain forward.
        stepwise: whether tokens that go on from a state have to be run one by one; found out if ``checked``.

    Raises:
        UnsupportedModelError: the model keeps something else in its cache, or the logits differ.
    """

    packed = False

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rows: int,
        max_length: int,
        scratch: int,
        prefill_chunk: int = 256,
        page_slots: int = PAGE_SLOTS,
        pages: int | None = None,
        vocab_size: int | None = None,
        taps: Sequence[int] = (),
        checked: bool = True,
        stepwise: bool = False,
        quantize: Callable[[PreTrainedModel], None] | None = None,
    ) -> None:
        if checked:
            prepare(model, max_length)
            stepwise = takes_steps_alone(model)
        if quantize is not None:
            quantize(model)
        self.vocab_size = vocab_size or model.get_output_embeddings().weight.shape[0]
        self.max_length, self.page_slots, self.rows = max_length, page_slots, rows
        self.slots = self.extent(max_length + scratch)
        self.dtype, self.device = model.dtype, model.device
        self.calibration: Calibration | None = None
        self._chunk = prefill_chunk
        self._model, self._call = model, _caller(model)
        kept = what_is_kept(model)
        self._begin: State = [torch.zeros_like(tensor) for tensor in states_of(kept)]
        self._kv = SlotCache(
            [shape for layer in kept if (shape := shape_kept(layer)) is not None],
            rows=rows,
            slots=self.slots,
            page_slots=page_slots,
            pages=pages,
            dtype=self.dtype,
            device=self.device,
        )
        self._cache = Cache(layers=list(self._layers(kept)))
        self._stateful = [layer for layer in self._cache.layers if isinstance(layer, LinearAttentionLayer)]
        pool = self._kv.pools[0].described
        self.pools = [replace(pool, page_bytes=pool.page_bytes or page_slots)]
        state_bytes = sum(tensor.nbytes for tensor in self._begin)
        self._most = most_states(state_bytes, rows)
        self._states: OrderedDict[int, State] = OrderedDict()  # by address; the first one is that of longest ago
        size = self._kv.table.size
        self._tokens, self._positions = [0] * size, [0] * size  # by address
        self._hidden = torch.full((), torch.finfo(self.dtype).min / 2, dtype=self.dtype, device=self.device)
        self._seen = torch.zeros((), dtype=self.dtype, device=self.device)
        self._stepwise = stepwise
        self._taps = Taps(model, taps, self._kv) if taps else None
        if self._taps is not None:
            self.shows, self.pools = self._taps.numbers, self._taps.counted(self.pools)

    def _layers(self, kept: Sequence[Any]) -> Iterator[Any]:
        """The layers of our cache: where a model's have K and V, those are slots."""
        slots = iter(self._kv.layers)
        for layer in kept:
            if not isinstance(layer, LinearAttentionLayer):
                yield next(slots) if isinstance(layer, DynamicLayer) else layer
            elif isinstance(layer, DynamicLayer):
                there = next(slots)
                yield _like(HybridLayer(there.keys, there.values, self.page_slots, self._kv.window), layer)
            else:
                yield _like(LinearAttentionLayer(), layer)

    def adopt(self, calibration: Calibration) -> None:
        """Say what was measured."""
        self.calibration, self.measured = calibration, calibration.measured

    def extent(self, needed: int) -> int:
        return -(-needed // self.page_slots) * self.page_slots

    def bind(self, row: int, first: int, pages: Sequence[int], pool: int | None = None) -> None:
        self._kv.bind(row, first, pages, pool)

    @torch.inference_mode()
    def append(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
        for row, some, start in zip(rows, tokens, starts, strict=True):
            self._kv.table.locate_trunk(row, start, start + len(some))
        jobs = [
            self._job(row, some, range(start + len(some)))
            for row, some, start in zip(rows, tokens, starts, strict=True)
        ]
        return self._run(jobs)

    @torch.inference_mode()
    def prefill(self, row: int, tokens: Sequence[int], start: int = 0) -> None:
        end = start + len(tokens)
        self._kv.table.locate_trunk(row, start, end)
        whole = max(start, end // self.page_slots * self.page_slots)  # whole pages may be shared
        borders = range((start // self._chunk + 1) * self._chunk, end, self._chunk)
        for first, last in pairwise(sorted({start, whole, *borders, end}) if tokens else []):
            self._run([self._job(row, tokens[first - start : last - start], range(last))])

    @torch.inference_mode()
    def extend(self, rows: Sequence[int], tokens: Tensor, positions: Tensor, slots: Tensor, visible: Tensor) -> Tensor:
        fields = tokens.tolist(), positions.tolist(), slots.tolist(), visible.cpu()
        nodes = [
            _Node(row, token, position, slot, [at for at in seen.nonzero().flatten().tolist() if at != slot])
            for row, *of_row in zip(rows, *fields, strict=True)
            for token, position, slot, seen in zip(*of_row, strict=True)
        ]
        for node in nodes:
            (address,) = self._kv.table.locate(node.row, [node.slot])
            self._positions[address] = node.position
        logits: dict[int, Tensor] = {}
        for level in _levels(nodes):
            jobs = [self._node_job(nodes[i]) for i in level]
            logits |= {i: each[0] for i, each in zip(level, self._run(jobs), strict=True)}
        return torch.stack([logits[i] for i in range(len(nodes))]).view(*tokens.shape, -1)

    @torch.inference_mode()
    def move(self, row: int, source: Sequence[int], destination: Sequence[int]) -> None:
        if not source:
            return
        self._kv.move(row, source, destination)
        origin, goal = (self._kv.table.locate(row, slots) for slots in (source, destination))
        taken = [(self._tokens[at], self._positions[at], self._states.get(at)) for at in origin]
        for at, (token, position, state) in zip(goal, taken, strict=True):
            self._tokens[at], self._positions[at] = token, position
            self._keep(at, state)

    def show(self, row: int, start: int, end: int) -> Tensor:
        if self._taps is None:
            return super().show(row, start, end)
        return self._taps.of(row, start, end)

    def _node_job(self, node: _Node) -> Job:
        path = self._path(node)
        return replace(self._job(node.row, [node.token], path), shift=node.position - len(path) + 1)

    def _path(self, node: _Node) -> list[int]:
        """The slots that a node sees, in the order of their positions, and its own."""
        addresses = self._addresses(node.row, node.seen)
        order = sorted(range(len(node.seen)), key=lambda i: self._positions[addresses[i]])
        return [*(node.seen[i] for i in order), node.slot]

    def _job(self, row: int, tokens: Sequence[int], slots: Sequence[int]) -> Job:
        """New tokens behind others, of which so many are run again that there is a state before them."""
        before = self._addresses(row, slots[: len(slots) - len(tokens)])
        known = next((i for i in reversed(range(len(before))) if before[i] in self._states), -1)
        lacking = len(before) - known - 1
        while lacking > MOST_AGAIN:
            part = before[known + 1 : known + 1 + self._chunk]
            known += len(part)
            state = self._state_at(before, known - len(part))
            job = Job(row, [self._tokens[at] for at in part], slots[: known + 1], len(part), state)
            self._keep(before[known], self._forward([job])[1][0])
            lacking -= len(part)
        again = [self._tokens[at] for at in before[known + 1 :]]
        return Job(row, [*again, *tokens], slots, len(again), self._state_at(before, known))

    def _state_at(self, addresses: Sequence[int], index: int) -> State:
        if index < 0:
            return self._begin
        self._states.move_to_end(addresses[index])
        return self._states[addresses[index]]

    def _addresses(self, row: int, slots: Sequence[int]) -> list[int]:
        """Addresses of slots that are read."""
        pages, size = self._kv.table.of(row, self.slots), self.page_slots
        return [pages[slot // size] * size + slot % size for slot in slots]

    def _run(self, jobs: Sequence[Job]) -> list[Tensor]:
        """Run jobs, keep the states after them, and return the logits of their new tokens, [new, V]."""
        logits: dict[int, Tensor] = {}
        by_length: dict[int, list[int]] = {}
        for index, job in enumerate(jobs):
            by_length.setdefault(len(job.tokens), []).append(index)
        for some in by_length.values():
            batch = [jobs[index] for index in some]
            said, states = self._forward(batch)
            for index, job, of_job, state in zip(some, batch, said, states, strict=True):
                logits[index] = of_job[job.again :]
                self._note(job, state)
        return [logits[index] for index in range(len(jobs))]

    def _note(self, job: Job, state: State) -> None:
        """Note the new tokens of a job, and the state after them."""
        count = len(job.tokens) - job.again
        addresses = self._addresses(job.row, job.slots[-count:])
        for offset, (at, token) in enumerate(zip(addresses, job.tokens[job.again :], strict=True)):
            self._tokens[at], self._positions[at] = token, job.first + job.again + offset + job.shift
            self._states.pop(at, None)
        self._keep(addresses[-1], state)

    def _keep(self, address: int, state: State | None) -> None:
        self._states.pop(address, None)
        if state is not None:
            self._states[address] = state
        while len(self._states) > self._most:
            self._states.popitem(last=False)

    def _forward(self, jobs: Sequence[Job]) -> tuple[Tensor, list[State]]:
        """Run jobs of as many tokens; their logits, float32 [B, T, V], and states."""
        if not self._stepwise or not any(job.first for job in jobs):
            return self._forward_at_once(jobs)
        said, states = [], [job.state for job in jobs]
        for step in range(len(jobs[0].tokens)):
            logits, states = self._forward_at_once(
                [job.only(step, state) for job, state in zip(jobs, states, strict=True)]
            )
            said.append(logits)
        return torch.cat(said, 1), states

    def _forward_at_once(self, jobs: Sequence[Job]) -> tuple[Tensor, list[State]]:
        extent = self.extent(max(max(job.slots) for job in jobs) + 1)
        written = [self._written(job) for job in jobs]
        self._kv.aim([job.row for job in jobs], [range(extent)], [self._tensor(written)])
        self._set([job.state for job in jobs])
        order = torch.full((len(jobs), extent), self.slots, device=self.device)
        for of_job, job in zip(order, jobs, strict=True):
            of_job[self._tensor(job.slots)] = torch.arange(len(job.slots), device=self.device)
        places = self._tensor([range(job.first, len(job.slots)) for job in jobs])
        positions = places + self._tensor([job.shift for job in jobs])[:, None]
        mask = torch.where(order[:, None] <= places[..., None], self._seen, self._hidden)[:, None]
        logits = self._call(self._tensor([job.tokens for job in jobs]), positions, mask, self._cache)
        return logits[..., : self.vocab_size].float(), self._states_of(len(jobs))

    def _states_of(self, count: int) -> list[State]:
        """The states of a batch of so many, each on its own: most are not kept for long."""
        tensors = list(states_of(self._stateful))
        if count == 1:
            return [tensors]
        return [[tensor[index : index + 1].clone() for tensor in tensors] for index in range(count)]

    def _written(self, job: Job) -> list[int]:
        """Where a job's tokens are written: those that are there, to a page that nobody reads."""
        table = self._kv.table
        spare = [table.spare * table.page_slots + i % table.page_slots for i in range(job.again)]
        return [*spare, *self._addresses(job.row, job.slots[job.first + job.again :])]

    def _set(self, states: Sequence[State]) -> None:
        """Give the recurrent layers the states of a batch. They write to what they are given."""
        parts = zip(*states, strict=True)
        for layer in self._stateful:
            for kept in _kept(layer):
                for index in kept:
                    kept[index] = torch.cat(next(parts))

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(list(map(list, values)) if isinstance(values[0], range) else values, device=self.device)


@dataclass(frozen=True, slots=True)
class _Node:
    """A token of a tree: ``seen`` are the slots that it sees, without its own."""

    row: int
    token: int
    position: int
    slot: int
    seen: Sequence[int]


def _levels(nodes: Sequence[_Node]) -> list[list[int]]:
    """Nodes by the number of others among them that they see, so that each comes after those."""
    of_rows: dict[int, set[int]] = {}
    for node in nodes:
        of_rows.setdefault(node.row, set()).add(node.slot)
    by_depth: dict[int, list[int]] = {}
    for index, node in enumerate(nodes):
        by_depth.setdefault(len(of_rows[node.row].intersection(node.seen)), []).append(index)
    return [by_depth[depth] for depth in sorted(by_depth)]


def prepare(model: PreTrainedModel, max_length: int) -> None:
    """Have a model compute as a runner needs it.

    Raises:
        UnsupportedModelError: it has windows, which are not told apart here.
    """
    if Sight.of(model.config, max_length).windowed:
        raise UnsupportedModelError(f"{type(model).__name__} has recurrent layers and windows")
    model.eval().requires_grad_(False)
    model.set_attn_implementation(choose_attention(model))
    fix_frequencies(model, max_length)


@torch.inference_mode()
def what_is_kept(model: PreTrainedModel) -> list[Any]:
    """The layers of a model's own cache after one token.

    Raises:
        UnsupportedModelError: the model does not run so, or has layers of another kind.
    """
    cache = DynamicCache(config=model.config)
    zero = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    try:
        _caller(model)(zero, zero, torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=model.device), cache)
    except Exception as error:  # whatever a foreign model raises means the same
        raise UnsupportedModelError(f"{type(model).__name__} does not run with states of ours: {error}") from error
    for layer in cache.layers:
        started = getattr(layer, "is_initialized", False) or any(_initialised(layer))
        if isinstance(layer, DynamicLayer | LinearAttentionLayer) and not started:
            raise UnsupportedModelError(f"{type(model).__name__} keeps something that is not in its cache")
    return list(cache.layers)


def _initialised(layer: Any) -> list[bool]:
    return [*getattr(layer, "is_conv_states_initialized", {}).values()]


def shape_kept(layer: Any) -> LayerShape | None:
    """What a layer of such a cache keeps of a token; None if that is not K and V."""
    if not isinstance(layer, DynamicLayer):
        return None
    return LayerShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])


def most_states(state_bytes: int, rows: int) -> int:
    """How many states of so many bytes are kept for so many rows."""
    return max(FEWEST * rows, STATE_BYTES // max(1, state_bytes))


def bytes_of_states(state_bytes: int, rows: int, slots: int) -> int:
    """Bytes of all states of so many bytes each that are kept at most for rows of so many slots."""
    return state_bytes * min(rows * slots, most_states(state_bytes, rows))


def _kept(layer: Any) -> list[dict[int, Tensor]]:
    """The states of a layer, those of its convolution first, without those that it does not have."""
    both = layer.conv_states, layer.recurrent_states
    return [states for states in both if all(state is not None for state in states.values())]


def states_of(layers: Sequence[Any]) -> Iterator[Tensor]:
    """The states of recurrent layers, [B, ..] each."""
    stateful = [layer for layer in layers if isinstance(layer, LinearAttentionLayer)]
    return chain.from_iterable(states.values() for layer in stateful for states in _kept(layer))


def _like(layer: Any, other: LinearAttentionLayer) -> Any:
    """Make a layer one that has begun, as another one has."""
    for name in ("conv_states", "recurrent_states", "is_conv_states_initialized", "is_recurrent_states_initialized"):
        setattr(layer, name, dict(getattr(other, name)))
    layer.conv_kernel_size, layer.number_of_states = dict(other.conv_kernel_size), other.number_of_states
    layer.has_previous_state = dict.fromkeys(other.has_previous_state, True)
    layer.dtype, layer.device = other.dtype, other.device
    return layer


class _Masks(dict[str, Tensor]):
    """A mask for each kind of layers: attention has one, a recurrent layer none."""

    def __missing__(self, kind: str) -> None:
        return None


def _caller(model: PreTrainedModel) -> Any:
    """A model's forward as (tokens, positions, mask, cache) -> logits."""
    name = cache_name(model)
    kinds = "full_attention", "attention", "sliding_attention"
    attends = any(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=model.config).layers)

    def call(tokens: Tensor, positions: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        kwargs: dict[str, Any] = {name: cache}
        if attends:
            kwargs |= {"attention_mask": _Masks(dict.fromkeys(kinds, mask)), "position_ids": positions}
        logits: Tensor = model(input_ids=tokens, use_cache=True, **kwargs).logits
        return logits

    return call


def takes_steps_alone(model: PreTrainedModel) -> bool:
    """Whether tokens that go on from a state have to be run one by one: as with Mamba, which takes no heed of its state
    when it is given several, and with models that compute something else then, so that a text would depend on it.

    Raises:
        UnsupportedModelError: its logits over states that were taken and rolled back are not those of a plain forward.
    """
    last = model.config.get_text_config().vocab_size - 1
    tokens = torch.linspace(1, last, CHECKED_ROWS * (BEFORE + AFTER), device=model.device).long().view(CHECKED_ROWS, -1)
    with in_float32(model), weights_alone(model):
        with torch.inference_mode():
            plain = model(input_ids=tokens, use_cache=False).logits[:, BEFORE:].float()
        at_once, one_by_one = (_rolled_back(model, tokens.tolist(), stepwise) for stepwise in (False, True))
    want = plain[..., : at_once.shape[-1]]
    errors = _apart(at_once, want), _apart(one_by_one, want)
    if not min(errors) < TOLERANCE:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not go on from a state as it is given: its logits differ (relative error "
            f"{min(errors):.2g})"
        )
    return not (errors[0] < TOLERANCE and _apart(at_once, one_by_one) < ALIKE)


def _rolled_back(model: PreTrainedModel, tokens: Sequence[Sequence[int]], stepwise: bool) -> Tensor:
    """Logits [R, AFTER, V] after going on from a state with other tokens, back to it, and on."""
    rows = range(CHECKED_ROWS)
    runner = RecurrentRunner(
        model, rows=CHECKED_ROWS, max_length=32, scratch=16, page_slots=16, checked=False, stepwise=stepwise
    )
    runner.append(rows, [of_row[:BEFORE] for of_row in tokens], [0] * CHECKED_ROWS)
    runner.append(rows, [of_row[-3:] for of_row in tokens], [BEFORE] * CHECKED_ROWS)
    return torch.stack(runner.append(rows, [of_row[BEFORE:] for of_row in tokens], [BEFORE] * CHECKED_ROWS))


def _apart(got: Tensor, want: Tensor) -> float:
    """Relative error of logits."""
    return float((got - want).norm() / (want - want.mean(-1, keepdim=True)).norm().clamp(min=1e-30))
