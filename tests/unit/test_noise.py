"""The shared noise: its values, its law, its independence, and that it does not matter how it is asked for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ssd_ray.sampling.noise import NoiseRows, _to_gumbel, gumbel

torch.set_num_threads(1)

LARGEST = 2**63 - 1
SIGNIFICANT = 1e-4  # every draw here is fixed: a test passes always or never
numbers = st.integers(0, LARGEST)


def noise(seed, positions, vocab_size):
    positions = torch.tensor(list(positions), dtype=torch.int64)
    return gumbel(torch.full_like(positions, seed), positions, vocab_size, device="cpu")


GOLDEN = {  # (seed, position, token): changing these changes every sampled text
    (0, 0, 0): 3.60648823,
    (0, 0, 1): 0.0517860763,
    (0, 1, 0): -1.56808114,
    (1, 0, 0): 0.313517958,
    (42, 1000, 4095): 0.362672538,
    (LARGEST, LARGEST, 17): 2.45002508,
    (2**62 + 1, 7, 150_000): 0.495858371,
}


@pytest.mark.parametrize("key", GOLDEN)
def test_values_are_pinned(key):
    seed, position, token = key
    assert noise(seed, [position], token + 1)[0, token].item() == pytest.approx(GOLDEN[key], rel=1e-6, abs=1e-6)


def reference(seed, position, token):
    """The noise in Python's integers and float64: nothing can wrap or round here unless it says so."""

    def mix64(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    gamma = 0x9E3779B97F4A7C15
    key = mix64((mix64((seed + gamma) % 2**64) + position * gamma) % 2**64)
    x = (mix64((token + gamma) % 2**64) ^ key) % 2**32
    x = x * (key >> 32 | 1) % 2**32
    for factor in (0x7FEB352D, 0x846CA68B):
        x = (x ^ x >> 15) * factor % 2**32
    sign = x >> 31
    bits = (x ^ x >> 16 ^ sign * 0xFFFF0000) % 2**31
    return -np.log(-np.log1p(-(bits + 0.5) / 2**31))


@given(numbers, numbers, st.integers(0, 300))
def test_values_are_those_of_the_reference(seed, position, token):
    expected = reference(seed, position, token)
    assert noise(seed, [position], token + 1)[0, token].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 12345, LARGEST])
@pytest.mark.parametrize(
    ("positions", "vocab_size"), [(range(50), 4096), (range(200_000), 1), (range(25_000), 8), ([7], 200_000)]
)
def test_law_is_gumbel(seed, positions, vocab_size):
    sample = noise(seed, positions, vocab_size).flatten().numpy()
    assert stats.kstest(sample, "gumbel_r").pvalue > SIGNIFICANT


def test_law_holds_across_seeds():
    seeds = torch.arange(200_000)
    sample = gumbel(seeds, torch.full_like(seeds, 3), 1, device="cpu").flatten().numpy()
    assert stats.kstest(sample, "gumbel_r").pvalue > SIGNIFICANT


def test_upper_tail_is_resolved():
    """Where an argmax is decided: the largest of 4096 values, over many rows, has the law of a Gumbel maximum."""
    largest = torch.cat([noise(5, range(at, at + 256), 4096).amax(-1) for at in range(0, 4096, 256)])
    assert stats.kstest(largest.numpy(), stats.gumbel_r(loc=np.log(4096)).cdf).pvalue > SIGNIFICANT
    assert len(largest.unique()) > 4000


def assert_independent(left, right):
    left, right = (stats.gumbel_r.cdf(side.double().numpy()).ravel() for side in (left, right))
    assert stats.pearsonr(left, right).pvalue > SIGNIFICANT
    cells = np.histogram2d(left, right, bins=16, range=[[0, 1], [0, 1]])[0]  # joint ranks
    assert stats.chisquare(cells.ravel()).pvalue > SIGNIFICANT


ROWS, COLUMNS = range(256), 512


@pytest.mark.parametrize("distance", [1, 2, 3, 16, 256, 2048])
def test_tokens_are_independent(distance):
    grid = noise(9, ROWS, COLUMNS + distance)
    assert_independent(grid[:, :-distance], grid[:, distance:])


