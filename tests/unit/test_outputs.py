"""A result as it is put together from messages, however the tokens are split over them."""

from dataclasses import replace
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_ray.config import SamplingParams
from ssd_ray.errors import EngineError, RequestError
from ssd_ray.outputs import Transcript
from ssd_ray.text import Characters, Detokenizer, spelling
from ssd_ray.wire import Output, RequestStats, TokenLogprobs
from tests.support.pump import Pump, table_pair
from tests.support.tiny import tiny_tokenizer
from tests.support.tokenizers import BYTES, EMOJI, END, KEPT, PARTS, TOKENIZERS, tokens_of


def result(tokenizer, tokens, params, *, cuts=(), context=(), reason="length"):
    """What comes of tokens, up to the one that ends the text, as a target sends them: in parts, then the end."""
    target = Detokenizer(tokenizer, params, context)
    target.push(tokens)
    tokens = tokens[: target.count]
    characters = Characters(spelling(tokenizer, skip_special_tokens=params.skip_special_tokens), context)
    transcript = Transcript("x", Detokenizer(tokenizer, params, context), characters)
    bounds = sorted({0, len(tokens), *(cut % (len(tokens) + 1) for cut in cuts)})
    pieces = []
    for start, end in pairwise(bounds):
        entries = [TokenLogprobs(token, -1.0, 1, {}) for token in tokens[start:end]]
        pieces.append(transcript.push(Output(1, tokens[start:end], logprobs=entries)))
    pieces.append(transcript.push(Output(1, [], reason, RequestStats(tokens=len(tokens)))))
    assert "".join(pieces) == transcript.output.text
    return transcript.output


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=40)
@given(data=st.data())
def test_pieces_joined_are_the_text(kind, data):
    tokenizer = TOKENIZERS[kind]
    some = st.lists(st.integers(0, len(tokenizer) - 1), max_size=20)
    params = SamplingParams(
        stop=data.draw(st.lists(st.sampled_from(["a", " ", "c", "<end>", "s", "😀"]), max_size=2)),
        stop_token_ids=data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=2)),
        skip_special_tokens=data.draw(st.booleans()),
        include_stop_str_in_output=data.draw(st.booleans()),
    )
    cuts = data.draw(st.lists(st.integers(0, 50), max_size=5))
    output = result(tokenizer, data.draw(some), params, cuts=cuts, context=data.draw(some))
    assert "".join(output.pieces) == output.text
    assert len(output.pieces) == len(output.token_ids) == len(output.logprobs)


def test_the_pieces_of_a_text_that_a_stop_string_cut():
    output = result(BYTES, tokens_of(BYTES, "abcdef"), SamplingParams(stop="cd"))
    assert (output.text, output.pieces) == ("ab", ["a", "b", "", ""])
    output = result(PARTS, [*tokens_of(PARTS, "x"), 256, *tokens_of(PARTS, EMOJI)], SamplingParams(stop="he"))
    assert (output.text, output.pieces) == ("x t", ["x", " t"])


def test_a_character_comes_with_its_last_token():
    output = result(KEPT, [1, *tokens_of(KEPT, EMOJI[:2])], SamplingParams())
    assert output.pieces == [" a", "", "\N{REPLACEMENT CHARACTER}" * 2]
    assert result(BYTES, [*tokens_of(BYTES, EMOJI), END], SamplingParams()).pieces == ["", "", "", "😀", ""]


def test_without_log_probabilities_there_are_no_pieces():
    transcript = Transcript("x", Detokenizer(BYTES, SamplingParams()))
    transcript.push(Output(1, [], "length", RequestStats()))
    assert (transcript.output.pieces, transcript.output.logprobs) == (None, None)


def test_what_cannot_be_put_together():
    with pytest.raises(RequestError, match="no such row"):
        Transcript("x", Detokenizer(BYTES, SamplingParams())).push(Output(1, [], "error", error="no such row"))
    with pytest.raises(EngineError, match="3 tokens were generated, 1 arrived"):
        Transcript("x", Detokenizer(BYTES, SamplingParams())).push(Output(1, [5], "length", RequestStats(tokens=3)))


@pytest.mark.parametrize("lookahead", [0, 5])
def test_target_and_driver_agree_where_a_text_ends(lookahead):
    """At a stop string that names a special token, and at an end token, whatever the round it comes in."""
    tokenizer, prompt = tiny_tokenizer(32), [1, 2, 3, 4, 5, 3, 3]
    ended = 0
    for seed in range(3):
        plain = SamplingParams(seed=seed, max_tokens=40)
        free = Pump(*table_pair(0.9, 1), lookahead=lookahead).run(prompt, plain).tokens
        count = free.index(0) + 1 if 0 in free else len(free)
        for ending, include in product(({"stop": ("<|end|>",)}, {"stop_token_ids": (0,)}), (False, True)):
            params = replace(plain, include_stop_str_in_output=include, **ending)
            text = Pump(*table_pair(0.9, 1), lookahead=lookahead, tokenizer=tokenizer).run(prompt, params)
            detokenizer = Detokenizer(tokenizer, params, prompt)
            shown = detokenizer.push(text.tokens) + detokenizer.finish()
            assert text.tokens == free[:count]
            assert detokenizer.count == count
            assert shown == tokenizer.decode(free[: count - (0 in free)])
            ended += text.finish_reason == "stop"
    assert ended > 2
