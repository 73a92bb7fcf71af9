"""The table model: its distributions are what it says, and sensitive to everything that can go wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_ray.models.table import TableModel

texts = st.lists(st.integers(0, 7), min_size=1, max_size=30)


def probabilities(logits: torch.Tensor) -> np.ndarray:
    return logits.double().softmax(-1).numpy()


@settings(max_examples=50)
@given(tokens=texts, order=st.sampled_from([None, 1, 2, 3]))
def test_logits_are_those_of_the_distribution(tokens: list[int], order: int | None) -> None:
    model = TableModel(8, order=order, max_length=32, scratch=4)
    logits = model.append([0], [tokens], [0])[0]
    assert logits.dtype == torch.float32
    for end in range(1, len(tokens) + 1):
        want = model.distribution(tokens[:end])
        assert want.sum() == pytest.approx(1)
        np.testing.assert_allclose(probabilities(logits[end - 1]), want, atol=1e-12)


# Derandomised here and below: two contexts may pick the same row of the table by chance.
@settings(max_examples=50, derandomize=True)
@given(tokens=texts, at=st.integers(0, 29), other=st.integers(0, 7))
def test_every_token_and_the_order_count(tokens: list[int], at: int, other: int) -> None:
    model = TableModel(8, contexts=1 << 14)
    changed = list(tokens)
    changed[at % len(tokens)] = other
    equal = np.array_equal(model.distribution(tokens), model.distribution(changed))
    assert equal == (changed == tokens)
    assert np.array_equal(model.distribution(tokens), model.distribution(tokens[::-1])) == (tokens == tokens[::-1])


@settings(max_examples=50, derandomize=True)
@given(before=texts, others=texts, last=st.tuples(*[st.integers(0, 7)] * 2), then=st.tuples(*[st.integers(0, 7)] * 2))
def test_order_two_forgets_all_but_two_tokens(
    before: list[int], others: list[int], last: tuple[int, int], then: tuple[int, int]
) -> None:
    model = TableModel(8, order=2, contexts=1 << 14)
    want = model.distribution([*before, *last])
    assert np.array_equal(want, model.distribution([*others, *last]))
    assert np.array_equal(want, model.distribution([*before, *then])) == (last == then)


def test_kv_of_another_context_is_noticed() -> None:
    model = TableModel(8)
    model.prefill(0, [1, 2, 3])
    model.append([0], [[5]], [0])  # 2 and 3 were run after 1, not after 5
    stale = model.append([0], [[4]], [3])[0][0]
    assert np.abs(probabilities(stale) - model.distribution([5, 2, 3, 4])).max() > 1e-3


def test_equal_seeds_are_equal_models() -> None:
    assert np.array_equal(TableModel(8, seed=3).distribution([1]), TableModel(8, seed=3).distribution([1]))
    assert not np.array_equal(TableModel(8, seed=3).distribution([1]), TableModel(8, seed=4).distribution([1]))


def test_sharpness() -> None:
    np.testing.assert_allclose(TableModel(8, sharpness=0.0).distribution([1, 2]), 1 / 8)
    assert TableModel(8, sharpness=50.0).distribution([1, 2]).max() > 0.99


@pytest.mark.parametrize("agreement", [0.0, 0.5, 0.9, 1.0])
def test_a_perturbed_model_agrees_in_a_fraction_of_contexts(agreement: float) -> None:
    model = TableModel(32, contexts=4096)
    draft = model.perturbed(agreement)
    tokens = np.random.default_rng(0).integers(0, 32, 200).tolist()
    same = [np.array_equal(model.distribution(tokens[:end]), draft.distribution(tokens[:end])) for end in range(1, 201)]
    assert np.mean(same) == pytest.approx(agreement, abs=0.12)


def test_a_perturbed_model_has_kv_of_its_own() -> None:
    model = TableModel(8)
    draft = model.perturbed(1.0)
    model.prefill(0, [1, 2])
    draft.prefill(0, [3, 4])
    np.testing.assert_allclose(
        probabilities(model.append([0], [[5]], [2])[0][0]), model.distribution([1, 2, 5]), atol=1e-12
    )
