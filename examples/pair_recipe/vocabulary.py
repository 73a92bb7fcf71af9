"""Stage 2, the vocabulary: one byte-level BPE for both models, and the corpus as one array of token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pair_recipe.corpus import Source

END_OF_TEXT = "<|endoftext|>"

# Line breaks travel with the indentation that follows them, words with one leading mark (" name", "_name", ".name").
PIECES = (
    r"\s*[\r\n]+[ \t]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+|[ \t]+(?!\S)|\s+"
)


def train_tokenizer(texts: list[str], folder: Path, vocab_size: int) -> None:
    """A byte-level BPE that can spell every byte, saved so that AutoTokenizer finds it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False, model_max_length=2048,
    ).save_pretrained(folder)  # fmt: skip


def pack(tokenizer: Any, sources: list[Source], seed: int) -> np.ndarray:
    """All sources in a seeded order as one array of token ids, END_OF_TEXT before each. Shape (tokens,), uint16."""
    order = np.random.default_rng(seed).permutation(len(sources))
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    encoded = tokenizer([sources[i].text for i in order])["input_ids"]
    return np.concatenate([np.array([end, *ids], dtype=np.uint16) for ids in encoded])
