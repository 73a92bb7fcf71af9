"""Logit filters against a naive reference in float64, on every path."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ssd_ray.config import SamplingParams
from ssd_ray.sampling.logits import scores, scores_by_row, top

torch.set_num_threads(1)

GREEDY = SamplingParams(temperature=0.0)
# Halves from -4 to 4, so that ties are common, and barred tokens.
logit_rows = st.lists(st.integers(-8, 8).map(lambda x: x / 2) | st.just(-np.inf), min_size=1, max_size=12)
temperatures = st.sampled_from([1e-300, 1e-6, 0.1, 0.7, 1.0, 1.3, 100.0])
all_params = st.builds(
    SamplingParams,
    temperature=temperatures,
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([1e-9, 0.3, 0.5, 0.9, 0.95, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-9, 0.03, 0.5, 1.0]),
)


def scale(logits, params):
    return np.asarray(logits, dtype=np.float32) * np.float32(1 / max(params.temperature, 1e-20))


def reference(logits, params, margin=0.0):
    """The ids kept of one row, likeliest first; None if rounding may decide, by less than ``margin``."""
    x = scale(logits, params).astype(np.float64)
    kept = sorted(range(len(x)), key=lambda token: (-x[token], token))
    if params.top_k:
        kept = kept[: params.top_k]
    p = np.exp(x[kept] - x[kept[0]])
    before = (p.cumsum() - p) / p.sum()
    if params.top_p < 1.0:
        if np.any(np.abs(before[1:] - params.top_p) < margin):
            return None
        kept = [kept[0]] + [token for token, mass in zip(kept[1:], before[1:], strict=True) if mass < params.top_p]
    if params.min_p:
        ratio = np.exp(x[kept] - x[kept[0]])
        if np.any((np.abs(ratio - params.min_p) < margin * params.min_p) & (ratio < 1.0)):
            return None
        kept = [token for token, r in zip(kept, ratio, strict=True) if r >= params.min_p]
    return kept


def filtered(logits, params, margin=0.0):
    kept = reference(logits, params, margin)
    if kept is None:
        return None
    expected = np.full(len(logits), -np.inf, dtype=np.float32)
    expected[kept] = scale(logits, params)[kept]
    return torch.from_numpy(expected)


@settings(max_examples=400)
@given(logit_rows, all_params, st.sampled_from([1, 2, 3, 256]))
def test_a_row_is_filtered_as_the_reference_does(row, params, head):
    assume(max(row) > -np.inf)
    expected = filtered(row, params, margin=1e-5)
    assume(expected is not None)
    with patch("ssd_ray.sampling.logits._HEAD", head):
        assert torch.equal(scores(torch.tensor([row]), params)[0], expected)


@pytest.mark.parametrize("spread", [0.5, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("grid", [None, 0.25])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_p=0.95),
        SamplingParams(top_p=0.5, temperature=0.6),
        SamplingParams(top_k=40),
        SamplingParams(top_k=1000, top_p=0.9),
        SamplingParams(top_p=0.99, min_p=0.02),
    ],
)
def test_a_large_vocabulary_is_filtered_as_the_reference_does(spread, grid, params):
    logits = torch.randn(4, 4096, generator=torch.Generator().manual_seed(1)) * spread
    logits = logits if grid is None else (logits / grid).round() * grid
    expected = torch.stack([filtered(row, params) for row in logits.numpy()])
    assert torch.equal(scores(logits, params), expected)


@pytest.mark.parametrize("spread", [0.5, 3.0, 8.0])
@pytest.mark.parametrize("top_p", [0.1, 0.95, 0.9999])
def test_the_head_and_the_whole_give_the_same(spread, top_p):
    logits = torch.randn(6, 3000, generator=torch.Generator().manual_seed(2)) * spread
    params = SamplingParams(top_p=top_p)
    usual = scores(logits, params)
    with patch("ssd_ray.sampling.logits._HEAD", 3000):
        assert torch.equal(scores(logits, params), usual)


def test_the_whole_is_sorted_only_if_the_head_falls_short():
    peaked = torch.randn(2, 4096, generator=torch.Generator().manual_seed(3)) * 6
    with patch("ssd_ray.sampling.logits._sorted", side_effect=RuntimeError("sorted")):
        scores(peaked, SamplingParams(top_p=0.95))
        with pytest.raises(RuntimeError, match="sorted"):
            scores(torch.zeros(2, 4096), SamplingParams(top_p=0.95))


def test_wide_and_narrow_rows_share_a_batch():
    logits = torch.randn(6, 2000, generator=torch.Generator().manual_seed(4)) * torch.tensor([[0.5, 8, 1, 3, 8, 0.1]]).T
    params = SamplingParams(top_p=0.9)
    alone = [scores(row[None], params) for row in logits]
    assert torch.equal(scores(logits, params), torch.cat(alone))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_keep_the_same_tokens():
    logits = (torch.randn(6, 5000, generator=torch.Generator().manual_seed(5)) * 12).round() / 4
    params = SamplingParams(temperature=0.7, top_k=3000, top_p=0.9, min_p=0.01)
    assert torch.equal(scores(logits.cuda(), params).cpu(), scores(logits, params))


def kept(row, **params):
    return scores(torch.tensor([row]), SamplingParams(**params))[0].isfinite().nonzero().flatten().tolist()


def test_of_equal_tokens_the_lower_ids_stay():
    assert kept([0.0, 1.0, 1.0, 1.0], top_k=2) == [1, 2]
    assert kept([0.0, 0.0, 0.0, 0.0], top_p=0.5) == [0, 1]
    assert kept([0.0, 0.0, 0.0, 0.0], top_p=0.51) == [0, 1, 2]
    assert kept([0.0, 5.0, 0.0, 5.0], top_k=3) == [0, 1, 3]
    assert kept([0.0] * 4096, top_p=0.5) == list(range(2048))


def test_each_filter_sees_what_the_ones_before_left():
    row = np.log([0.4, 0.3, 0.2, 0.1]).tolist()
    assert kept(row, top_p=0.75) == [0, 1, 2]
    assert kept(row, top_k=3, top_p=0.75) == [0, 1]  # 0.7 of 0.9
    assert kept(row, top_p=0.75, min_p=0.6) == [0, 1]
    assert kept(row, temperature=0.5, top_p=0.75) == [0, 1]  # 16, 9, 4, 1 of 30
    assert kept(row, min_p=1.0) == kept(row, top_p=1e-300) == kept(row, top_k=1) == [0]
    assert kept(row, top_k=4) == kept(row, top_k=10**9) == kept(row) == [0, 1, 2, 3]


def test_greedy_gives_the_logits_themselves():
    logits = torch.randn(3, 5)
    assert scores(logits, GREEDY, torch.randn(3, 5)) is logits
    assert torch.equal(scores_by_row(logits, [GREEDY] * 3, torch.randn(3, 5)), logits)


def test_noise_is_added_last():
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    noise = torch.tensor([[0.0, 9.0, 99.0]])
    assert scores(logits, SamplingParams(top_k=2), noise).tolist() == [[3.0, 11.0, -np.inf]]
    assert scores(logits, SamplingParams(temperature=0.5), noise).tolist() == [[6.0, 13.0, 101.0]]
    assert scores(logits.expand(2, 3), SamplingParams(), noise).tolist() == [[3.0, 11.0, 100.0]] * 2


@given(st.lists(all_params | st.just(GREEDY), min_size=1, max_size=6), st.booleans())
def test_rows_do_not_depend_on_their_batch(params, noisy):
    generator = torch.Generator().manual_seed(len(params))
    logits = torch.randn(len(params), 700, generator=generator) * 2
    noise = torch.randn(len(params), 700, generator=generator) if noisy else None
    copies = logits.clone(), None if noise is None else noise.clone()
    together = scores_by_row(logits, params, noise)
    for row, each in enumerate(params):
        alone = scores(logits[row : row + 1], each, None if noise is None else noise[row : row + 1])
        assert torch.equal(together[row : row + 1], alone)
    assert torch.equal(logits, copies[0])
    assert noise is None or torch.equal(noise, copies[1])


@given(temperatures)
def test_scores_are_never_nan(temperature):
    logits = torch.tensor([[1e9, -1e9, 0.0, -np.inf], [-0.0, 0.0, 1e-30, -1e-30], [-np.inf] * 4])
    for params in (
        SamplingParams(temperature=temperature),
        SamplingParams(temperature=temperature, top_k=3, top_p=0.9, min_p=0.1),
    ):
        result = scores(logits, params, torch.zeros(3, 4))
        assert not result.isnan().any()
        assert result[0].argmax() == 0
        assert result[0, 3] == -np.inf


def test_no_gradient_is_needed():
    logits = torch.zeros(2, 4096, requires_grad=True)
    with torch.inference_mode():
        assert scores(logits, SamplingParams(top_p=0.5)).isfinite().sum() == 4096


@pytest.mark.parametrize(("rows", "vocab"), [(1, 20), (2, 9000), (1, 32003), (16, 4096), (5, 4099)])
@pytest.mark.parametrize("kept", [1, 5, 32])
def test_the_best_are_those_of_a_full_order(rows, vocab, kept):
    kept = min(kept, vocab)
    drawn = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab))
    drawn[0, : vocab // 2] = -torch.inf
    drawn[-1].round_()  # many are equal
    values, tokens = top(drawn, kept)
    assert torch.equal(values, drawn.sort(descending=True).values[:, :kept])
    assert torch.equal(drawn.gather(-1, tokens), values)
    assert all(len(set(row)) == kept for row in tokens.tolist())
