"""Tokens to text: a function of the tokens, whole characters, stop strings never show, at a cost that is constant."""

from itertools import groupby, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from ssd_ray.config import SamplingParams
from ssd_ray.text import BYTE_LEVEL, REPLACEMENT, Characters, Detokenizer, spelling
from tests.support.tokenizers import BYTES, EMOJI, END, KEPT, PARTS, TOKENIZERS, WORDS, tokens_of


def encode(text):
    return BYTES.encode(text, add_special_tokens=False)


def detokenizer_of(tokenizer, stop=(), context=(), **params):
    return Detokenizer(tokenizer, SamplingParams(stop=tuple(stop), **params), context)


def decoded(tokenizer, tokens, skip=True):
    return tokenizer.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def pieces_of(detokenizer, tokens, cuts=()):
    """Push the tokens in parts that end at ``cuts``; all pieces, the last one from finish()."""
    bounds = sorted({0, len(tokens), *(cut % (len(tokens) + 1) for cut in cuts)})
    return [*(detokenizer.push(tokens[start:end]) for start, end in pairwise(bounds)), detokenizer.finish()]


cuts = st.lists(st.integers(0, 1000), max_size=30)


def tokens_for(tokenizer):
    """Any tokens, and characters in their bytes, whole and not."""
    some = [st.lists(st.integers(0, len(tokenizer) - 1), max_size=4)]
    if tokenizer in (BYTES, PARTS, WORDS, KEPT):
        parts = [tokens_of(tokenizer, EMOJI[:count]) for count in range(1, 5)]
        some += [st.sampled_from(parts), st.text(max_size=3).map(lambda text: tokens_of(tokenizer, text))]
    return st.lists(st.one_of(some), max_size=8).map(lambda lists: [token for part in lists for token in part])


def consistent(tokenizer, tokens):
    """Whether a decoding of tokens only grows with them. Byte fallback takes characters back: it replaces all bytes
    that follow one another as soon as one of them is no character."""
    if tokenizer not in (WORDS, KEPT):
        return True
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    names = tokenizer.convert_ids_to_tokens([token for token in tokens if token not in special])
    for in_bytes, run in groupby(names, lambda name: name.startswith("<0x")):
        text = bytes.fromhex("".join(name[3:5] for name in run)).decode(errors="replace") if in_bytes else ""
        if REPLACEMENT in text and set(text) != {REPLACEMENT}:
            return False
    return True


def continuation(tokenizer, prompt, tokens):
    """The decoding of all without that of the prompt, as far as that is the same."""
    before, both = decoded(tokenizer, prompt), decoded(tokenizer, [*prompt, *tokens])
    return both[next((i for i, (a, b) in enumerate(zip(before, both, strict=False)) if a != b), len(before)) :]


def test_bytes_around_a_token_that_is_skipped_follow_one_another():
    assert not consistent(WORDS, WORDS.convert_tokens_to_ids(["<0x00>", "<end>", "<0xF0>"]))


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data())
def test_a_text_is_the_decoding_of_all_without_that_of_the_prompt(kind, data):
    """However it is cut, and wherever the prompt ends: within a character, too."""
    tokenizer = TOKENIZERS[kind]
    every = data.draw(tokens_for(tokenizer))
    end = data.draw(st.integers(0, len(every)))
    prompt, tokens = every[:end], every[end:]
    text = "".join(pieces_of(detokenizer_of(tokenizer, context=prompt), tokens))
    for parts in (range(len(tokens)), data.draw(cuts)):
        assert "".join(pieces_of(detokenizer_of(tokenizer, context=prompt), tokens, parts)) == text
    if consistent(tokenizer, every) and consistent(tokenizer, prompt):
        assert text == continuation(tokenizer, prompt, tokens)


@pytest.mark.parametrize("tokenizer", [BYTES, PARTS, WORDS, KEPT])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_character_that_the_prompt_begins_appears(tokenizer, count):
    prompt, rest = tokens_of(tokenizer, "a😀"[:1].encode() + EMOJI[:count]), tokens_of(tokenizer, EMOJI[count:])
    tokens = [*rest, *tokens_of(tokenizer, " the world.")]
    for parts in ([], range(len(tokens)), [2], [3]):
        pieces = pieces_of(detokenizer_of(tokenizer, context=prompt), tokens, parts)
        assert "".join(pieces) == "😀 the world."


