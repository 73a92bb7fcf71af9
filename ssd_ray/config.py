"""Configuration: small frozen dataclasses that validate themselves.

Validation looks at the value alone and raises :class:`~ssd_ray.errors.ConfigError`, so that bad input is refused before
anything is started. Folders become absolute, since who reads them may stand elsewhere; models are looked at by the
loader.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import wraps
from math import isfinite
from os import PathLike, fspath
from os.path import expanduser
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from ssd_ray.errors import ConfigError

Config = TypeVar("Config", bound=type)

Method = Literal["ssd", "sd", "ar"]
FanOut = Literal["auto", "uniform", "geometric", "histogram", "confidence"]
Backup = Literal["auto", "draft", "ngram", "none"]
Sampler = Literal["coupled", "rejection"]
Transport = Literal["auto", "zmq", "ray"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantize = Literal["none", "int8", "int4", "fp8"]
GenerationConfig = Literal["auto", "none"]
OnError = Literal["continue", "stop"]
"""What becomes of a prompt that cannot be served: its error is its result, or ends everything."""
ModelPath = str | PathLike[str] | None
"""A folder, a hub id or None; see :class:`EngineConfig`."""

MAX_LOOKAHEAD = 15
"""Largest lookahead. How many tokens are verified is found round by round."""

GGUF = ".gguf"
"""The ending of a file that is a whole model, as llama.cpp has them."""

TEXT_DRAFT = "ngram"
"""In place of a draft model: the text itself, by what followed the same tokens earlier in it."""

MTP_DRAFT = "mtp"
"""In place of a draft model: the head for multi-token prediction in the target's own checkpoint."""

SEED_MASK = (1 << 63) - 1

MOST = 2**31 - 1
"""The largest token id, and the largest number of tokens."""

MAX_LOGPROBS = 20
MAX_TEXTS = 1024

SMALLEST_PENALTY = 1e-6
"""The smallest repetition penalty: logits that are divided by it stay far within float32."""


def is_text(value: object) -> bool:
    """Whether it is a text that UTF-8 can write: a str may hold halves of characters, which no other program takes."""
    try:
        return isinstance(value, str) and bool(value.encode() or True)
    except UnicodeEncodeError:
        return False


def _require(ok: bool, name: str, expected: str, value: object) -> None:
    if not ok:
        raise ConfigError(name, expected, value)


def _integer(name: str, value: object, low: int, high: int) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    _require(ok, name, f"an integer from {low} to {high}", value)


def _real(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    # Compared first: an integer that is too large to be a float cannot be asked whether it is finite.
    ok = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high and isfinite(value)
    bounds = f"a number {'above' if open_low else 'from'} {low:g} {'up ' if open_low else ''}to {high:g}"
    _require(ok and not (open_low and value == low), name, bounds, value)


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    """Pairs of a token id and its bias, sorted, from such pairs or from a mapping; JSON has its keys as strings."""
    pairs = list(value.items()) if isinstance(value, Mapping) else _plain(value)
    ok = isinstance(pairs, list | tuple) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs)
    _require(ok, "logit_bias", "a dict from token ids to numbers", value)
    biases = {}
    for key, value in pairs:
        token, bias = _number(key), _plain(value)
        _integer("logit_bias", token, 0, MOST)
        _real("logit_bias", bias, -100.0, 100.0)
        biases[token] = float(bias)
    return tuple(sorted(biases.items()))


def _number(key: object) -> Any:
    """A token id as a key of a JSON object, too."""
    digits = isinstance(key, str) and key.isdecimal() and len(key) < 20
    return int(key) if digits else _plain(key)  # type: ignore[call-overload]


def _check_strings(name: str, value: Any) -> None:
    ok = isinstance(value, tuple) and all(is_text(text) and text for text in value)
    _require(ok, name, "a non-empty string that UTF-8 can write, or a list of them", value)


def _check_tokens(name: str, value: Any) -> None:
    _require(isinstance(value, tuple), name, "a list of token ids", value)
    for token in value:
        _integer(name, token, 0, MOST)


