"""Our attention function against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ssd_ray.errors import UnsupportedModelError
from ssd_ray.models.attention import (
    NAME,
    PERIOD,
    Heads,
    Part,
    Parts,
    Read,
    choose_attention,
    find_heads,
    masked_attention,
    steady_extents,
    steady_queries,
)
from tests.support.tiny import tiny_model


class Causal(nn.Module):
    is_causal = True


def defined(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return (torch.softmax(query @ key.mT * scaling + mask, -1) @ value).transpose(1, 2)


@pytest.fixture(params=[1, 2, 4])
def tensors(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, 5, 8, generator=random)
    key, value = torch.randn(2, 3, 4 // request.param, 11, 8, generator=random)
    hidden = torch.rand(3, 1, 5, 11, generator=random) < 0.5
    hidden[..., 0] = False
    return query, key, value, torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)


def test_masked(tensors: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    query, key, value, mask = tensors
    got, weights = masked_attention(Causal(), query, key, value, mask, scaling=0.3)
    assert weights is None
    torch.testing.assert_close(got, defined(query, key, value, mask, 0.3))


def test_a_single_token(tensors: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    query, key, value, mask = tensors
    got, _ = masked_attention(Causal(), query[:, :, 2:3], key, value, mask[:, :, 2:3], scaling=0.3)
    torch.testing.assert_close(got, defined(query, key, value, mask, 0.3)[:, 2:3])


def test_parts_of_the_rows(tensors: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Two rows read 10 slots, one reads 11; each gets what it gets alone, bit for bit."""
    query, key, value, mask = tensors
    parts = ((slice(0, 2), 10), (slice(2, 3), 11))
    layout = Parts(
        [Part(rows.stop - rows.start, 5, mask[rows, ..., :extent], start=5 * rows.start) for rows, extent in parts]
    )
    keys, values = (Read([part[rows, :, :extent] for rows, extent in parts], layout) for part in (key, value))
    line = query.transpose(0, 1).reshape(1, 4, 15, 8)
    got = masked_attention(Causal(), line, keys, values, None, scaling=0.3)[0].view(3, 5, 4, 8)
    for row, extent in enumerate((10, 10, 11)):
        r = slice(row, row + 1)
        alone = query[r], key[r, :, :extent], value[r, :, :extent], mask[r, ..., :extent]
        only = Parts([Part(1, 5, alone[3])])
        read = (Read([part], only) for part in alone[1:3])
        assert torch.equal(got[r], masked_attention(Causal(), alone[0], *read, None, scaling=0.3)[0])
        torch.testing.assert_close(got[r], defined(*alone, 0.3))


