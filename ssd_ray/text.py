"""From tokens to text as they come: whole characters, and nothing of a stop string."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache, partial
from itertools import islice
from typing import Any

from ssd_ray.config import SamplingParams

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What stands in a text for bytes that are no character."""

PAIRS = 1 << 15
"""Pairs of tokens whose spelling is remembered."""

CHARACTER_BYTES = 4
"""Bytes of a character at most, so also the tokens that a character may be spread over."""

MARKS = range(0xD800, 0xE000)
"""Code points that no text has: they stand for special tokens where stop strings are looked for."""

_PRINTED = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = sorted({*range(0x100)} - {*_PRINTED})

BYTE_LEVEL = {chr(byte): byte for byte in _PRINTED} | {chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}
"""The byte that a character stands for in the token strings of byte-level tokenizers."""

METASPACE = "\u2581"
"""How sentencepiece writes a space."""

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


def _replace_each(error: UnicodeError) -> tuple[str, int]:
    """Replace every byte, as tokenizers with byte fallback do; others replace what could begin a character as one."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error("ssd_ray.replace_each", _replace_each)


def written(tokenizer: Any) -> dict[int, tuple[bool, bytes]]:
    """What each token of a tokenizer is: whether it is a special one, and the bytes that it writes within a text, or
    its name if it is special. By the names of tokens alone, so for all of a vocabulary at once."""
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    by_bytes = _is_byte_level(tokenizer)
    found = {}
    for name, token in tokenizer.get_vocab().items():
        if token in special:
            found[token] = True, name.encode()
        elif match := _BYTE_TOKEN.fullmatch(name):
            found[token] = False, bytes.fromhex(match[1])
        elif by_bytes and all(character in BYTE_LEVEL for character in name):
            found[token] = False, bytes(BYTE_LEVEL[character] for character in name)
        else:
            found[token] = False, name.replace(METASPACE, " ").encode(errors="replace")
    return found


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether letters stand for bytes: most of these letters are tokens then, and spaces have no mark of their own."""
    names = tokenizer.get_vocab()
    return 2 * sum(letter in names for letter in BYTE_LEVEL) > len(BYTE_LEVEL) and METASPACE not in names


