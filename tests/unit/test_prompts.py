"""What callers hand over as prompts, in every form that they know from elsewhere."""

import array

import numpy as np
import pytest
import torch

from ssd_ray.config import SamplingParams
from ssd_ray.engine import _pairs, _params
from ssd_ray.errors import ConfigError, PromptTooLongError, RequestError
from ssd_ray.prompts import plain, several
from tests.support.engines import checked
from tests.support.tiny import tiny_tokenizer

TOKENS = [3, 4, 5]
TEXT = "ab"


@pytest.fixture(scope="module")
def models():
    return checked(tiny_tokenizer(96), 96, 16)


@pytest.mark.parametrize(
    "prompt",
    [
        TOKENS,
        tuple(TOKENS),
        range(3, 6),
        array.array("i", TOKENS),
        np.array(TOKENS),
        np.array(TOKENS, np.uint8),
        torch.tensor(TOKENS),
        list(np.array(TOKENS)),
        list(torch.tensor(TOKENS)),
        {"prompt_token_ids": TOKENS},
        {"prompt_token_ids": np.array(TOKENS), "prompt": "as the text was"},
    ],
    ids=repr,
)
def test_token_ids(models, prompt):
    assert models.prompt(prompt) == TOKENS
    assert [models.prompt(each) for each in several(prompt)] == [TOKENS]
    assert [models.prompt(each) for each in several([prompt, TOKENS])] == [TOKENS, TOKENS]


@pytest.mark.parametrize(
    "prompt", [TEXT, np.str_(TEXT), {"prompt": TEXT}, {"prompt": TEXT, "multi_modal_data": None}], ids=repr
)
def test_texts(models, prompt):
    assert models.prompt(prompt) == models.prompt(TEXT)
    assert [models.prompt(each) for each in several(prompt)] == [models.prompt(TEXT)]


@pytest.mark.parametrize(
    "rows",
    [
        [TOKENS, TOKENS],
        np.array([TOKENS, TOKENS]),
        torch.tensor([TOKENS, TOKENS]),
        [torch.tensor(TOKENS), np.array(TOKENS)],
        (each for each in (TOKENS, TOKENS)),
        [{"prompt_token_ids": TOKENS}, TOKENS],
    ],
)
def test_rows_are_several_prompts(models, rows):
    assert [models.prompt(each) for each in several(rows)] == [TOKENS] * 2


def test_an_array_of_texts(models):
    assert [models.prompt(each) for each in several(np.array(["ab", "c"]))] == [models.prompt("ab"), models.prompt("c")]


@pytest.mark.parametrize("nothing", [[], (), np.empty(0), torch.empty(0, 4)])
def test_no_prompts(nothing):
    assert list(several(nothing)) == []


@pytest.mark.parametrize("prompts", [None, 3, 0.5, b"ab", np.int64(3), object()], ids=lambda it: type(it).__name__)
def test_what_is_neither_a_prompt_nor_several(prompts):
    with pytest.raises(RequestError, match="prompts: expected a text, token ids"):
        several(prompts)


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        3,
        True,
        b"ab",
        {},
        {"text": "x"},
        {"prompt": None},
        {"prompt": "x", "multi_modal_data": {}},
        "",
        [],
        "\ud83d",
        "a\udfff",
        {"prompt": "\ud83d"},
        [-1],
        [96],
        [2**70],
        [10**5000],
        [True],
        [1.0],
        ["a"],
        [None],
        [[1]],
        np.array([0.5]),
        np.array([True]),
        [float("nan")],
        {3},
    ],
    ids=type,
)
def test_what_is_no_prompt(models, prompt):
    with pytest.raises(RequestError, match=r"^prompt: ") as caught:
        models.prompt(prompt)
    str(caught.value).encode()


def test_a_prompt_that_is_too_long(models):
    with pytest.raises(PromptTooLongError):
        models.prompt(np.zeros(16, np.int64))


def test_a_tokenizer_that_raises_refuses_the_prompt():
    def tokenizer(text):
        raise ValueError("no such word")

    with pytest.raises(RequestError, match="prompt: the tokenizer does not take it: no such word"):
        checked(tokenizer, 9, 9).prompt("x")


def test_a_text_is_pythons_own_afterwards():
    assert type(plain(np.str_("x"))) is str


@pytest.mark.parametrize("params", [{"temperature": 0}, "x", 3, SamplingParams])
def test_what_are_no_parameters(params):
    with pytest.raises(ConfigError, match=r"^params: expected a SamplingParams"):
        _params(params, SamplingParams())
    with pytest.raises(ConfigError, match=r"^params: expected a SamplingParams"):
        list(_pairs(["x"], params, SamplingParams()))
    with pytest.raises(ConfigError, match=r"^params: expected a SamplingParams"):
        list(_pairs(["x", "y"], [SamplingParams(), params], SamplingParams()))


@pytest.mark.parametrize("params", [[SamplingParams()], [SamplingParams()] * 3])
def test_one_for_each_prompt(params):
    with pytest.raises(ConfigError, match=r"^params: expected one SamplingParams, or one for each prompt"):
        list(_pairs(["x", "y"], params, SamplingParams()))


def test_none_for_one_of_them_is_the_default():
    usual, other = SamplingParams(top_p=0.5), SamplingParams(top_k=3)
    assert [params for _, params in _pairs(["x", None], [None, other], usual)] == [usual, other]
    assert [params for _, params in _pairs(["x"], None, usual)] == [usual]