@pytest.mark.parametrize("tokenizer", [WORDS, KEPT])
def test_words_follow_the_character_that_the_prompt_begins(tokenizer):
    prompt, tokens = [1, *tokens_of(tokenizer, EMOJI[:3])], [*tokens_of(tokenizer, EMOJI[3:]), 1, 2, 3]
    for parts in ([], range(4), [1], [2]):
        assert "".join(pieces_of(detokenizer_of(tokenizer, context=prompt), tokens, parts)) == "😀 a bc"


@pytest.mark.parametrize("tokenizer", [BYTES, PARTS, WORDS, KEPT])
def test_what_the_text_does_not_complete_is_the_prompts(tokenizer):
    prompt = tokens_of(tokenizer, b"a" + EMOJI[:2])
    assert pieces_of(detokenizer_of(tokenizer, context=prompt), tokens_of(tokenizer, "bc")) == ["bc", ""]
    assert pieces_of(detokenizer_of(tokenizer, context=prompt), []) == [""]


def test_a_text_continues_the_last_word_before_special_tokens():
    """However many of them there are."""
    end = len(WORDS) - 1
    assert detokenizer_of(WORDS, context=[1, *[end] * 50]).push([2]) == " b"


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60)
@given(data=st.data())
def test_nothing_depends_on_the_cuts(kind, data):
    """Whatever ends the text and whatever of that is shown."""
    tokenizer = TOKENIZERS[kind]
    prompt, tokens = data.draw(tokens_for(tokenizer)), data.draw(tokens_for(tokenizer))
    params = SamplingParams(
        stop=data.draw(st.lists(st.sampled_from(["<end>", "a", " ", "c<end>", "<end>.", "s", "😀", "<"]), max_size=3)),
        stop_token_ids=data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=2)),
        min_tokens=data.draw(st.integers(0, 3)),
        skip_special_tokens=data.draw(st.booleans()),
        include_stop_str_in_output=data.draw(st.booleans()),
    )
    found = []
    for parts in ([], range(len(tokens)), data.draw(cuts)):
        detokenizer = Detokenizer(tokenizer, params, prompt)
        found.append(("".join(pieces_of(detokenizer, tokens, parts)), detokenizer.count, detokenizer.stopped))
    assert found[0] == found[1] == found[2]
    found[0][0].encode()  # no marks in it


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.decoded = 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def decode(self, tokens, **options):
        self.decoded += len(tokens)
        return self._tokenizer.decode(tokens, **options)


@pytest.mark.parametrize("tokenizer", [BYTES, PARTS, WORDS, KEPT])
@pytest.mark.parametrize("stop", [(), ("zzz",)])
@pytest.mark.parametrize("data", [b"\x80", b"\xf0\x9f", b"\xe2", "😀é ".encode()])
def test_a_token_costs_the_same_at_any_length_and_nothing_is_held_back(tokenizer, stop, data):
    counting = Counting(tokenizer)
    detokenizer = detokenizer_of(counting, stop, context=tokens_of(tokenizer, "a"))
    written = sum(len(detokenizer.push(tokens_of(tokenizer, data))) for _ in range(10))
    first = counting.decoded
    for _ in range(1000):
        text = detokenizer.push(tokens_of(tokenizer, data))
        assert text
        written += len(text)
    assert counting.decoded == first < 100  # tokens and pairs of them are decoded once
    assert written + len(detokenizer.finish()) >= 1010


@given(st.lists(st.integers(0, 262), min_size=1, max_size=300))
def test_a_token_that_is_new_costs_a_few_decoded_ones(tokens):
    counting = Counting(WORDS)
    detokenizer = detokenizer_of(counting, ["zzz"])
    before = counting.decoded
    for token in tokens:
        detokenizer.push([token])
        assert counting.decoded - before <= 6
        before = counting.decoded


def test_the_bytes_of_byte_level_tokens():
    assert set(BYTE_LEVEL) == set(pre_tokenizers.ByteLevel.alphabet())
    known = spelling(PARTS)
    assert sorted(known.data(token) for token in range(256)) == [bytes([byte]) for byte in range(256)]
    assert known.data(PARTS.convert_tokens_to_ids("ðŁĺĢ")) == EMOJI


