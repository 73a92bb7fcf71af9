"""The runner of Hugging Face models: an unchanged AutoModelForCausalLM over our slot-addressed KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ssd_ray.models.attention import PERIOD, choose_attention
from ssd_ray.models.calibration import PER_ROW, Calibration
from ssd_ray.models.contract import PAGE_SLOTS, ModelRunner
from ssd_ray.models.experts import use_steady_experts
from ssd_ray.models.graphs import LineForward, ReplayedLine, caller, decoding_forward, eager_forward
from ssd_ray.models.packing import find_siblings, pack_linears, packable
from ssd_ray.models.probe import check_addressing, probe_layers, takes_lines
from ssd_ray.models.reach import Reach, Sight
from ssd_ray.models.rotary import fix_frequencies
from ssd_ray.models.slots import SlotCache, Stretch
from ssd_ray.models.steady import Products, steadiness, steady_chunks
from ssd_ray.models.taps import Taps

FEW_SIZES = (1, 2, 4, 8, 16, 32)
"""Tokens of a row where every number is a shape of its own, that is compiled or captured."""


class HFRunner(ModelRunner):
    """Runs one model; see :class:`~ssd_ray.models.contract.ModelRunner` for the operations.

    Args:
        model: a causal LM on its device, in its dtype, for this runner alone: its attention implementation and its
            rotary frequencies are set here, and in bfloat16 on a CPU its linear layers are packed.
        rows, max_length, scratch: a row has ``max_length + scratch`` slots, in whole pages. Rotary frequencies that
            depend on the length are those of ``max_length`` tokens.
        page_slots, pages: slots of a page, and pages of each pool, or of all of them; None is enough for all rows.
        prefill_chunk: tokens in one prefill forward at most, which ends at a multiple of it; fewer are padded to a
            number that leaves their bits alone.
        compile: compile the decoding forwards with torch.compile, once for each shape.
        vocab_size: logits beyond it are cut off (rows of padding in the embedding).
        quantize: quantises the model's linear layers once it is found to work, and may change its dtype.
        taps: the places whose hidden states are kept, for :meth:`show`; see :class:`~ssd_ray.models.taps.Taps`.

    Raises:
        UnsupportedModelError: the model does not keep K and V of every layer in the cache that it is given, or does not
            take positions and mask as they are given, each row for itself.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rows: int,
        max_length: int,
        scratch: int,
        prefill_chunk: int = 256,
        page_slots: int = PAGE_SLOTS,
        pages: Sequence[int] | int | None = None,
        compile: bool = False,
        vocab_size: int | None = None,
        quantize: Callable[[PreTrainedModel], None] | None = None,
        taps: Sequence[int] = (),
    ) -> None:
        model.eval().requires_grad_(False)
        model.set_attn_implementation(choose_attention(model))
        use_steady_experts(model)
        self.vocab_size = vocab_size or model.get_output_embeddings().weight.shape[0]
        self.max_length = max_length
        self.page_slots = page_slots
        self.rows, self.slots = rows, self.extent(max_length + scratch)
        self._chunk = prefill_chunk
        self.calibration: Calibration | None = None
        body = model.get_decoder()
        sight = Sight.of(model.config, max_length)
        self._body = caller(body, sight)
        fix_frequencies(model, max_length)
        shapes = probe_layers(model)
        check_addressing(model, shapes, max_length)
        if quantize is not None:
            quantize(model)
        self.dtype, self.device = model.dtype, model.device
        packing = packable(model.device, model.dtype) and not compile
        self.packed = packing and pack_linears(model, find_siblings(model))
        self._steady = steadiness(model, page_slots)
        self._chunks = steady_chunks(body, prefill_chunk)
        self._products = Products(model)
        self._kv = SlotCache(
            shapes,
            rows=rows,
            slots=self.slots,
            page_slots=page_slots,
            pages=pages,
            dtype=self.dtype,
            device=self.device,
            sight=sight,
        )
        self.pools = [pool.described for pool in self._kv.pools]
        self._decode = decoding_forward(model, self._kv, compile=compile)
        in_line = not compile and takes_lines(model, shapes)
        self._line = ReplayedLine(model, self._kv) if in_line else None
        self._prompt = ReplayedLine(body, self._kv) if in_line else None
        self.line_sizes: Sequence[int] = () if in_line else FEW_SIZES
        self._taps = Taps(model, taps, self._kv) if taps else None
        if self._taps is not None:
            self.shows, self.pools = self._taps.numbers, self._taps.counted(self.pools)
            self._decode = eager_forward(model, self._kv)  # what is kept on the way is no part of a compiled forward
        # Padding may lie beyond the last position, which a model with a table of positions cannot look up.
        self._counter = torch.arange(self.slots + prefill_chunk, device=self.device).clamp(max=max_length - 1)
        self._seen = torch.zeros((), dtype=self.dtype, device=self.device)
        # Not -inf: a token that sees nothing then gives a finite average instead of NaN, and its KV harms nobody.
        # Nor the lowest number, which becomes -inf in float16 when a score is added to it.
        self._hidden = torch.full((), torch.finfo(self.dtype).min / 2, dtype=self.dtype, device=self.device)
        self._strip = self._causal_strip(prefill_chunk)
        self._slot_numbers = torch.arange(self.slots + PERIOD, device=self.device)

    def adopt(self, calibration: Calibration) -> None:
        """Run the numbers of tokens that were found to be alike, and say what they cost."""
        self.calibration = calibration
        self.measured, self.line_sizes = calibration.measured, calibration.steady
        if self._line is None:  # each row is padded, which takes slots: no row need have more than for its tokens
            self.line_sizes = [*(size for size in calibration.steady if size < PER_ROW), PER_ROW]

    def extent(self, needed: int) -> int:
        return -(-needed // self.page_slots) * self.page_slots

    def padded(self, tokens: int) -> int:
        return tokens if self._line is not None else 1 << (tokens - 1).bit_length()

    def bind(self, row: int, first: int, pages: Sequence[int], pool: int | None = None) -> None:
        self._kv.bind(row, first, pages, pool)

    @torch.inference_mode()
    def extend(self, rows: Sequence[int], tokens: Tensor, positions: Tensor, slots: Tensor, visible: Tensor) -> Tensor:
        written = [self._tensor(each) for each in self._kv.locate(rows, slots.tolist())]
        extents = self._extents(visible)
        visible = visible[..., : max(extents)].to(self.device)
        tokens, positions = tokens.to(self.device), positions.to(self.device)
        self._kv.note(written, positions)
        seen = self._seen_by_layers(rows, visible, positions)
        begins = [self._begins(each) for each in seen]  # for each reach of each row
        masks = [torch.where(each, self._seen, self._hidden) for each in seen]
        if self._line is None:
            reads = [range(min(of_reach), max(extents)) for of_reach in begins]
            by_reach = [mask[:, None, :, read.start :] for mask, read in zip(masks, reads, strict=True)]
            return self._logits(self._decode(rows, reads, tokens, positions, written, by_reach))
        count = tokens.shape[1]
        stretches = []
        for i, (row, extent, *of_row) in enumerate(zip(rows, extents, *begins, strict=True)):
            parts = [mask[i, :, begin:extent] for mask, begin in zip(masks, of_row, strict=True)]
            stretches.append(Stretch(row, count, [range(begin, extent) for begin in of_row], parts))
        places = [each.flatten() for each in written]
        line = self._line(stretches, tokens.flatten(), positions.flatten(), places, [count])
        return self._logits(line).view(*tokens.shape, -1)

    @torch.inference_mode()
    def append(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
        places = [(row, start, start + len(some)) for row, some, start in zip(rows, tokens, starts, strict=True)]
        written = self._kv.locate_trunk(places)
        extents = [self._steady.extent(end) for _, _, end in places]
        self._note_trunk(starts, written)
        if self._line is None:
            logits = self._append_rows(rows, tokens, starts)
        else:
            logits = self._append_line(self._line, rows, tokens, starts, written, extents)
        return list(torch.split(self._logits(logits), [len(some) for some in tokens]))

    def _append_line(
        self,
        forward: LineForward,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        starts: Sequence[int],
        written: Sequence[Sequence[list[int]]],
        extents: Sequence[int],
    ) -> Tensor:
        """Run the tokens of all rows in a line, padded to a number of tokens that leaves their bits alone; logits
        [tokens, V]."""
        counts = list(map(len, tokens))
        padding = self.line_size(sum(counts)) - sum(counts)
        reads = [self._reads(start, extent) for start, extent in zip(starts, extents, strict=True)]
        masks = [self._masks(*each) for each in zip(starts, counts, reads, strict=True)]
        stretches = [Stretch(*each) for each in zip(rows, counts, reads, masks, strict=True)]
        positions = [self._counter[start : start + count] for start, count in zip(starts, counts, strict=True)]
        line = self._tensor([*chain(*tokens), *[0] * padding])
        positions.append(self._counter[:1].expand(padding))
        places = [self._tensor([*chain(*each)]) for each in written]
        return forward(stretches, line, torch.cat(positions), places, self._steady.queries)[: sum(counts)]

    def _append_rows(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        starts: Sequence[int],
    ) -> Tensor:
        """Run the tokens of each row in a row of a batch, all padded alike; logits [tokens, V]."""
        length = self.line_size(max(map(len, tokens)))
        padded = self._tensor([[*some, *[0] * (length - len(some))] for some in tokens])
        # Padding is written after the tokens, where nobody sees it before it is written over, and within what is read.
        reads = self._reads(min(starts), max(self._steady.extent(start + length) for start in starts))
        positions, masks = self._trunk(starts, length, reads)
        written = self._kv.locate_trunk([(row, start, start + length) for row, start in zip(rows, starts, strict=True)])
        logits = self._decode(rows, reads, padded, positions, list(map(self._tensor, written)), masks)
        return torch.cat([of_row[: len(some)] for of_row, some in zip(logits, tokens, strict=True)])

    def bits(self, counts: Sequence[int]) -> list[bytes]:
        padded = max(counts) * len(counts) if self._line is None else sum(counts)
        return self._products.bits(padded)

    def line_size(self, count: int) -> int:
        """How many tokens are run where there are so many: beyond the largest number that was tried, up to a quarter
        more, so that few shapes are met."""
        step = 1 << max(0, count.bit_length() - 3)
        return next((size for size in self.line_sizes if size >= count), -(-count // step) * step)

    @torch.inference_mode()
    def prefill(self, row: int, tokens: Sequence[int], start: int = 0) -> None:
        end = start + len(tokens)
        written = self._kv.locate_trunk([(row, start, end)])
        borders = range((start // self._chunk + 1) * self._chunk, end, self._chunk)
        for first, last in pairwise([start, *borders, end] if tokens else []):
            part = slice(first - start, last - start)
            self._prefill_chunk(row, tokens[part], first, [addresses[part] for (addresses,) in written])

    @torch.inference_mode()
    def move(self, row: int, source: Sequence[int], destination: Sequence[int]) -> None:
        if source:
            self._kv.move(row, source, destination)

    def show(self, row: int, start: int, end: int) -> Tensor:
        if self._taps is None:
            return super().show(row, start, end)
        return self._taps.of(row, start, end)

    def _prefill_chunk(self, row: int, tokens: Sequence[int], start: int, written: Sequence[list[int]]) -> None:
        # Chunks end and read at multiples of their length, so KV is the same, bit for bit, however a prompt is cut.
        count, whole = len(tokens), start // self._chunk * self._chunk
        padded = next(size for size in self._chunks if size >= count)
        line = self._tensor([*tokens, *[0] * (padded - count)])
        reads = self._reads(whole, min(self.slots, self.extent(whole + self._chunk)), self.page_slots)
        positions, masks = self._trunk([start], padded, reads)
        self._note_trunk([start], [[addresses] for addresses in written])
        # Padding is computed but not written: the slots after the prompt may hold someone's branches.
        places = list(map(self._tensor, written))
        if self._prompt is not None:
            stretch = Stretch(row, padded, reads, [mask[0, 0] for mask in masks])
            self._prompt([stretch], line, positions[0], places, ())
            return
        self._kv.aim([row], reads, places)
        self._body(line[None], positions, masks, self._kv)

    def _extents(self, visible: Tensor) -> list[int]:
        """How many slots each row of a mask, bool [R, T, E], has to read."""
        rows, _, extent = visible.shape
        if rows == 1:
            return [extent]
        ends = (visible.any(1) * torch.arange(1, extent + 1, device=visible.device)).amax(1)
        return [max(self.page_slots, self.extent(end)) for end in ends.tolist()]

    def _begins(self, seen: Tensor) -> list[int]:
        """From which slot on each row of a mask, bool [R, T, E], has to be read."""
        if not self._kv.sight.windowed:
            return [0] * len(seen)
        firsts: list[int] = seen.any(1).byte().argmax(-1).tolist()
        return [first // self.page_slots * self.page_slots for first in firsts]

    def _reads(self, start: int, extent: int, step: int | None = None) -> list[range]:
        """The slots up to ``extent`` that trunk tokens from ``start`` on read, for each reach: from a slot on that
        leaves a token's bits alone, or that is a multiple of ``step``."""
        firsts = [reach.start(start) for reach in self._kv.sight.reaches]
        begins = [first // step * step if step else self._steady.begin(first) for first in firsts]
        return [range(begin, extent) for begin in begins]

    def _trunk(self, starts: Sequence[int], length: int, reads: Sequence[range]) -> tuple[Tensor, list[Tensor]]:
        """Positions, int64 [1 or R, T], and masks, [1 or R, 1, T, E], of trunk tokens at ``starts[r] + 0 .. T-1``."""
        common = starts[:1] if len(set(starts)) == 1 else starts
        positions = [self._counter[start : start + length] for start in common]
        of_rows = [[mask[:length] for mask in self._masks(start, length, reads)] for start in common]
        return _stacked(positions), [_stacked(masks)[:, None] for masks in zip(*of_rows, strict=True)]

    def _masks(self, start: int, count: int, reads: Sequence[range]) -> list[Tensor]:
        """Additive masks [count or more, E] of trunk tokens from ``start`` on over what they read, for each reach."""
        if count > len(self._strip):
            self._strip = self._causal_strip(count)
        pairs = zip(self._kv.sight.reaches, reads, strict=True)
        return [self._mask(start, count, reach, read) for reach, read in pairs]

    def _mask(self, start: int, count: int, reach: Reach, read: range) -> Tensor:
        mask = self._strip[:, self.slots - start + read.start : self.slots - start + read.stop]
        if self.device.type == "cuda":  # whose kernels take masks that begin where a vector does
            mask = mask[:count].clone()
        if reach.whole:
            return mask
        queries, keys = (
            torch.arange(start, start + count, device=self.device),
            self._slot_numbers[read.start : read.stop],
        )
        return torch.where(reach.sees(queries, keys), mask[:count], self._hidden)

    def _seen_by_layers(self, rows: Sequence[int], visible: Tensor, positions: Tensor) -> list[Tensor]:
        """What tokens at positions [R, T] see of what is visible, bool [R, T, E], for each reach."""
        held = [pool.positions(rows, visible.shape[-1]) for pool in self._kv.pools]
        return [
            visible if keys is None else visible & pool.reach.sees(positions, keys)
            for pool, keys in zip(self._kv.pools, held, strict=True)
        ]

    def _note_trunk(self, starts: Sequence[int], written: Sequence[Sequence[Sequence[int]]]) -> None:
        """Note the positions of tokens of trunks that are written to these addresses of each pool."""
        if self._kv.sight.windowed:
            positions = [range(start, start + len(some)) for start, some in zip(starts, written[0], strict=True)]
            addresses = [self._tensor([*chain(*each)]) for each in written]
            self._kv.note(addresses, self._tensor([*chain(*positions)]))

    def _causal_strip(self, length: int) -> Tensor:
        """Additive mask [length, 2*slots + PERIOD] in which token i sees column j iff ``j <= slots + i``.

        Columns from ``slots - start`` on are then the causal mask of tokens that begin at slot ``start``.
        """
        columns = torch.arange(2 * self.slots + PERIOD, device=self.device)
        visible = columns <= self.slots + torch.arange(length, device=self.device)[:, None]
        return torch.where(visible, self._seen, self._hidden)

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _logits(self, logits: Tensor) -> Tensor:
        return logits[..., : self.vocab_size].float()


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """As torch.stack, but one tensor is not copied."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tuple(tensors))
