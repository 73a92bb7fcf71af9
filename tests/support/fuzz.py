"""Requests made of whatever Python and JSON can express, on the edge of what is taken and far beyond."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from ssd_ray.config import SamplingParams

INTEGERS = (0, 1, -1, 2, 7, 20, 21, 127, 1024, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400)
FLOATS = (0.0, -0.0, 1.0, 0.5, 1e-45, 5e-324, 1e-38, 1.2e-7, 1 - 1e-16, 2.0, -2.0, 100.0, 3.5e38, 1e308, -1e308)
NUMBERS = (*INTEGERS, *FLOATS, float("nan"), float("inf"), float("-inf"))
TEXTS = ("", "a", " ", "\n", "the", "\0", "é", "\U0001f600", "�", "\ud83d", "\udfffx", "<|end|>", "a" * 3000)

EDGES: dict[str, tuple[Any, ...]] = {
    "temperature": (0, 0.0, 5e-324, 1e-45, 1e-20, 1e-3, 0.7, 1, 100.0),
    "repetition_penalty": (1e-6, 1e-5, 0.5, 1, 1.1, 100, 1e-45, 0),
    "presence_penalty": (-2, 0, 5e-324, 2.0),
    "frequency_penalty": (-2.0, 0, 1e-300, 2),
    "logit_bias": (
        None,
        {},
        {0: -100},
        {"5": 100.0},
        {95: 1e-45},
        [(3, 2.0)],
        {96: 1},
        {2**31: 1},
        {"x": 1},
        {1: None},
    ),
    "top_p": (None, 5e-324, 1e-45, 0.1, 0.999999999, 1, 1.0),
    "top_k": (-1, 0, 1, 5, 96, 2**31 - 1),
    "min_p": (0, 5e-324, 1e-45, 0.5, 1),
    "max_tokens": (1, 2, 5, 9, None, 2**31 - 1),
    "min_tokens": (0, 1, 2, 5, 2**31 - 1),
    "stop": (None, (), "a", ["e", "the"], "\ud83d", ["x", ""], "\U0001f600", "a" * 5000, ["b"] * 500),
    "stop_token_ids": (None, [], [3, 4], [95], [96], [2**31 - 1], [2**70], [True], list(range(96))),
    "include_stop_str_in_output": (True, False),
    "skip_special_tokens": (True, False),
    "bad_words": (None, (), "a", ["the", " e"], "<|end|>", "\ud83d", ["x", ""], ["b"] * 500),
    "bad_words_ids": (None, [], [[3], [4, 5]], [(95,)], [[96]], [[2**70]], [[]], [[t] for t in range(96)]),
    "seed": (None, 0, -1, 2**63 - 1, 2**64, -(2**200), 5),
    "ignore_eos": (True, False),
    "logprobs": (None, False, 0, 1, 20),
    "n": (1, 1, 1, 2, 3, 1024),
}
"""Values near what the fields take."""

OTHERS: tuple[Callable[[], Any], ...] = (
    object,
    lambda: b"bytes",
    lambda: {1, 2},
    lambda: Fraction(1, 3),
    lambda: 1j,
    lambda: np.float64(0.5),
    lambda: np.int64(3),
    lambda: np.array([1, 2]),
    lambda: np.array([]),
    lambda: torch.tensor(2),
    lambda: torch.tensor([0.5, 1.5]),
    lambda: range(3),
    lambda: SamplingParams,
    lambda: int,
)
"""What only Python has."""


def anything(dice: random.Random, depth: int = 2, *, python: bool = True) -> Any:
    """A value of any type; without ``python`` one that JSON has."""
    kinds: list[Callable[[], Any]] = [
        lambda: None,
        lambda: dice.random() < 0.5,
        lambda: dice.choice(NUMBERS),
        lambda: dice.randrange(-(2**70), 2**70),
        lambda: dice.uniform(-3, 3),
        lambda: text(dice),
    ]
    if depth:
        kinds += [
            lambda: [anything(dice, depth - 1, python=python) for _ in range(dice.randrange(4))],
            lambda: {text(dice): anything(dice, depth - 1, python=python) for _ in range(dice.randrange(3))},
        ]
    if python:
        kinds += [dice.choice(OTHERS), lambda: tuple(anything(dice, 0) for _ in range(2))]
    return dice.choice(kinds)()


def text(dice: random.Random) -> str:
    """Characters from everywhere, halves of some included."""
    if dice.random() < 0.5:
        return dice.choice(TEXTS)
    top = dice.choice((0x80, 0x800, 0xD900, 0x110000))
    return "".join(chr(dice.randrange(top)) for _ in range(dice.randrange(12)))


def parameters(dice: random.Random, *, python: bool = True) -> dict[str, Any]:
    """Arguments of SamplingParams: some of its fields, near what they take or anything, rarely one that it lacks."""
    names = dice.sample(list(EDGES), dice.randrange(1, 6))
    near = dice.choice((1.0, 0.8))
    values = {
        name: dice.choice(EDGES[name]) if dice.random() < near else anything(dice, python=python) for name in names
    }
    if dice.random() < 0.02:
        values[dice.choice(("temprature", "top-k", "_", "\ud83d"))] = 1
    return values


def prompt(dice: random.Random, vocab: int = 96, *, python: bool = True) -> Any:
    """A prompt, mostly one that can be served."""
    kinds: list[Callable[[], Any]] = [
        lambda: [dice.randrange(vocab) for _ in range(dice.randrange(1, 20))],
        lambda: "".join(chr(dice.randrange(32, 127)) for _ in range(dice.randrange(1, 20))),
        lambda: text(dice),
        lambda: anything(dice, python=python),
    ]
    if python:
        kinds += [
            lambda: np.array([dice.randrange(vocab) for _ in range(3)]),
            lambda: {"prompt_token_ids": [dice.randrange(-1, vocab + 1) for _ in range(4)]},
            lambda: {"prompt": text(dice)},
        ]
    return dice.choices(kinds, [4, 4, *[1] * (len(kinds) - 2)])[0]()


def as_json(values: Any) -> bytes:
    """As a client writes it that writes everything."""
    return json.dumps(values, default=repr).encode()
