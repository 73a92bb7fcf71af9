"""The held-out prompts: source files that the bundled pair was never trained on."""

from __future__ import annotations

from importlib.resources import files
from typing import Any


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
