"""What can be refused before anything is started: models that are not there, do not match or do not fit."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ssd_ray.cluster.runtime import is_private
from ssd_ray.cluster.trace_file import require_writable
from ssd_ray.config import MAX_LOOKAHEAD, TEXT_DRAFT, EngineConfig, SamplingParams
from ssd_ray.errors import ConfigError, ModelError, PromptTooLongError, RequestError, ResourceError, shown
from ssd_ray.models.info import (
    ModelInfo,
    check_adapter_of,
    check_files,
    check_pair,
    end_tokens,
    head_taps,
    load_tokenizer,
    model_fingerprint,
    model_info,
    mtp_info,
    refuse_weights,
    sampling_defaults,
    translation_between,
)
from ssd_ray.models.loader import count_pages, find_device, free_bytes, kv_size
from ssd_ray.models.recurrent import bytes_of_states
from ssd_ray.models.sources import Role
from ssd_ray.prompts import Prompt, plain
from ssd_ray.speculation.window import SCRATCH

logger = logging.getLogger(__name__)

Fingerprints = Mapping[Role, tuple[str, str]]
"""What tells the models that were looked at from others, wherever they are loaded."""

DEFAULT_SAMPLING = SamplingParams()

SHARE_OF_MEMORY = 0.95
"""Of the free memory that models may fill; Python and Ray need some beside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What the driver knows of models that have passed.

    Attributes:
        config: the engine's, with what it left open: the draft, and the longest sequence.
        fingerprints: of the models that are loaded.
        tokenizer: the target's.
        vocab_size: token ids that the target knows.
        max_length: tokens of prompt and text together at most.
        end_tokens: tokens that end a text.
        sampling: how a request is sampled that says nothing of it.
        shared_vocabulary: part of the target's tokens that the draft has, too.
    """

    config: EngineConfig
    fingerprints: Fingerprints
    tokenizer: Any
    vocab_size: int
    max_length: int
    end_tokens: tuple[int, ...] = ()
    sampling: SamplingParams = DEFAULT_SAMPLING
    shared_vocabulary: float = 1.0

    def prompt(self, prompt: Prompt) -> list[int]:
        """Turn a prompt into tokens.

        Raises:
            RequestError: it is no prompt: empty, or with tokens that the model does not know.
            PromptTooLongError: it leaves no room for a single token.
        """
        said = plain(prompt)
        tokens = self._tokens(said) if isinstance(said, str) else said
        if not tokens:
            raise RequestError("prompt: it is empty")
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise RequestError(f"prompt: expected token ids from 0 to {self.vocab_size - 1}, got {shown(token)}")
        if len(tokens) >= self.max_length:
            raise PromptTooLongError(
                f"prompt: it has {len(tokens)} tokens; the context of {self.max_length} has to hold it and the text"
            )
        return [int(token) for token in tokens]

    def _tokens(self, text: str) -> list[int]:
        try:
            tokens = list(self.tokenizer(text)["input_ids"])
        except Exception as error:  # a tokenizer raises what its author liked
            raise RequestError(f"prompt: the tokenizer does not take it: {error}") from error
        for token in tokens:
            if token >= self.vocab_size:
                name = self.tokenizer.convert_ids_to_tokens(token)
                raise RequestError(
                    f"prompt: the tokenizer has a token {name!r}, {token}, for which the model, with {self.vocab_size} "
                    "tokens, has no embedding"
                )
        begin = self.tokenizer.bos_token_id
        # A text that begins with this token, as a template writes it, gets no second one.
        return tokens[1:] if begin is not None and tokens[:2] == [begin, begin] else tokens

    def params(self, params: SamplingParams) -> SamplingParams:
        """Look at a request's parameters, and turn bad words into tokens.

        Raises:
            RequestError: they name a token that the model does not know.
        """
        self._require_known("logit_bias", (token for token, _ in params.logit_bias))
        self._require_known("bad_words_ids", (token for word in params.bad_words_ids for token in word))
        if not params.bad_words:
            return params
        words = (tokens for word in params.bad_words for tokens in self._spellings(word))
        return replace(params, bad_words=(), bad_words_ids=tuple(dict.fromkeys((*params.bad_words_ids, *words))))

    def _require_known(self, name: str, tokens: Iterable[int]) -> None:
        for token in tokens:
            if token >= self.vocab_size:
                raise RequestError(f"{name}: expected token ids from 0 to {self.vocab_size - 1}, got {token}")

    def _spellings(self, word: str) -> list[tuple[int, ...]]:
        """The tokens of a word without a space before it, and with one."""
        bare = word.lstrip() or word
        spellings = [tuple(self.tokenizer.encode(text, add_special_tokens=False)) for text in (bare, f" {bare}")]
        if not all(spellings):
            raise RequestError(f"bad_words: the tokenizer has no tokens for {word!r}")
        return spellings


def check(config: EngineConfig) -> Checked:
    """Look at the models' configs, tokenizers and files, without reading their weights.

    Raises:
        ModelError: a model is not there, or not whole, or cannot work here, or the two do not share one vocabulary.
        ConfigError: ``max_model_len`` is above what the target can take, or ``trace`` cannot be written.
        ResourceError: they would run on this machine, and it lacks the memory or the GPU.
    """
    if config.trace is not None:
        require_writable(config.trace)
    trust = config.trust_remote_code
    taps = _check_head(config)
    look = partial(model_info, quantize=config.quantised, trust_remote_code=trust)
    infos: dict[Role, ModelInfo] = {"target": look(config.target, role="target", taps=len(taps))}
    shared = 1.0
    if config.method != "ar":
        config, shared = _with_draft(config)
        if config.drafts_from_files:
            infos["draft"] = look(config.draft, role="draft")
    for role in infos:
        check_files(getattr(config, role), role=role)
    check_adapter_of(config.adapter, config.target, trust_remote_code=trust)
    max_length = _max_length(config, infos["target"])
    config = replace(config, max_model_len=max_length)
    if is_private():
        _require_machine(config, infos, max_length)
    tokenizer = load_tokenizer(config.target, trust_remote_code=trust)
    return Checked(
        config=config,
        fingerprints={
            role: model_fingerprint(getattr(config, role), role=role, adapter=config.adapter_of(role)) for role in infos
        },
        tokenizer=tokenizer,
        vocab_size=infos["target"].vocab_size,
        max_length=max_length,
        end_tokens=end_tokens(infos["target"], tokenizer),
        sampling=default_sampling(config),
        shared_vocabulary=shared,
    )


def _check_head(config: EngineConfig) -> tuple[int, ...]:
    """Look whether a draft that reads the target fits it; where it reads."""
    if not config.runs_draft:
        return ()
    reads = head_taps(config.target, config.draft, trust_remote_code=config.trust_remote_code)
    if reads and config.sampler != "coupled":
        # What a head says of a token changes once the target's states are there; a law that was drawn from must not.
        raise ConfigError("sampler", "'coupled' where the draft is a head, which reads the target", config.sampler)
    return reads


def default_sampling(config: EngineConfig) -> SamplingParams:
    """How a request is sampled that says nothing of it.

    Raises:
        ConfigError: the model's generation config has a value that sampling does not take.
    """
    if config.generation_config == "none":
        return DEFAULT_SAMPLING
    try:
        return SamplingParams(**sampling_defaults(config.target))
    except ConfigError as error:
        raise ConfigError(
            "generation_config", f"'none', since the model's {error.field} is not {error.expected}", error.value
        ) from error


def _with_draft(config: EngineConfig) -> tuple[EngineConfig, float]:
    """The configuration with its draft: the one that it names, or the bundled one, or the text itself where that does
    not fit; and the part of the target's vocabulary that it has.

    Raises:
        ModelError: the draft that it names is not there or does not match the target.
        ConfigError: it bars the text from being the draft.
    """
    if config.drafts_from_text:
        logger.info("the text itself is the draft")
        return config, 1.0
    if config.drafts_from_target:
        return config, 1.0
    try:
        shared = _shared_vocabulary(config)
    except ModelError as error:
        if config.draft is not None:
            raise
        logger.warning(
            "no draft is given and the bundled one does not fit, so the text itself is the draft (%s)", error
        )
        return replace(config, draft=TEXT_DRAFT), 1.0
    return config, shared


def _shared_vocabulary(config: EngineConfig) -> float:
    """The part of the target's vocabulary that the draft has. It has to be all of it where tokens are accepted by the
    ratio of probabilities, and where nobody has asked for this draft."""
    pair, trust = (config.target, config.draft), config.trust_remote_code
    if config.draft is None or config.sampler != "coupled":
        check_pair(*pair, trust_remote_code=trust)
        return 1.0
    translation = translation_between(*pair, trust_remote_code=trust)
    return 1.0 if translation is None else translation.shared


def _max_length(config: EngineConfig, info: ModelInfo) -> int:
    wanted, limit = config.max_model_len, info.max_length
    if wanted is not None and limit is not None and wanted > limit:
        raise ConfigError("max_model_len", f"at most {limit}, the positions of the target", wanted)
    length = wanted or limit
    if length is None:
        raise ConfigError("max_model_len", "a number, since the target's config sets no limit", None)
    return length


def _require_machine(config: EngineConfig, infos: dict[Role, ModelInfo], max_length: int) -> None:
    """Check that models which will run on this machine find there what they need."""
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    if config.device.startswith("cuda") and not on_gpu:
        raise ResourceError(f"device: {config.device!r} needs a GPU, and PyTorch sees none here; use device='cpu'")
    for role in infos:
        refuse_weights(
            getattr(config, role),
            role=role,
            quantize=config.quantised,
            device=find_device(config.device),
            trust_remote_code=config.trust_remote_code,
        )
    if not on_gpu:  # whether a GPU's memory suffices is seen where it is used
        if config.drafts_from_target:
            infos = infos | {"draft": mtp_info(config.target, trust_remote_code=config.trust_remote_code)}
        _require_memory(config, infos, max_length)


def _require_memory(config: EngineConfig, infos: dict[Role, ModelInfo], max_length: int) -> None:
    copies = {"target": 1 + config.spare_targets, "draft": config.draft_actors if config.method == "ssd" else 1}
    weights = sum(copies[role] * info.parameter_bytes for role, info in infos.items())
    scratch = {"target": MAX_LOOKAHEAD + 1, "draft": SCRATCH}
    rows = 1 if config.kv_memory == "auto" else config.max_num_seqs
    kv = states = 0
    for role, info in infos.items():
        slots = min(max_length, info.max_length or max_length) + scratch[role]
        room = rows, slots, config.prefill_chunk + scratch[role]
        kv += copies[role] * kv_size(info.kept, count_pages(config.kv_memory, info.kept, *room, 0))
        states += copies[role] * bytes_of_states(info.state_bytes, config.max_num_seqs, slots)
    free = SHARE_OF_MEMORY * free_bytes(torch.device("cpu"))
    if weights + kv + states > free:
        of_states = f", {states / 2**30:.2f} GiB of states" if states else ""
        raise ResourceError(
            f"memory: {weights / 2**30:.2f} GiB of weights{of_states} and {kv / 2**30:.2f} GiB of KV do not fit the "
            f"{free / 2**30:.2f} GiB that are free; lower kv_memory, max_model_len or num_drafts"
        )