@pytest.mark.parametrize("power", range(0, 63, 3))
def test_positions_a_power_of_two_apart_are_independent(power):
    step = 1 << power
    lower = [p % step + p // step * 2 * step for p in ROWS]  # those without this bit
    assert_independent(noise(9, lower, COLUMNS), noise(9, [p + step for p in lower], COLUMNS))


@pytest.mark.parametrize("power", range(0, 63, 3))
def test_seeds_a_power_of_two_apart_are_independent(power):
    assert_independent(noise(9, ROWS, COLUMNS), noise(9 ^ 1 << power, ROWS, COLUMNS))


def test_seed_and_position_play_different_parts():
    assert_independent(noise(9, ROWS, COLUMNS), noise(8, [p + 1 for p in ROWS], COLUMNS))
    numbers = torch.arange(1, 257)
    swapped = gumbel(numbers, torch.zeros_like(numbers), COLUMNS, device="cpu")
    assert_independent(noise(0, numbers.tolist(), COLUMNS), swapped)


def test_dependence_is_noticed():
    first, second = noise(9, ROWS, COLUMNS), noise(10, ROWS, COLUMNS)
    with pytest.raises(AssertionError):
        assert_independent(first, torch.where(first > 3.0, first, second))


def test_the_best_token_of_a_row_is_uniform_and_independent_of_the_next_rows():
    best = noise(4, range(40_001), 8).argmax(-1)
    table = np.histogram2d(best[:-1].numpy(), best[1:].numpy(), bins=8)[0]
    assert stats.chisquare(table.ravel()).pvalue > SIGNIFICANT


def test_rows_of_a_long_text_are_all_different():
    firsts = noise(11, range(100_000), 4)
    assert len(torch.unique(firsts, dim=0)) == 100_000


@settings(max_examples=50)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=20), st.integers(1, 70), st.integers(1, 70))
def test_an_entry_depends_on_its_own_key_alone(pairs, narrow, wide):
    seeds, positions = torch.tensor(pairs, dtype=torch.int64).unbind(-1)
    block = gumbel(seeds, positions, wide, device="cpu")
    width = min(narrow, wide)
    for row, (seed, position) in enumerate(pairs):
        assert torch.equal(noise(seed, [position], narrow)[0, :width], block[row, :width])


def test_arguments_may_be_strided_views():
    pairs = torch.arange(20).view(10, 2)
    expected = gumbel(pairs[:, 0].contiguous(), pairs[:, 1].contiguous(), 33, device="cpu")
    assert torch.equal(gumbel(pairs[:, 0], pairs[:, 1], 33, device="cpu"), expected)


@given(numbers, numbers)
def test_noise_is_finite_float32(seed, position):
    row = noise(seed, [position], 1000)
    assert row.dtype == torch.float32
    assert row.isfinite().all()
    assert row.min() > -2.9
    assert row.max() < 22.2


def test_extreme_hashes_stay_finite():
    bits = torch.tensor([[0, 1, 2**31 - 1, 2**31 - 2]], dtype=torch.int32)
    values = _to_gumbel(bits, torch.empty_like(bits))
    u = (bits.double() + 0.5) / 2**31
    assert values.isfinite().all()
    assert values[0, :2].tolist() == pytest.approx((-torch.log(-torch.log1p(-u)))[0, :2].tolist(), rel=1e-5)
    assert values[0, 2:].max() < -2.7


def test_the_largest_noise_survives_a_trip_through_other_dtypes():
    largest = noise(3, [0], 150_000).max()
    assert largest.double().to(torch.float32) == largest
    assert np.float32(largest.item()) == largest.numpy()


@settings(max_examples=60)
@given(
    st.integers(0, LARGEST),
    st.sampled_from([0, 5, 2**40, LARGEST - 200]),
    st.lists(st.lists(st.integers(0, 200), max_size=9), max_size=8),
    st.sampled_from([1, 2, 4, 16, 32]),
    st.integers(1, 4),
)
def test_noise_rows_give_the_same_values_in_any_order(seed, base, calls, block, blocks):
    kept = NoiseRows(seed, 19, block=block, blocks=blocks)
    for offsets in calls:
        positions = [base + offset for offset in offsets]
        assert torch.equal(kept.rows(positions), noise(seed, positions, 19))


def test_noise_rows_are_made_once(monkeypatch):
    made = []

    def count(seeds, positions, vocab_size, device):
        made.extend(positions.tolist())
        return gumbel(seeds, positions, vocab_size, device=device)

    monkeypatch.setattr("ssd_ray.sampling.noise.gumbel", count)
    kept = NoiseRows(1, 7)
    for start in [*range(0, 90, 5), *range(80, 60, -3)]:
        kept.rows(range(start, start + 8))
        kept.rows([start] * 4)
    assert made == list(range(96))  # blocks of 16, each once


def test_rows_are_copies():
    kept = NoiseRows(1, 7)
    kept.rows([0]).zero_()
    assert torch.equal(kept.rows([0]), noise(1, [0], 7))


def test_noise_rows_may_cross_inference_mode():
    with torch.inference_mode():
        kept = NoiseRows(1, 7)
        kept.rows([0])
    assert torch.equal(kept.rows([100]), noise(1, [100], 7))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_agree_up_to_rounding():
    seeds, positions = torch.tensor([0, 5, LARGEST]), torch.tensor([LARGEST, 3, 0])
    here = gumbel(seeds, positions, 50_000, device="cpu")
    there = gumbel(seeds, positions, 50_000, device="cuda").cpu()
    torch.testing.assert_close(there, here, rtol=1e-5, atol=2e-6)
