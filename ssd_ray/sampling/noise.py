"""Gumbel noise as a pure function of (seed, position, token id): the noise that target and draft share.

A counter-based generator: nothing is stored or advanced, so any process can make the noise of any position in any
order. A row's 64-bit key is SplitMix64 at index ``position`` of the stream that ``seed`` names; its halves key an
integer hash of the token ids, whose 31 bits become one uniform and that one Gumbel variate. Integers wrap alike on
every device; the two logarithms agree up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor


def _signed(constant: int, bits: int) -> int:
    """Reinterpret an unsigned constant as two's complement: torch has no unsigned arithmetic."""
    return constant - (1 << bits) if constant >> (bits - 1) else constant


_GAMMA = _signed(0x9E3779B97F4A7C15, 64)  # SplitMix64: Steele, Lea, Flood, 2014
_MIX64 = (_signed(0xBF58476D1CE4E5B9, 64), _signed(0x94D049BB133111EB, 64))
_MIX32 = (_signed(0x7FEB352D, 32), _signed(0x846CA68B, 32))  # C. Wellons, "lowbias32"

# The largest 31-bit integer rounds to 2**31 in float32: scaled by this it stays below 1.
_SCALE = 2.0**-31 * (1.0 - 2.0**-24)


def gumbel(seeds: Tensor, positions: Tensor, vocab_size: int, *, device: torch.device | str) -> Tensor:
    """Make standard Gumbel noise, one row for each pair of seed and position.

    Args:
        seeds, positions: int64 [R], 0 to 2**63 - 1, on any device.
        vocab_size: V, columns of a row; column t is token id t whatever V is.
        device: where the noise is made.

    Returns:
        float32 [R, V], finite, from -2.9 to 22.2. An entry depends on its seed, position and token id alone.
    """
    keys = _mix64(_mix64(seeds.to(device) + _GAMMA) + positions.to(device) * _GAMMA)  # int64 [R]
    return _to_gumbel(*_hash(keys, _token_hash(vocab_size, torch.device(device))))


def _mix64(x: Tensor) -> Tensor:
    """SplitMix64's finalizer, a bijection of int64."""
    x = (x ^ _shift_right(x, 30)) * _MIX64[0]
    x = (x ^ _shift_right(x, 27)) * _MIX64[1]
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, count: int) -> Tensor:
    """Shift zeros into an int64 from the left: torch's own shift of a negative number shifts ones in."""
    return (x >> count) & ((1 << (64 - count)) - 1)


@lru_cache(maxsize=8)
def _token_hash(vocab_size: int, device: torch.device) -> Tensor:
    """Spread token ids over int32 [V]; kept, since every row starts from it."""
    x = torch.arange(vocab_size, dtype=torch.int64, device=device)
    return _mix64(x + _GAMMA).view(torch.int32)[::2].contiguous()


def _hash(keys: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Hash every token under every key: int64 [R] and int32 [V] to int32 [R, V] of 31 random bits, and scratch."""
    halves = keys.view(torch.int32).view(-1, 2)  # int32 [R, 2]
    x = tokens ^ halves[:, :1]  # [R, V]
    shifted = torch.empty_like(x)  # one scratch for all steps: fresh memory costs more than the arithmetic
    # A secret odd factor, so that rows which share one half of their keys still have nothing in common.
    x.mul_(halves[:, 1:] | 1)
    for factor in _MIX32:
        torch.bitwise_right_shift(x, 15, out=shifted)
        x.bitwise_xor_(shifted.bitwise_and_(0x1FFFF)).mul_(factor)
    # This shift may copy the sign: it cancels the sign bit and leaves 31 uniform bits.
    x.bitwise_xor_(torch.bitwise_right_shift(x, 16, out=shifted))
    return x, shifted


def _to_gumbel(bits: Tensor, scratch: Tensor) -> Tensor:
    """Map 31 random bits to -log(-log(1 - v)), v uniform in (0, 1), in the memory of ``scratch``.

    Large noise, which decides an argmax, comes from small v: float32 resolves those finely where it could not tell
    1 - v from 1.
    """
    v = scratch.view(torch.float32).copy_(bits).add_(0.5)
    return v.mul_(-_SCALE).log1p_().neg_().log_().neg_()


class NoiseRows:
    """The noise of one sequence, made in blocks of positions ahead and kept for a while.

    One call of :func:`gumbel` for a block costs little more than for a row, and rounds ask for the same positions
    again. ``blocks`` blocks of ``block`` positions (a power of two) are held; any other position costs its block.
    """

    def __init__(
        self, seed: int, vocab_size: int, *, device: torch.device | str = "cpu", block: int = 16, blocks: int = 3
    ) -> None:
        self.seed = seed
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._block = block
        self._held = [-1] * blocks  # which block of positions is in each part of the ring
        with torch.inference_mode(False):  # a tensor that may be written inside and outside of inference mode
            self._ring = torch.empty(blocks * block, vocab_size, dtype=torch.float32, device=self.device)

    def rows(self, positions: Sequence[int]) -> Tensor:
        """Return the noise of ``positions`` (any order, repetitions allowed), float32 [n, V], a copy."""
        wanted = {position // self._block for position in positions}
        if len({number % len(self._held) for number in wanted}) < len(wanted):
            return self._make(positions)  # more blocks than the ring holds
        for number in wanted:
            self._fill(number)
        index = [position % len(self._ring) for position in positions]
        return self._ring.index_select(0, torch.tensor(index, dtype=torch.int64, device=self.device))

    def _fill(self, number: int) -> None:
        part = number % len(self._held)
        if self._held[part] == number:
            return
        start = number * self._block
        first = part * self._block
        self._ring[first : first + self._block] = self._make(range(start, start + self._block))
        self._held[part] = number

    def _make(self, positions: Iterable[int]) -> Tensor:
        where = torch.tensor(list(positions), dtype=torch.int64, device=self.device)
        seeds = torch.full_like(where, self.seed)
        return gumbel(seeds, where, self.vocab_size, device=self.device)
