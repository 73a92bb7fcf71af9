"""Tokens to text: the pieces are the text, characters stay whole, stop strings never show."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ssd_ray.text import REPLACEMENT, Detokenizer

END = 256


def byte_level():
    """One token for each byte, and a special one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: token for token, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentencepiece():
    """As Llama 2 has it: words begin with a mark, and the first word of a text loses its space."""
    vocab = {"<unk>": 0, "▁a": 1, "▁b": 2, "c": 3, ".": 4} | {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


BYTES, WORDS = byte_level(), sentencepiece()


def encode(text):
    return BYTES.encode(text, add_special_tokens=False)


def pieces_of(detokenizer, tokens, cuts=()):
    """Push the tokens in parts that end at ``cuts``; all pieces, the last one from finish()."""
    bounds = sorted({0, len(tokens), *(cut % (len(tokens) + 1) for cut in cuts)})
    return [*(detokenizer.push(tokens[start:end]) for start, end in pairwise(bounds)), detokenizer.finish()]


cuts = st.lists(st.integers(0, 1000), max_size=30)


@given(st.lists(st.integers(0, END), max_size=60), cuts)
def test_pieces_make_up_the_decoding_of_any_tokens(tokens, cuts):
    detokenizer = Detokenizer(BYTES)
    assert "".join(pieces_of(detokenizer, tokens, cuts)) == BYTES.decode(tokens, skip_special_tokens=True)
    assert detokenizer.count == len(tokens)


@given(st.text(max_size=40).filter(lambda text: REPLACEMENT not in text))
def test_a_character_is_never_split(text):
    tokens = encode(text)
    pieces = pieces_of(Detokenizer(BYTES), tokens, range(len(tokens)))
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte():
    detokenizer = Detokenizer(BYTES)
    assert [detokenizer.push([token]) for token in encode("a€b")] == ["a", "", "", "€", "b"]


def test_bytes_that_never_become_a_character_come_at_the_end():
    detokenizer = Detokenizer(BYTES)
    assert detokenizer.push(encode("a€")[:-1]) == ""
    assert detokenizer.finish() == "a" + REPLACEMENT


def test_special_tokens_are_no_text():
    tokens = [*encode("a"), END, END, *encode("b"), END]
    assert pieces_of(Detokenizer(BYTES), tokens, range(6)) == ["a", "", "", "b", "", ""]


def test_a_text_continues_its_prompt():
    """Without the prompt before it, this tokenizer swallows the space of the first word."""
    assert Detokenizer(WORDS).push([1, 2]) == "a b"
    assert Detokenizer(WORDS, context=[1, 3]).push([1, 2]) == " a b"


def test_byte_fallback_characters_stay_whole():
    euro = [5 + byte for byte in "€".encode()]
    detokenizer = Detokenizer(WORDS, context=[1])
    assert [detokenizer.push([token]) for token in [2, *euro, 3]] == [" b", "", "", "€", "c"]


def cut_text(text, stops):
    """The naive rule: grow the text by characters, and cut it at the earliest stop string as soon as one is in it."""
    for end in range(len(text) + 1):
        starts = [text[:end].find(stop) for stop in stops]
        if found := [start for start in starts if start >= 0]:
            return text[: min(found)], end
    return text, len(text)


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), cuts)
def test_stop_strings_cut_the_text_wherever_tokens_end(text, stops, cuts):
    detokenizer = Detokenizer(BYTES, stops)
    expected, count = cut_text(text, stops)
    assert "".join(pieces_of(detokenizer, encode(text), cuts)) == expected
    assert detokenizer.stopped == any(stop in text for stop in stops)
    assert detokenizer.count == count


@given(st.text("ab", max_size=20), st.text("ab", min_size=1, max_size=4))
def test_no_piece_has_to_be_taken_back(text, stop):
    detokenizer = Detokenizer(BYTES, [stop])
    expected, _ = cut_text(text, [stop])
    shown = ""
    for token in encode(text):
        shown += detokenizer.push([token])
        assert expected.startswith(shown)


def test_the_beginning_of_a_stop_string_is_held_back_and_let_go():
    detokenizer = Detokenizer(BYTES, ["\n\n", "END"])
    assert [detokenizer.push(encode(part)) for part in ("x\n", "y", "E", "N", "E")] == ["x", "\ny", "", "", "EN"]
    assert detokenizer.finish() == "E"
    assert not detokenizer.stopped


@given(st.lists(st.integers(1, 4), max_size=20), st.lists(st.text(" abc.", min_size=1, max_size=4), max_size=3), cuts)
def test_stop_strings_cut_the_text_also_inside_of_tokens(tokens, stops, cuts):
    """Where tokens have several characters, all that the token adds which completes a stop string is looked at."""
    texts = [WORDS.decode([1, *tokens[:count]])[1:] for count in range(len(tokens) + 1)]
    count = next((count for count, text in enumerate(texts) if any(stop in text for stop in stops)), len(tokens))
    end = min((at for stop in stops if (at := texts[count].find(stop)) >= 0), default=len(texts[count]))
    detokenizer = Detokenizer(WORDS, stops, [1])
    assert "".join(pieces_of(detokenizer, tokens, cuts)) == texts[count][:end]
    assert detokenizer.count == count


@given(st.text("ab", max_size=20), st.text("ab", min_size=1, max_size=3), st.integers(0, 10), cuts)
def test_the_first_tokens_stop_nothing(text, stop, least, cuts):
    detokenizer = Detokenizer(BYTES, [stop], min_tokens=least)
    expected, count = cut_text(text[least:], [stop])
    assert "".join(pieces_of(detokenizer, encode(text), cuts)) == text[:least] + expected
    assert detokenizer.count == min(least, len(text)) + count


def test_nothing_follows_a_stop_string():
    detokenizer = Detokenizer(BYTES, ["b"])
    assert detokenizer.push(encode("abab")) == "a"
    assert (detokenizer.stopped, detokenizer.count) == (True, 2)
    assert detokenizer.push(encode("c")) == ""
    assert detokenizer.finish() == ""
    assert detokenizer.count == 2


@pytest.mark.parametrize("tokens", [[], [END]])
def test_an_empty_text(tokens):
    assert pieces_of(Detokenizer(BYTES, ["x"]), tokens) == [""] * (1 + bool(tokens))