def test_parts_may_take_tokens_from_anywhere(tensors: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """A line of 2 tokens of row 0, 1 of row 1, 3 of row 2 and padding: rows 0 and 2 are read together, and one of them
    is asked about its last token twice."""
    query, key, value, mask = tensors
    line = torch.cat([query[0, :, :2], query[1, :, :1], query[2, :, :3], torch.zeros(4, 2, 8)], 1)[None]
    some, both = [0, 1, 1], torch.tensor([0, 1, 1, 3, 4, 5])
    masks = torch.stack([mask[0][:, some], mask[2][:, :3]])
    parts = [Part(2, 3, masks, take=both), Part(1, 1, mask[1:2, :, :1], start=2)]
    layout = Parts(parts, restore=torch.tensor([0, 1, 6, 3, 4, 5, 0, 0]))
    keys, values = (Read([part[[0, 2]], part[1:2]], layout) for part in (key, value))
    (got,) = masked_attention(Causal(), line, keys, values, None, scaling=0.3)[0]
    want = defined(query, key, value, mask, 0.3)
    torch.testing.assert_close(got[:6], torch.cat([want[0, :2], want[1, :1], want[2, :3]]))


@pytest.mark.parametrize("causal", [True, False])
def test_without_a_mask(causal: bool) -> None:
    query, key, value = torch.randn(3, 1, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.full((5, 5), -torch.inf).triu(1) if causal else torch.zeros(5, 5)
    got, _ = masked_attention(Causal(), query, key, value, None, scaling=0.3, is_causal=None if causal else False)
    torch.testing.assert_close(got, defined(query, key, value, mask, 0.3))


def test_terms_that_are_lacking_are_refused() -> None:
    query, key, value = torch.randn(3, 1, 4, 5, 8)
    with pytest.raises(UnsupportedModelError, match="position_bias"):
        masked_attention(Causal(), query, key, value, None, position_bias=torch.zeros(1))


def test_soft_caps_and_sinks(tensors: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """As they are defined: scores are bent, and each head has a score more, of nothing."""
    query, key, value, mask = tensors
    sinks, groups = torch.tensor([0.5, -1.0, 2.0, 0.0]), query.shape[1] // key.shape[1]
    got, _ = masked_attention(Causal(), query, key, value, mask, scaling=3.0, softcap=2.0, s_aux=sinks)
    scores = 2.0 * torch.tanh(3.0 * query @ key.repeat_interleave(groups, 1).mT / 2.0) + mask
    weights = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(got, (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2))


def test_without_a_mask_ours_is_causal_too(tensors: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    query, key, value = (tensor[:, :, :5] for tensor in tensors[:3])
    hidden = torch.full((5, 5), -1e9).triu(1)[None, None]
    want, _ = masked_attention(Causal(), query, key, value, hidden, softcap=2.0)
    torch.testing.assert_close(masked_attention(Causal(), query, key, value, None, softcap=2.0)[0], want)


def test_attention_is_ours_where_a_model_takes_another_one() -> None:
    assert choose_attention(tiny_model("llama")) == choose_attention(tiny_model("gemma2")) == NAME
    assert choose_attention(tiny_model("falcon")) == "sdpa"


def test_what_a_models_attention_looks_like() -> None:
    def heads(architecture: str) -> set[tuple[int, int, int, float | None, bool]]:
        model = tiny_model(architecture)
        model.set_attn_implementation(NAME)
        return {(each.query_heads, each.dim, each.value_dim, each.softcap, each.sinks) for each in find_heads(model)}

    assert heads("llama") == {(2, 8, 8, None, False)}
    assert heads("gemma2") == {(2, 8, 8, 2.0, False)}
    assert heads("gpt_oss") == {(2, 8, 8, None, True)}
    assert heads("deepseek_v3") == {(1, 12, 8, None, False)}
    assert heads("gemma4_text") == {(2, 8, 8, None, False), (2, 16, 16, None, False)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_slots_change_no_bit_at_steady_extents(dtype: torch.dtype) -> None:
    extents = steady_extents(Heads(2, 32, dtype, torch.device("cpu")), 16)
    assert extents == sorted(set(extents))
    assert extents[-1] == PERIOD
    beyond = [*extents, PERIOD + extents[0], PERIOD + extents[-2]]
    query, key, value = (torch.randn(3, *shape, 32).to(dtype) for shape in ((4, 8), (2, 1024), (2, 1024)))
    for seen in (1, 15, 100, 193, 250, 300, 365, 500):
        mask = torch.zeros(1, 1, 8, 1024, dtype=dtype)
        mask[..., seen:] = torch.finfo(dtype).min
        results = [
            masked_attention(nn.Module(), query, key[:, :, :each], value[:, :, :each], mask[..., :each])[0]
            for each in beyond
            if each >= seen
        ]
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_queries_of_a_row_change_no_bit_at_steady_numbers(dtype: torch.dtype) -> None:
    numbers = steady_queries(Heads(2, 32, dtype, torch.device("cpu")), 16)
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 16
    query, key, value = (torch.randn(1, *shape, 32).to(dtype) for shape in ((4, 16), (2, 320), (2, 320)))

    def attention(count: int, extent: int) -> Tensor:
        """As decoding asks for it: a row's tokens are a part of a line."""
        mask = torch.zeros(1, 1, count, extent, dtype=dtype)
        mask[..., 50:] = torch.finfo(dtype).min
        layout = Parts([Part(1, count, mask)])
        read = (Read([part[:, :, :extent]], layout) for part in (key, value))
        return masked_attention(nn.Module(), query[:, :, :count], *read, None)[0]

    for extent in (64, 128, 320):
        whole = attention(16, extent)
        assert all(torch.equal(attention(count, extent), whole[:, :count]) for count in numbers)