@pytest.mark.parametrize("tokenizer", [WORDS, KEPT])
def test_the_bytes_of_tokens_within_a_text(tokenizer):
    known = spelling(tokenizer)
    assert [known.data(token) for token in (1, 3, 261, 263)] == [b" a", b"c", b" ", " é".encode()]
    assert [known.data(5 + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]


def test_the_names_of_tokens():
    known = spelling(PARTS)
    assert known.name(encode("a")[0]) == "a"
    assert known.name(PARTS.convert_tokens_to_ids("ðŁ")) == "bytes:\\xf0\\x9f"
    assert known.name(len(PARTS) - 1) == "<end>"
    assert known.name(10_000) == "token_id:10000"


@given(st.lists(st.integers(0, 264), max_size=40))
def test_the_bytes_of_tokens_make_up_the_text(tokens):
    characters, known = Characters(spelling(KEPT)), spelling(KEPT)
    text = "".join(map(characters.push, tokens)) + characters.finish()
    assert text.replace(REPLACEMENT, "") == b"".join(map(known.data, tokens)).decode(errors="ignore")


@given(st.lists(st.integers(0, END), max_size=60), cuts)
def test_pieces_make_up_the_decoding_of_any_tokens(tokens, cuts):
    detokenizer = detokenizer_of(BYTES)
    assert "".join(pieces_of(detokenizer, tokens, cuts)) == BYTES.decode(tokens, skip_special_tokens=True)
    assert detokenizer.count == len(tokens)


@given(st.text(max_size=40).filter(lambda text: REPLACEMENT not in text))
def test_a_character_is_never_split(text):
    tokens = encode(text)
    pieces = pieces_of(detokenizer_of(BYTES), tokens, range(len(tokens)))
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte():
    detokenizer = detokenizer_of(BYTES)
    assert [detokenizer.push([token]) for token in encode("a€b")] == ["a", "", "", "€", "b"]


def test_bytes_that_never_become_a_character_come_at_the_end():
    detokenizer = detokenizer_of(BYTES)
    assert detokenizer.push(encode("a€")[:-1]) == "a"
    assert detokenizer.finish() == REPLACEMENT


def test_special_tokens_are_no_text():
    tokens = [*encode("a"), END, END, *encode("b"), END]
    assert pieces_of(detokenizer_of(BYTES), tokens, range(6)) == ["a", "", "", "b", "", ""]


def test_a_text_continues_its_prompt():
    """Without the prompt before it, this tokenizer swallows the space of the first word."""
    assert detokenizer_of(WORDS).push([1, 2]) == "a b"
    assert detokenizer_of(WORDS, context=[1, 3]).push([1, 2]) == " a b"


def test_byte_fallback_characters_stay_whole():
    euro = [5 + byte for byte in "€".encode()]
    detokenizer = detokenizer_of(WORDS, context=[1])
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
    detokenizer = detokenizer_of(BYTES, stops)
    expected, count = cut_text(text, stops)
    assert "".join(pieces_of(detokenizer, encode(text), cuts)) == expected
    assert detokenizer.stopped == any(stop in text for stop in stops)
    assert detokenizer.count == count


@given(st.text("ab", max_size=20), st.text("ab", min_size=1, max_size=4))
def test_no_piece_has_to_be_taken_back(text, stop):
    detokenizer = detokenizer_of(BYTES, [stop])
    expected, _ = cut_text(text, [stop])
    shown = ""
    for token in encode(text):
        shown += detokenizer.push([token])
        assert expected.startswith(shown)


def test_the_beginning_of_a_stop_string_is_held_back_and_let_go():
    detokenizer = detokenizer_of(BYTES, ["\n\n", "END"])
    assert [detokenizer.push(encode(part)) for part in ("x\n", "y", "E", "N", "E")] == ["x", "\ny", "", "", "EN"]
    assert detokenizer.finish() == "E"
    assert not detokenizer.stopped


@given(st.lists(st.integers(1, 4), max_size=20), st.lists(st.text(" abc.", min_size=1, max_size=4), max_size=3), cuts)
def test_stop_strings_cut_the_text_also_inside_of_tokens(tokens, stops, cuts):
    """Where tokens have several characters, all that the token adds which completes a stop string is looked at."""
    texts = [WORDS.decode([1, *tokens[:count]])[1:] for count in range(len(tokens) + 1)]
    count = next((count for count, text in enumerate(texts) if any(stop in text for stop in stops)), len(tokens))
    end = min((at for stop in stops if (at := texts[count].find(stop)) >= 0), default=len(texts[count]))
    detokenizer = detokenizer_of(WORDS, stops, [1])
    assert "".join(pieces_of(detokenizer, tokens, cuts)) == texts[count][:end]
    assert detokenizer.count == count


@given(st.text("ab", max_size=20), st.text("ab", min_size=1, max_size=3), st.integers(0, 10), cuts)
def test_the_first_tokens_stop_nothing(text, stop, least, cuts):
    detokenizer = detokenizer_of(BYTES, [stop], min_tokens=least)
    expected, count = cut_text(text[least:], [stop])
    assert "".join(pieces_of(detokenizer, encode(text), cuts)) == text[:least] + expected
    assert detokenizer.count == min(least, len(text)) + count


def test_nothing_follows_a_stop_string():
    detokenizer = detokenizer_of(BYTES, ["b"])
    assert detokenizer.push(encode("abab")) == "a"
    assert (detokenizer.stopped, detokenizer.count) == (True, 2)
    assert detokenizer.push(encode("c")) == ""
    assert detokenizer.finish() == ""
    assert detokenizer.count == 2


@pytest.mark.parametrize("tokens", [[], [END]])
def test_an_empty_text(tokens):
    assert pieces_of(detokenizer_of(BYTES, ["x"]), tokens) == [""] * (1 + bool(tokens))


class TestSpecialTokens:
    TOKENS = (*encode("ab"), END, *encode("cd"))

    def test_a_stop_string_may_name_one(self):
        for parts in ([], range(5)):
            detokenizer = detokenizer_of(BYTES, ["<end>"])
            assert "".join(pieces_of(detokenizer, self.TOKENS, parts)) == "ab"
            assert (detokenizer.stopped, detokenizer.count) == (True, 3)

    @pytest.mark.parametrize(
        ("stop", "text", "count"),
        [("b<end>", "a", 3), ("b<end>c", "a", 4), ("<end>d", "abcd", 5), ("<end", "abcd", 5), ("bc", "a", 4)],
    )
    def test_a_stop_string_may_name_one_with_what_stands_beside_it(self, stop, text, count):
        detokenizer = detokenizer_of(BYTES, [stop])
        assert "".join(pieces_of(detokenizer, self.TOKENS)) == text
        assert detokenizer.count == count

    def test_the_letters_of_its_name_are_as_good(self):
        assert "".join(pieces_of(detokenizer_of(BYTES, ["<end>"]), encode("ab<end>cd"))) == "ab"

    def test_two_stop_strings(self):
        assert "".join(pieces_of(detokenizer_of(BYTES, ["d", "<end>"]), self.TOKENS)) == "ab"

    def test_they_are_shown_where_that_is_wanted(self):
        tokens, shown = self.TOKENS, {"skip_special_tokens": False}
        assert "".join(pieces_of(detokenizer_of(BYTES, **shown), tokens, range(5))) == "ab<end>cd"
        assert "".join(pieces_of(detokenizer_of(BYTES, ["<end>"], **shown), tokens)) == "ab"
        both = detokenizer_of(BYTES, ["<end>"], include_stop_str_in_output=True, **shown)
        assert "".join(pieces_of(both, tokens)) == "ab<end>"

    def test_a_hidden_one_is_not_shown_with_the_stop_string_either(self):
        detokenizer = detokenizer_of(BYTES, ["b<end>c"], include_stop_str_in_output=True)
        assert "".join(pieces_of(detokenizer, self.TOKENS)) == "abc"


class TestWhatEndsAText:
    def test_a_stop_string_is_shown_where_that_is_wanted(self):
        for parts in ([], range(6)):
            detokenizer = detokenizer_of(BYTES, ["cd"], include_stop_str_in_output=True)
            assert "".join(pieces_of(detokenizer, encode("abcdef"), parts)) == "abcd"
            assert detokenizer.count == 4

    @pytest.mark.parametrize(("shown", "text"), [(False, "ab"), (True, "abc")])
    def test_so_is_a_stop_token(self, shown, text):
        tokens = encode("abcdc")
        for parts in ([], range(5)):
            detokenizer = detokenizer_of(BYTES, stop_token_ids=[tokens[2]], include_stop_str_in_output=shown)
            assert "".join(pieces_of(detokenizer, tokens, parts)) == text
            assert (detokenizer.stopped, detokenizer.count) == (True, 3)

    def test_what_was_held_back_comes_before_a_stop_token(self):
        tokens = [*encode("ab"), *encode("€")[:2], *encode("x")]
        detokenizer = detokenizer_of(BYTES, ["bc", REPLACEMENT * 2], stop_token_ids=[tokens[-1]])
        assert "".join(pieces_of(detokenizer, tokens)) == "ab" + REPLACEMENT

    def test_special_tokens_end_a_text_as_others_do(self):
        for params, text in (({}, "ab"), ({"include_stop_str_in_output": True}, "ab<end>")):
            detokenizer = detokenizer_of(BYTES, stop_token_ids=[END], skip_special_tokens=False, **params)
            assert "".join(pieces_of(detokenizer, TestSpecialTokens.TOKENS)) == text