class Spelling:
    """What single tokens write, in bytes of UTF-8. It is the same in all texts, so it is remembered.

    A token may be a part of a character, and many tokenizers write one differently after another one: with a space
    between them, for instance. So what a token writes is taken to depend on the last token that wrote something, too,
    and on nothing else. Where a tokenizer also cleans up spaces of a whole text, that is left out: it takes back what
    has been given out.

    Args:
        tokenizer: a Hugging Face tokenizer.
        skip_special_tokens: special tokens write nothing.

    Attributes:
        errors: how bytes that are no character are replaced, as the codecs of Python name it.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._decode = partial(
            tokenizer.decode, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        self.writes = lru_cache(None)(self._writes)
        self.after = lru_cache(PAIRS)(self._after)
        self._alone = lru_cache(PAIRS)(lambda token: str(self._decode([token])))
        self._part = lru_cache(PAIRS)(self._read_part)
        self.errors = "ssd_ray.replace_each" if self._falls_back_to_bytes() else "replace"

    def _falls_back_to_bytes(self) -> bool:
        parts = self._tokenizer.convert_tokens_to_ids(["<0xE2>", "<0x82>"])
        return None not in parts and self._decode(parts) == 2 * REPLACEMENT

    def _writes(self, token: int) -> bool:
        """Whether a token is text at all. Alone it may be a space that is dropped at the beginning of a text."""
        return bool(self._decode([token, token]))

    def _after(self, previous: int | None, token: int) -> bytes:
        """What a token writes that follows another one; None is the beginning of a text."""
        alone, part = self._alone(token), self._part(token)
        if previous is None and REPLACEMENT not in alone:
            return alone.encode()
        if previous is None or part is not None:
            return part or alone.encode()
        before, both = self._alone(previous), str(self._decode([previous, token]))
        return both[_shared(before, both) :].encode()

    def _read_part(self, token: int) -> bytes | None:
        """The bytes of a token that may be a part of a character; None if it is text of its own."""
        alone, name = self._alone(token), str(self._tokenizer.convert_ids_to_tokens(token) or "")
        if (match := _BYTE_TOKEN.fullmatch(name)) and alone != name:
            return bytes.fromhex(match[1])
        if REPLACEMENT in alone and all(character in BYTE_LEVEL for character in name):
            return bytes(BYTE_LEVEL[character] for character in name)
        return None

    def data(self, token: int) -> bytes:
        """What a token writes within a text."""
        return self.after(token, token) if self.writes(token) else b""

    def name(self, token: int) -> str:
        """A token as a word to a reader: what it writes; bytes that are no text as ``bytes:\\xf0\\x9f``, and the
        token's own name if it writes nothing."""
        if not self.writes(token):
            return str(self._tokenizer.convert_ids_to_tokens(token) or f"token_id:{token}")
        data = self.data(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def hidden(self, text: str) -> list[tuple[int, str]]:
        """Special tokens that write nothing and whose names are in a text, with their names, the longest first."""
        return [(token, name) for token, name in self._special if name in text and not self.writes(token)]

    @cached_property
    def _special(self) -> list[tuple[int, str]]:
        names = dict(zip(self._tokenizer.all_special_ids, self._tokenizer.all_special_tokens, strict=False))
        with suppress(NotImplementedError):  # some tokenizers have no list of added tokens
            added = self._tokenizer.added_tokens_decoder
            names |= {token: str(each) for token, each in added.items() if each.special}
        return sorted(names.items(), key=lambda item: -len(item[1]))


def _shared(one: str, other: str) -> int:
    """Length of the common beginning of two strings."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, pair in pairs if pair[0] != pair[1]), min(len(one), len(other)))


@lru_cache(16)
def spelling(tokenizer: Any, *, skip_special_tokens: bool = True) -> Spelling:
    """The spelling of a tokenizer, one for all texts."""
    return Spelling(tokenizer, skip_special_tokens=skip_special_tokens)


class Characters:
    """Turns the tokens of one text into whole characters, token by token.

    What comes of a text is a function of its tokens and of the prompt: the decoding of both without that of the prompt.
    At most the bytes of one character are held back. A character that the prompt begins belongs to the text, if the
    text completes it.

    Args:
        spelling: what tokens write.
        context: the tokens before the text.
    """

    def __init__(self, spelling: Spelling, context: Sequence[int] = ()) -> None:
        self._spelling = spelling
        self._utf8 = codecs.getincrementaldecoder("utf-8")(spelling.errors)
        self._previous: int | None = None
        self._given = ""
        written = (int(token) for token in reversed(context) if spelling.writes(int(token)))
        for token in reversed(list(islice(written, CHARACTER_BYTES))):
            self.push(token)
        # Bytes that are no character unless the text completes them: the prompt's decoding has them already.
        self._given = self._utf8.getstate()[0].decode("utf-8", spelling.errors)

    def push(self, token: int) -> str:
        """Take a token; return the characters that it completes."""
        if not self._spelling.writes(token):
            return ""
        data = self._spelling.after(self._previous, token)
        self._previous = token
        return self._fresh(self._utf8.decode(data))

    def finish(self) -> str:
        """Return what was held back; no more tokens may come."""
        return self._fresh(self._utf8.decode(b"", final=True))

    def _fresh(self, text: str) -> str:
        if text and self._given:
            text, self._given = text.removeprefix(self._given), ""
        return text


class Detokenizer:
    """Turns the tokens of one text into pieces of it. Target and driver use it alike, so they agree where a text ends.

    The pieces, :meth:`finish` included, make up the text of the tokens, cut at the first stop string or token. How the
    tokens are split over :meth:`push` changes neither the text nor where it stops.

    Stop strings may name special tokens, also where these are no part of the text.

    Args:
        tokenizer: a Hugging Face tokenizer.
        params: what ends the text, and whether it and special tokens are shown. ``stop_token_ids`` are all tokens that
            end it. The first ``min_tokens`` tokens are no part of a stop string.
        context: the tokens before the text.

    Attributes:
        stopped: what ends the text has come; further tokens are ignored.
        count: tokens that belong to the text: all so far, or those up to the one that ended it.
    """

    def __init__(self, tokenizer: Any, params: SamplingParams, context: Sequence[int] = ()) -> None:
        self.stopped = False
        self.count = 0
        self._params = params
        known = spelling(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._characters = Characters(known, context)
        self._ends = frozenset(params.stop_token_ids)
        self._marks: dict[int, str] = {}
        self._stop = list(params.stop)
        if self._stop:
            self._mark(known)
        self._unmarked = dict.fromkeys(map(ord, self._marks.values()))
        self._held = ""

    def _mark(self, known: Spelling) -> None:
        """Let the special tokens that stop strings name, and that write nothing, stand in the text as marks."""
        marked = self._stop
        for (token, name), mark in zip(known.hidden("\0".join(self._stop)), map(chr, MARKS), strict=False):
            self._marks[token] = mark
            marked = [stop.replace(name, mark) for stop in marked]
        self._stop = [*dict.fromkeys([*self._stop, *marked])]

    def push(self, tokens: Iterable[int]) -> str:
        """Take tokens; return the text that is certain now."""
        pieces = []
        for token in tokens:
            if self.stopped:
                break
            self.count += 1
            ends = token in self._ends
            piece = self._written(token, ends=ends) + (self._characters.finish() if ends else "")
            pieces.append(self._cut(piece, last=ends))
            self.stopped |= ends
        return "".join(pieces)

    def finish(self) -> str:
        """Return the text that was held back; no more tokens may come."""
        return "" if self.stopped else self._cut(self._characters.finish(), last=True)

    def _written(self, token: int, *, ends: bool) -> str:
        if token in self._marks:
            return self._marks[token]
        return "" if ends and not self._params.include_stop_str_in_output else self._characters.push(token)

    def _cut(self, piece: str, *, last: bool = False) -> str:
        """Hold back what may be the beginning of a stop string, drop what follows one."""
        if not self._stop or self.count <= self._params.min_tokens:
            return piece.translate(self._unmarked)
        self._held += piece
        found = [(start, start + len(stop)) for stop in self._stop if (start := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            end = min(found)[self._params.include_stop_str_in_output]
        else:
            end = len(self._held) - (0 if last else self._begun())
        certain, self._held = self._held[:end], "" if found else self._held[end:]
        return certain.translate(self._unmarked)

    def _begun(self) -> int:
        """Length of the longest beginning of a stop string at the end of the held text."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        lengths = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._held[-n:]) for stop in self._stop)), 0)
