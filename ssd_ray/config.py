"""Configuration: small frozen dataclasses that validate themselves.

Validation looks at the value alone and raises :class:`~ssd_ray.errors.ConfigError`, so that bad input is refused before
anything is started. Folders become absolute, since who reads them may stand elsewhere; models are looked at by the
loader.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from math import isfinite
from os import PathLike, fspath
from os.path import expanduser
from pathlib import Path
from typing import Any, Literal, get_args

from ssd_ray.errors import ConfigError

Method = Literal["ssd", "sd", "ar"]
FanOut = Literal["auto", "uniform", "geometric", "histogram", "confidence"]
Backup = Literal["auto", "draft", "ngram", "none"]
Sampler = Literal["coupled", "rejection"]
Transport = Literal["auto", "zmq", "ray"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
ModelPath = str | PathLike[str] | None
"""A folder, a hub id or None; see :class:`EngineConfig`."""

MAX_LOOKAHEAD = 7
"""Largest lookahead: a verification has one fixed shape of 8 tokens, the bonus token and 7 guesses."""

TEXT_DRAFT = "ngram"
"""In place of a draft model: the text itself, by what followed the same tokens earlier in it."""

SEED_MASK = (1 << 63) - 1

MAX_LOGPROBS = 20
MAX_TEXTS = 1024


def _require(ok: bool, name: str, expected: str, value: object) -> None:
    if not ok:
        raise ConfigError(name, expected, value)


def _integer(name: str, value: object, low: int, high: int) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    _require(ok, name, f"an integer from {low} to {high}", value)


def _real(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) and low <= value <= high
    bounds = f"a number {'above' if open_low else 'from'} {low:g} {'up ' if open_low else ''}to {high:g}"
    _require(ok and not (open_low and value == low), name, bounds, value)


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    """Pairs of a token id and its bias, sorted, from such pairs or from a mapping; JSON has its keys as strings."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    ok = isinstance(pairs, list | tuple) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs)
    _require(ok, "logit_bias", "a dict from token ids to numbers", value)
    for token, bias in pairs:
        number = int(token) if isinstance(token, str) and token.isdecimal() else token
        _integer("logit_bias", number, 0, 2**31 - 1)
        _real("logit_bias", bias, -100.0, 100.0)
    return tuple(sorted({int(token): float(bias) for token, bias in pairs}.items()))


def _bad_words(value: Any) -> tuple[str, ...]:
    """Words, from a list of them, one alone, or None."""
    words = (value,) if isinstance(value, str) else () if value is None else value
    ok = isinstance(words, list | tuple) and all(isinstance(word, str) and word and _is_text(word) for word in words)
    _require(ok, "bad_words", "a list of non-empty strings", value)
    return tuple(words)


def _is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: a lone surrogate cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _bad_words_ids(value: Any) -> tuple[tuple[int, ...], ...]:
    """Sequences of token ids, from lists of them or None."""
    words = () if value is None else value
    ok = isinstance(words, list | tuple) and all(isinstance(word, list | tuple) and word for word in words)
    _require(ok, "bad_words_ids", "a list of non-empty lists of token ids", value)
    for word in words:
        for token in word:
            _integer("bad_words_ids", token, 0, 2**31 - 1)
    return tuple(map(tuple, words))


def _model(name: str, value: Any) -> str | None:
    """A model's folder, absolute, or its hub id."""
    path: str | None = fspath(value) if isinstance(value, PathLike) else value
    _require(path is None or (isinstance(path, str) and path != ""), name, "a folder, a hub id or None", value)
    if path is None or value == TEXT_DRAFT:
        return path
    folder = Path(expanduser(path))
    return str(folder.absolute()) if isinstance(value, PathLike) or folder.is_dir() else str(path)


def _choice(name: str, value: object, literal: Any) -> None:
    options = get_args(literal)
    _require(value in options, name, "one of " + ", ".join(map(repr, options)), value)


