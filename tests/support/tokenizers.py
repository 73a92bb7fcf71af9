"""Tokenizers of all kinds, small enough to be read: what their decoders make of tokens is the real thing."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ssd_ray.text import BYTE_LEVEL

END = 256
EMOJI = "😀".encode()


def finished(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    """With a special token as its last one."""
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def byte_level(*more: bytes) -> PreTrainedTokenizerFast:
    """One token for each byte, others for some bytes together, and a special one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    letter_of = {byte: letter for letter, byte in BYTE_LEVEL.items()}
    words = [*letters, *("".join(letter_of[byte] for byte in word) for word in more)]
    tokenizer = Tokenizer(models.BPE(vocab={word: token for token, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return finished(tokenizer)


def byte_fallback(*steps: Any) -> PreTrainedTokenizerFast:
    """As SentencePiece has it: words begin with a mark, and what is no word is written in bytes."""
    vocab = {"<unk>": 0, "▁a": 1, "▁b": 2, "c": 3, ".": 4} | {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    vocab |= {"▁": 261, "▁▁": 262, "▁é": 263}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *steps]
    )
    return finished(tokenizer, unk_token="<unk>")


def words_of(decoder: Any, *words: str, **options: Any) -> PreTrainedTokenizerFast:
    """Whole words, joined by a decoder."""
    tokenizer = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.decoder = decoder
    return finished(tokenizer, **options)


BYTES = byte_level()
PARTS = byte_level(
    b" the", b" \xf0", b"\xf0\x9f", b"\x9f\x98", b"\x98\x80", b"\x80 ", b"\x80\xf0\x9f", EMOJI, b"\xef\xbf\xbd"
)
WORDS = byte_fallback(decoders.Strip(" ", 1, 0))  # Llama 2: the first word of a text loses its space
KEPT = byte_fallback()  # Gemma
PIECES = ("hello", "##s", "##re", ",", ".", "don", "'", "t", "n", "##'t", "?", "it", "s")
TOKENIZERS = {
    "byte level": BYTES,
    "byte level, parts of characters": PARTS,
    "byte fallback": WORDS,
    "byte fallback, spaces kept": KEPT,
    "metaspace": words_of(decoders.Metaspace(), "▁a", "▁b", "c", "▁", "▁▁", "."),
    "word pieces": words_of(decoders.WordPiece(cleanup=False), *PIECES),
    "word pieces, cleaned up": words_of(decoders.WordPiece(), *PIECES, clean_up_tokenization_spaces=True),
    "ends of words": words_of(decoders.BPEDecoder(), "a</w>", "b", "c</w>", "d", ".</w>"),
}


def tokens_of(tokenizer: PreTrainedTokenizerFast, text: str | bytes) -> list[int]:
    """The tokens of a text's bytes: one each, where the tokenizer has such."""
    data = text if isinstance(text, bytes) else text.encode()
    names = {byte: letter for letter, byte in BYTE_LEVEL.items()}
    if tokenizer in (WORDS, KEPT):
        return [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in data]
    return [tokenizer.convert_tokens_to_ids(names[byte]) for byte in data]