def _bad_words_ids(value: Any) -> tuple[tuple[int, ...], ...]:
    """Sequences of token ids, from a list of them."""
    _require(isinstance(value, tuple), "bad_words_ids", "a list of lists of token ids", value)
    words = tuple(map(_plain_list, value))
    for word in words:
        _check_tokens("bad_words_ids", word)
        _require(word != (), "bad_words_ids", "lists of one token id or more", word)
    return words


def _model(name: str, value: Any) -> str | None:
    """A model's folder or file, absolute, or its hub id."""
    path: str | None = fspath(value) if isinstance(value, PathLike) else value
    _require(
        path is None or (isinstance(path, str) and path != ""), name, "a folder, a .gguf file, a hub id or None", value
    )
    if path is None or value in (TEXT_DRAFT, MTP_DRAFT):
        return path
    folder = Path(expanduser(path))
    here = isinstance(value, PathLike) or folder.is_dir() or (folder.suffix == GGUF and folder.is_file())
    return str(folder.absolute()) if here else str(path)


def _file(name: str, value: Any) -> str | None:
    """The path of a file, absolute."""
    path: str | None = fspath(value) if isinstance(value, PathLike) else value
    _require(
        path is None or (isinstance(path, str) and path != "" and "\0" not in path),
        name,
        "the path of a file, or None",
        value,
    )
    return None if path is None else str(Path(expanduser(path)).absolute())


def _choice(name: str, value: object, literal: Any) -> None:
    options = get_args(literal)
    _require(value in options, name, "one of " + ", ".join(map(repr, options)), value)


def check_timeout(timeout: object) -> None:
    """Refuse what is no time limit: a number of seconds above 0, or None for none."""
    if timeout is not None:
        _real("timeout", timeout, 0.0, 1e9, open_low=True)


