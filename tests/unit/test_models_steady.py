"""How a product's rounding is told apart where half precision hides it."""

from __future__ import annotations

from functools import reduce

import pytest
import torch
from torch import Tensor, nn

from ssd_ray.models import steady
from ssd_ray.models.packing import pack_linears, packable
from ssd_ray.models.steady import Products, steady_chunks


def another_order_for_few(weight: Tensor, inputs: Tensor, bias: Tensor | None, few: int = 2) -> Tensor:
    """A product that adds its terms in another order where there are few tokens, as a library's kernels do."""
    terms = weight.float() * inputs.float()[:, None]  # [tokens, outputs, inputs]
    if len(inputs) <= few:
        terms = terms.flip(-1)
    exact = reduce(torch.add, terms.unbind(-1))
    return (exact if bias is None else exact + bias.float()).to(inputs.dtype)


@pytest.fixture
def layer() -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(64, 16, bias=False).to(torch.bfloat16)


def test_another_order_of_additions_is_found_though_results_are_equal(layer, monkeypatch):
    monkeypatch.setattr(steady, "_plain", another_order_for_few)
    token = torch.randn(1, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    few, many = (another_order_for_few(layer.weight, token.repeat(count, 1), None)[0] for count in (1, 8))
    assert torch.equal(few, many)  # which is what a comparison of results would see
    products = Products(nn.Sequential(layer))
    assert products.bits(1) == products.bits(2) != products.bits(3) == products.bits(200)


def test_tokens_that_round_otherwise_by_their_place_are_found(layer, monkeypatch):
    def by_place(weight: Tensor, inputs: Tensor, bias: Tensor | None) -> Tensor:
        parts = [another_order_for_few(weight, each, bias) for each in inputs.split(8)]  # the rest of a block is few
        return torch.cat(parts)

    monkeypatch.setattr(steady, "_plain", by_place)
    products = Products(nn.Sequential(layer))
    assert products.bits(8) == products.bits(16) == products.bits(11)
    assert products.bits(8) != products.bits(9)


def test_chunks_that_round_otherwise_are_left_out(layer, monkeypatch):
    monkeypatch.setattr(steady, "_plain", lambda *args: another_order_for_few(*args, few=20))
    assert steady_chunks(nn.Sequential(layer), 100) == [24, 32, 48, 64, 96, 100]


def test_nothing_is_asked_where_there_are_no_products():
    assert Products(nn.Sequential(nn.ReLU())).bits(3) == []
    assert steady_chunks(nn.ReLU(), 64) == [8, 12, 16, 24, 32, 48, 64]
    assert steady_chunks(nn.ReLU(), 4) == [4]


@pytest.mark.skipif(not packable(torch.device("cpu"), torch.bfloat16), reason="cannot pack")
def test_packed_products_are_asked_with_their_siblings(monkeypatch):
    monkeypatch.setattr("ssd_ray.models.packing._packing_pays", lambda *_: True)
    layers = [nn.Linear(32, out, bias=True).to(torch.bfloat16) for out in (8, 24, 16)]
    model = nn.Sequential(*layers).requires_grad_(False)
    assert pack_linears(model, [layers[:2]])
    assert set(steady._products(model)) == {(32, 32), (32, 16)}
    assert all(Products(model).bits(5))