def check_timeout(timeout: object) -> None:
    """Refuse what is no time limit: a number of seconds above 0, or None for none."""
    if timeout is not None:
        _real("timeout", timeout, 0.0, 1e9, open_low=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end.

    Attributes:
        temperature: 0 is greedy decoding; above 0 logits are divided by it.
        repetition_penalty: logits of tokens that the prompt or the text has are divided by it if positive, else
            multiplied; 1 changes nothing.
        presence_penalty: taken from the logits of tokens that the text has; -2 to 2.
        frequency_penalty: taken from the logit of a token once for each time that the text has it; -2 to 2.
        logit_bias: added to the logits of single tokens before the penalties: a dict from token ids to numbers from
            -100 to 100, kept as sorted pairs.
        top_p: keep the smallest set of tokens whose probability reaches it.
        top_k: keep the k likeliest tokens; 0 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest.
        max_tokens: tokens to generate at most.
        min_tokens: tokens before which neither a token nor a string ends the text: tokens that would are not chosen.
        stop: strings that end the text; the text ends before the earliest of them. They may name special tokens.
        stop_token_ids: tokens that end the text, beside the model's end-of-sequence tokens; they are no part of it.
        include_stop_str_in_output: the string or token that ends the text is a part of it.
        skip_special_tokens: special tokens are no part of the text.
        bad_words: strings that are not generated, at the beginning of a word or of the text: the last token of each is
            barred where the text has the tokens before it. An engine makes ``bad_words_ids`` of them.
        bad_words_ids: the same as sequences of token ids.
        seed: names the noise. Equal seeds give equal texts, whatever drafts do; 0 to 2**63 - 1.
        ignore_eos: go on after an end-of-sequence token.
        logprobs: give the log-probability of each token of the text and of the so many likeliest, up to 20, as the
            target has them before penalties and temperature.
        n: texts of one prompt. Text i has ``seed + i``, so the first is that of n = 1; greedy ones are all the same.
    """

    temperature: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 128
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    bad_words: tuple[str, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    seed: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        _real("temperature", self.temperature, 0.0, 100.0)
        _real("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _real("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        _real("min_p", self.min_p, 0.0, 1.0)
        _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        _integer("seed", self.seed, 0, SEED_MASK)
        _integer("n", self.n, 1, MAX_TEXTS)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            _require(isinstance(getattr(self, name), bool), name, "True or False", getattr(self, name))
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        strings = isinstance(stop, list | tuple) and all(isinstance(text, str) and text for text in stop)
        _require(strings, "stop", "a non-empty string or a list of them", self.stop)
        ids = self.stop_token_ids
        tokens = isinstance(ids, list | tuple) and all(isinstance(token, int) and token >= 0 for token in ids)
        _require(tokens, "stop_token_ids", "a list of token ids", ids)
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))
        object.__setattr__(self, "bad_words", _bad_words(self.bad_words))
        object.__setattr__(self, "bad_words_ids", _bad_words_ids(self.bad_words_ids))

    @property
    def greedy(self) -> bool:
        """Whether no noise is added."""
        return self.temperature == 0.0

    @property
    def penalises(self) -> bool:
        """Whether the models' logits are changed: a penalty, a bias, bad words or a least number of tokens is set."""
        neutral = self.repetition_penalty == 1.0 and self.presence_penalty == self.frequency_penalty == 0.0
        return bool(self.logit_bias or self.bad_words_ids) or self.min_tokens > 0 or not neutral

    def ending_with(self, tokens: Iterable[int]) -> SamplingParams:
        """The same with a model's end-of-sequence tokens among ``stop_token_ids``, unless they are ignored."""
        if self.ignore_eos:
            return self
        return replace(self, stop_token_ids=tuple(sorted({*self.stop_token_ids, *tokens})))

    def texts(self) -> list[SamplingParams]:
        """The parameters of each of the n texts alone."""
        return [replace(self, n=1, seed=(self.seed + index) & SEED_MASK) for index in range(self.n)]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What an engine is made of. Every field is a keyword of :class:`~ssd_ray.LLM` and a flag of the command line.

    Attributes:
        target: folder or hub id of the target model; None is the bundled one.
        draft: folder or hub id of the draft model. "ngram" is the text itself: what followed the same tokens earlier in
            it. None is the bundled model if it fits the target, else "ngram".
        method: "ssd" (drafts work while the target verifies), "sd" (in turn, in one process) or "ar" (no draft).
        num_drafts: draft actors at the start; 0 is allowed and decodes without speculation.
        lookahead: tokens in one speculation at most, 1 to 7, or "auto".
        budget: guessed outcomes of a round at most, over all drafts; "auto" is as many as there is time for.
        fan_out: which outcomes are prepared for: "uniform", "geometric" and "histogram" by how many tokens are usually
            accepted, "confidence" by how sure the draft is; "auto" is the better of the last two.
        backup: what a row does when its outcome was not prepared for: "draft" waits for the best number of tokens,
            none included, "ngram" takes what followed the last tokens earlier in the text, "none" goes on without a
            speculation, "auto" does what earns the most tokens per time by what was measured.
        sampler: "coupled": target and draft share the noise, so one seed is one text. "rejection": drafts sample from a
            law of their own and tokens are accepted by the ratio of probabilities; the text then has the target's law
            but depends on what was drafted.
        saguaro_c: with "rejection", the factor from 0 to 1 by which drafts lower the mass of the tokens that will be
            guessed: fewer acceptances, more hits. 1 is plain sampling, "auto" the best by what was measured.
        law_tokens: with "rejection", a draft's law is cut to its so many likeliest tokens; 0 keeps the vocabulary.
        text_lookup: heed what followed the same tokens earlier in the text: in the drafts' rankings, and as a backup.
        transport: "zmq" (large payloads ride on Ray object refs), "ray" (all do), "auto" is "zmq".
        inline_max_bytes: prompts and frames above it ride on Ray object refs.
        device: "auto", "cpu" or "cuda".
        dtype: "float32", "bfloat16" or "float16"; "auto" is the checkpoint's.
        compile: compile the forwards at their fixed shapes with torch.compile.
        max_num_seqs: sequences that decode at the same time at most.
        max_queue: requests that wait or run at most; a further one is refused at once.
        max_model_len: prompt and output tokens of one sequence at most; None is the models' own limit. Rotary
            frequencies that depend on the length (LongRoPE, dynamic NTK) are those of this one, for all texts.
        kv_memory: GiB for the KV of each model. "auto" is what the longest sequences need together, or else a part of
            the memory that is free. Where it is full, the latest requests wait.
        prefix_cache: keep the KV of ended requests, for prompts that begin as they did.
        prefill_chunk: prompt tokens that are prefilled between two rounds of the requests that decode.
        trust_remote_code: run the Python code that comes with a model whose architecture transformers does not have.
    """

    target: str | None = None
    draft: str | None = None
    method: Method = "ssd"
    num_drafts: int = 1
    lookahead: int | Literal["auto"] = "auto"
    budget: int | Literal["auto"] = "auto"
    fan_out: FanOut = "auto"
    backup: Backup = "auto"
    sampler: Sampler = "coupled"
    saguaro_c: float | Literal["auto"] = "auto"
    law_tokens: int = 64
    text_lookup: bool = True
    transport: Transport = "auto"
    inline_max_bytes: int = 1 << 20
    device: str = "auto"
    dtype: Dtype = "auto"
    compile: bool = False
    max_num_seqs: int = 16
    max_queue: int = 1024
    max_model_len: int | None = None
    kv_memory: float | Literal["auto"] = "auto"
    prefix_cache: bool = True
    prefill_chunk: int = 256
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, literal in _CHOICES.items():
            _choice(name, getattr(self, name), literal)
        for name in ("target", "draft"):
            object.__setattr__(self, name, _model(name, getattr(self, name)))
        _integer("num_drafts", self.num_drafts, 0, 1024)
        if self.lookahead != "auto":
            _integer("lookahead", self.lookahead, 1, MAX_LOOKAHEAD)
        if self.budget != "auto":
            _integer("budget", self.budget, 1, 4096)
        c = self.saguaro_c
        number = isinstance(c, int | float) and not isinstance(c, bool) and 0.0 <= c <= 1.0
        _require(c == "auto" or number, "saguaro_c", "a number from 0 to 1, or 'auto'", c)
        _integer("law_tokens", self.law_tokens, 0, 2**31 - 1)
        _integer("inline_max_bytes", self.inline_max_bytes, 1 << 10, 1 << 24)
        _integer("max_num_seqs", self.max_num_seqs, 1, 4096)
        _integer("max_queue", self.max_queue, 1, 1 << 20)
        _integer("prefill_chunk", self.prefill_chunk, 8, 1 << 16)
        if self.max_model_len is not None:
            _integer("max_model_len", self.max_model_len, 2, 1 << 24)
        device = self.device if isinstance(self.device, str) else ""
        _require(device.partition(":")[0] in ("auto", "cpu", "cuda"), "device", "'auto', 'cpu' or 'cuda'", self.device)
        if self.kv_memory != "auto":
            _real("kv_memory", self.kv_memory, 0.0, 1e6, open_low=True)
        for name in ("compile", "text_lookup", "prefix_cache", "trust_remote_code"):
            _require(isinstance(getattr(self, name), bool), name, "True or False", getattr(self, name))
        if self.backup == "ngram":
            _require(self.text_lookup, "text_lookup", "True with backup 'ngram'", self.text_lookup)
        if self.drafts_from_text:
            _require(self.text_lookup, "text_lookup", "True where the text itself is the draft", self.text_lookup)

    @property
    def drafts_from_text(self) -> bool:
        """Whether the text itself takes the place of a draft model."""
        return self.draft == TEXT_DRAFT and self.method != "ar"

    @property
    def draft_actors(self) -> int:
        """How many draft actors there are at the start."""
        return self.num_drafts if self.method == "ssd" and not self.drafts_from_text else 0

    @classmethod
    def from_kwargs(cls, **values: Any) -> EngineConfig:
        """Build a config, refusing unknown names with the list of known ones."""
        known = [f.name for f in fields(cls)]
        for name in values:
            _require(name in known, name, "a field of the engine: " + ", ".join(known), values[name])
        return cls(**values)


_CHOICES: dict[str, Any] = {
    "method": Method,
    "fan_out": FanOut,
    "backup": Backup,
    "sampler": Sampler,
    "transport": Transport,
    "dtype": Dtype,
}