def _plain(value: Any) -> Any:
    """Numbers, texts and arrays of other libraries, and what is derived from Python's own, as Python's own: nothing
    else passes a wire."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, float) else value


def _plain_list(value: Any) -> Any:
    """The same for what may be a list of them."""
    value = _plain(value)
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def check_fields(values: Mapping[str, Any], config: Any, what: str) -> None:
    """Refuse names that are no fields of a configuration, with all that there are and the nearest one.

    Raises:
        ConfigError: a name is unknown.
    """
    known = [each.name for each in fields(config)]
    for name in values.keys() - set(known):
        near = get_close_matches(name, known, 1)
        perhaps = f" (perhaps {near[0]!r})" if near else ""
        raise ConfigError(name, f"a field of the {what}: " + ", ".join(known) + perhaps, values[name])


def _named(what: str) -> Callable[[Config], Config]:
    """A class decorator: arguments that the configuration does not have are refused in our own words."""

    def decorate(config: Config) -> Config:
        init: Any = config.__init__  # type: ignore[misc]

        @wraps(init)
        def checked(self: Any, *unnamed: Any, **values: Any) -> None:
            if unnamed:
                raise ConfigError(config.__name__, "its fields by name", unnamed[0])
            check_fields(values, config, what)
            init(self, **values)

        config.__init__ = checked  # type: ignore[misc]
        return config

    return decorate


@_named("sampling")
@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end.

    A field that is None has its default, ``max_tokens`` and ``seed`` aside, where it has a meaning.

    Attributes:
        temperature: 0 is greedy decoding; above 0 logits are divided by it.
        repetition_penalty: logits of tokens that the prompt or the text has are divided by it if positive, else
            multiplied; 1 changes nothing. From 1e-6 to 100.
        presence_penalty: taken from the logits of tokens that the text has; -2 to 2.
        frequency_penalty: taken from the logit of a token once for each time that the text has it; -2 to 2.
        logit_bias: added to the logits of single tokens before the penalties: a dict from token ids to numbers from
            -100 to 100, kept as sorted pairs.
        top_p: keep the smallest set of tokens whose probability reaches it.
        top_k: keep the k likeliest tokens; 0 or -1 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest.
        max_tokens: tokens to generate at most; None is as many as the context has room for.
        min_tokens: tokens before which neither a token nor a string ends the text: tokens that would are not chosen.
        stop: strings that end the text; the text ends before the earliest of them. They may name special tokens.
        stop_token_ids: tokens that end the text, beside the model's end-of-sequence tokens; they are no part of it.
        include_stop_str_in_output: the string or token that ends the text is a part of it.
        skip_special_tokens: special tokens are no part of the text.
        bad_words: strings that are not generated, at the beginning of a word or of the text: the last token of each is
            barred where the text has the tokens before it. An engine makes ``bad_words_ids`` of them.
        bad_words_ids: the same as sequences of token ids.
        seed: names the noise. Equal seeds give equal texts, whatever drafts do. Any integer, of which the lowest 63
            bits count; None is another seed for each request, which its result names.
        ignore_eos: go on after an end-of-sequence token.
        logprobs: give the log-probability of each token of the text and of the so many likeliest, up to 20, as the
            target has them before penalties and temperature. None or False is none.
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
    max_tokens: int | None = 128
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    bad_words: tuple[str, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    seed: int | None = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        self._settle()
        _real("temperature", self.temperature, 0.0, 100.0)
        _real("repetition_penalty", self.repetition_penalty, SMALLEST_PENALTY, 100.0)
        _real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _real("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _integer("top_k", self.top_k, 0, MOST)
        _real("min_p", self.min_p, 0.0, 1.0)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, MOST)
        _integer("min_tokens", self.min_tokens, 0, self.max_tokens or MOST)
        if self.seed is not None:
            _integer("seed", self.seed, 0, SEED_MASK)
        _integer("n", self.n, 1, MAX_TEXTS)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            _require(isinstance(getattr(self, name), bool), name, "True or False", getattr(self, name))
        for name in ("stop", "bad_words"):
            _check_strings(name, getattr(self, name))
        _check_tokens("stop_token_ids", self.stop_token_ids)
        object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))
        object.__setattr__(self, "bad_words_ids", _bad_words_ids(self.bad_words_ids))

    def _settle(self) -> None:
        """Bring what callers write in several ways into the one form that is checked and kept."""
        for each in fields(self):
            value = getattr(self, each.name)
            kept = value if each.name == "logit_bias" else _plain_list(value)
            object.__setattr__(self, each.name, kept if kept is not None else _NONE.get(each.name, each.default))
        for name in ("stop", "bad_words"):
            if isinstance(one := getattr(self, name), str):
                object.__setattr__(self, name, (one,))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        if self.logprobs is False:
            object.__setattr__(self, "logprobs", None)
        if isinstance(self.seed, int) and not isinstance(self.seed, bool):
            object.__setattr__(self, "seed", self.seed & SEED_MASK)

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

    @property
    def noise_seed(self) -> int:
        """The seed as the noise takes it; 0 where :meth:`texts` has not put one yet."""
        return self.seed or 0

    def texts(self) -> list[SamplingParams]:
        """The parameters of each of the n texts alone, all with a seed."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return [replace(self, n=1, seed=seed + index) for index in range(self.n)]


