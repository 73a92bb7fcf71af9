"""The held-out prompts: source files that the bundled pair was never trained on."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from random import Random
from typing import Any

from ssd_ray.config import SamplingParams


def held_out_texts() -> dict[str, str]:
    """The text of every held-out file by name, in a fixed order."""
    folder = files("ssd_ray") / "assets" / "prompts"
    found = sorted((file for file in folder.iterdir() if file.name.endswith(".py.txt")), key=lambda file: file.name)
    return {file.name.removesuffix(".txt"): file.read_text(encoding="utf-8") for file in found}


def held_out_prompts(tokenizer: Any, *, count: int = 20, tokens: int = 192) -> list[list[int]]:
    """The first ``tokens`` token ids of ``count`` files, chosen evenly over all of them."""
    texts = list(held_out_texts().values())
    count = min(count, len(texts))
    chosen = [texts[index * len(texts) // count] for index in range(count)]
    return [tokenizer.encode(text, add_special_tokens=False)[:tokens] for text in chosen]


def any_prompt(texts: Sequence[Sequence[int]], dice: Random) -> list[int]:
    """Token ids from somewhere in one of some texts, 4 to 120 of them."""
    text = dice.choice(texts)
    return list(text[dice.randrange(len(text) // 2) :][: dice.randint(4, 120)])


def any_params(dice: Random, tokens: tuple[int, int]) -> SamplingParams:
    """Greedy or at temperature 1, with a seed, for so many tokens at least and at most."""
    temperature, count = dice.choice([0.0, 1.0]), dice.randint(*tokens)
    return SamplingParams(temperature=temperature, max_tokens=count, seed=dice.randrange(1 << 32))
