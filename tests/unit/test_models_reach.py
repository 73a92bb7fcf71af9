"""How far back layers see: by positions, whatever slots hold them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ssd_ray.models.reach import EVERYTHING, Reach, Sight, shortened
from tests.support.tiny import WINDOW, tiny_config


@pytest.mark.parametrize(
    ("reach", "want"),
    [(Reach(), [0, 0, 0, 0]), (Reach(3), [0, 0, 3, 5]), (Reach(4, chunked=True), [0, 0, 4, 4])],
)
def test_the_first_position_that_is_seen(reach: Reach, want: list[int]) -> None:
    assert reach.first(torch.tensor([0, 2, 5, 7])).tolist() == want


def test_what_is_seen_follows_positions() -> None:
    seen = Reach(2).sees(torch.tensor([[4, 9]]), torch.tensor([[9, 3, 8, 4]]))
    assert seen.tolist() == [[[True, True, True, True], [True, False, True, False]]]


@pytest.mark.parametrize(
    ("architecture", "values", "reaches", "of_layers"),
    [
        ("llama", {}, [EVERYTHING], [0, 0]),
        ("mistral", {}, [Reach(WINDOW)], [0, 0]),
        ("mistral", {"sliding_window": None}, [EVERYTHING], [0, 0]),
        ("gemma2", {}, [Reach(WINDOW), EVERYTHING], [0, 1]),
        ("qwen2", {}, [EVERYTHING, Reach(WINDOW)], [0, 1]),
        ("qwen2", {"use_sliding_window": False}, [EVERYTHING], [0, 0]),
        ("llama4_text", {}, [Reach(WINDOW, chunked=True), EVERYTHING], [0, 0, 0, 1]),
    ],
)
def test_what_configs_say(
    architecture: str, values: dict[str, Any], reaches: list[Reach], of_layers: list[int]
) -> None:
    sight = Sight.of(tiny_config(architecture, **values), 128)
    assert (list(sight.reaches), list(sight.of_layers)) == (reaches, of_layers)


def test_a_window_as_long_as_the_text_is_none() -> None:
    assert not Sight.of(tiny_config("gemma2"), WINDOW).windowed
    assert Sight.of(tiny_config("gemma2"), WINDOW + 1).windowed


def test_masks_go_to_the_kinds_of_layers() -> None:
    masks = [torch.zeros(1), torch.ones(1)]
    sight = Sight.of(tiny_config("gemma2"), 128)
    assert sight.argument(masks) == {"sliding_attention": masks[0], "full_attention": masks[1]}
    assert Sight.of(tiny_config("mistral"), 128).argument(masks[:1]) is masks[0]


def test_windows_are_short_for_a_while() -> None:
    config = tiny_config("llama4_text")
    with shortened(config, 5):
        assert config.attention_chunk_size == 5
    assert config.attention_chunk_size == WINDOW