_NONE = {"max_tokens": None, "seed": None}
"""What None means where it is not a field's default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What an engine is made of. Every field is a keyword of :class:`~ssd_ray.LLM` and a flag of the command line.

    Attributes:
        target: folder or hub id of the target model; None is the bundled one.
        draft: folder or hub id of the draft model, or of a head that reads this target (docs/heads.md). "ngram" is the
            text itself: what followed the same tokens earlier in it; "mtp" the head for multi-token prediction in the
            target's own checkpoint. None is the bundled model if it fits the target, else "ngram".
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
        quantize: "int8", "int4" or "fp8" (on a GPU): linear layers of both models are quantised when they are loaded;
            other weights and KV have ``dtype``. "none" leaves them as they are, as a checkpoint that is quantised
            already always is.
        adapter: folder or hub id of a PEFT adapter that is merged into the target's weights.
        compile: compile the forwards at their fixed shapes with torch.compile.
        max_num_seqs: sequences that decode at the same time at most.
        max_queue: requests that wait or run at most; a further one is refused at once.
        max_model_len: prompt and output tokens of one sequence at most; None is the models' own limit. Rotary
            frequencies that depend on the length (LongRoPE, dynamic NTK) are those of this one, for all texts.
        kv_memory: GiB for the KV of each model. "auto" is what the longest sequences need together, or else a part of
            the memory that is free. Where it is full, the latest requests wait.
        prefix_cache: keep the KV of ended requests, for prompts that begin as they did.
        prefill_chunk: prompt tokens that are prefilled between two rounds of the requests that decode.
        generation_config: "auto": where a request says nothing, it is sampled as the target's generation_config.json
            has it (temperature, top_k, top_p, min_p, repetition_penalty, max_new_tokens); "none" heeds its end tokens
            alone.
        spare_targets: targets that are loaded beside the one at work, to take over at once should it die. Each takes a
            target's memory, and a GPU of its own where there are several; without GPUs it has the target's cores.
        stall_timeout: seconds without progress after which a target or a draft counts as stuck and is replaced. It is
            more where single rounds, or chunks of a prompt, take more than a fiftieth of it, and ten times as long
            with ``compile``.
        max_restarts: how often in a row a target or a draft that dies is started again. A run of five minutes counts
            as a good one, after which it is so often again. 0: never.
        trust_remote_code: run the Python code that comes with a model whose architecture transformers does not have.
        trace: file to which a timeline of what each actor did is written when the engine closes, in Chrome's trace
            format, for ui.perfetto.dev or chrome://tracing. It replaces one that is there.
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
    quantize: Quantize = "none"
    adapter: str | None = None
    compile: bool = False
    max_num_seqs: int = 16
    max_queue: int = 1024
    max_model_len: int | None = None
    kv_memory: float | Literal["auto"] = "auto"
    prefix_cache: bool = True
    prefill_chunk: int = 256
    generation_config: GenerationConfig = "auto"
    spare_targets: int = 0
    stall_timeout: float = 30.0
    max_restarts: int = 3
    trust_remote_code: bool = False
    trace: str | None = None

    def __post_init__(self) -> None:
        for name, literal in _CHOICES.items():
            _choice(name, getattr(self, name), literal)
        for name in ("target", "draft", "adapter"):
            object.__setattr__(self, name, _model(name, getattr(self, name)))
        object.__setattr__(self, "trace", _file("trace", self.trace))
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
        _integer("spare_targets", self.spare_targets, 0, 64)
        _real("stall_timeout", self.stall_timeout, 0.0, 1e9, open_low=True)
        _integer("max_restarts", self.max_restarts, 0, MOST)
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
    def quantised(self) -> Literal["int8", "int4", "fp8"] | None:
        """How linear layers are quantised; None if they are not."""
        return None if self.quantize == "none" else self.quantize

    def adapter_of(self, role: str) -> str | None:
        """The adapter of the target, and none of the draft."""
        return self.adapter if role == "target" else None

    @property
    def drafts_from_target(self) -> bool:
        """Whether a head in the target's own checkpoint is the draft."""
        return self.draft == MTP_DRAFT and self.method != "ar"

    @property
    def runs_draft(self) -> bool:
        """Whether a draft is run: a model, or a head."""
        return self.method != "ar" and not self.drafts_from_text

    @property
    def drafts_from_files(self) -> bool:
        """Whether it has files of its own."""
        return self.runs_draft and not self.drafts_from_target

    @property
    def draft_actors(self) -> int:
        """How many draft actors there are at the start."""
        return self.num_drafts if self.method == "ssd" and self.runs_draft else 0

    @classmethod
    def from_kwargs(cls, **values: Any) -> EngineConfig:
        """Build a config, refusing unknown names with the list of known ones."""
        check_fields(values, cls, "engine")
        return cls(**values)


_CHOICES: dict[str, Any] = {
    "method": Method,
    "fan_out": FanOut,
    "backup": Backup,
    "sampler": Sampler,
    "transport": Transport,
    "dtype": Dtype,
    "quantize": Quantize,
    "generation_config": GenerationConfig,
}
