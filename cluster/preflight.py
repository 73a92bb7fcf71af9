"""What can be refused before anything is started: models that are not there, do not match or do not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ssd_ray.cluster.runtime import is_private
from ssd_ray.config import MAX_LOOKAHEAD, EngineConfig, SamplingParams
from ssd_ray.errors import ConfigError, PromptTooLongError, RequestError, ResourceError, shown
from ssd_ray.models.contract import PAGE_SLOTS
from ssd_ray.models.loader import (
    ModelInfo,
    Role,
    check_pair,
    count_pages,
    free_bytes,
    load_tokenizer,
    model_info,
)
from ssd_ray.prompts import Prompt, plain
from ssd_ray.speculation.draft import SCRATCH

SHARE_OF_MEMORY = 0.95
"""Of the free memory that models may fill; Python and Ray need some beside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What the driver knows of models that have passed.

    Attributes:
        tokenizer: the target's.
        vocab_size: token ids that target and draft both know.
        max_length: tokens of prompt and text together at most.
    """

    tokenizer: Any
    vocab_size: int
    max_length: int

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
            return list(self.tokenizer(text)["input_ids"])
        except Exception as error:  # a tokenizer raises what its author liked
            raise RequestError(f"prompt: the tokenizer does not take it: {error}") from error

    def params(self, params: SamplingParams) -> SamplingParams:
        """Look at a request's parameters.

        Raises:
            RequestError: they have a bias for a token that the model does not know.
        """
        for token, _ in params.logit_bias:
            if token >= self.vocab_size:
                raise RequestError(f"logit_bias: expected token ids from 0 to {self.vocab_size - 1}, got {token}")
        return params


def check(config: EngineConfig) -> Checked:
    """Look at the models' configs and tokenizers, not at their weights.

    Raises:
        ModelError: a model is not there or cannot work here, or the two do not share one vocabulary.
        ConfigError: ``max_model_len`` is above what the models can take.
        ResourceError: they would run on this machine, and it lacks the memory or the GPU.
    """
    infos: dict[Role, ModelInfo] = {"target": model_info(config.target, role="target")}
    vocab_size = infos["target"].vocab_size
    if config.method != "ar":
        infos["draft"] = model_info(config.draft, role="draft")
        vocab_size = check_pair(config.target, config.draft)
    max_length = min(_max_length(config, info, role) for role, info in infos.items())
    if is_private():
        _require_machine(config, infos, max_length)
    return Checked(tokenizer=load_tokenizer(config.target), vocab_size=vocab_size, max_length=max_length)


def _max_length(config: EngineConfig, info: ModelInfo, role: Role) -> int:
    wanted, limit = config.max_model_len, info.max_length
    if wanted is not None and limit is not None and wanted > limit:
        raise ConfigError("max_model_len", f"at most {limit}, the positions of the {role}", wanted)
    length = wanted or limit
    if length is None:
        raise ConfigError("max_model_len", f"a number, since the {role}'s config sets no limit", None)
    return length


def _require_machine(config: EngineConfig, infos: dict[Role, ModelInfo], max_length: int) -> None:
    """Check that models which will run on this machine find there what they need."""
    if torch.cuda.is_available() and config.device != "cpu":
        return  # whether a GPU's memory suffices is seen where it is used
    if config.device.startswith("cuda"):
        raise ResourceError(f"device: {config.device!r} needs a GPU, and PyTorch sees none here; use device='cpu'")
    _require_memory(config, infos, max_length)


def _require_memory(config: EngineConfig, infos: dict[Role, ModelInfo], max_length: int) -> None:
    copies = {"target": 1, "draft": config.num_drafts if config.method == "ssd" else 1}
    weights = sum(copies[role] * info.parameter_bytes for role, info in infos.items())
    scratch = {"target": MAX_LOOKAHEAD + 1, "draft": SCRATCH}
    rows = 1 if config.kv_memory == "auto" else config.max_num_seqs
    kv = 0
    for role, info in infos.items():
        page_bytes = info.kv_bytes_per_slot * PAGE_SLOTS
        wanted = None if config.kv_memory == "auto" else config.kv_memory
        kv += copies[role] * page_bytes * count_pages(wanted, page_bytes, rows, max_length + scratch[role], 0)
    free = SHARE_OF_MEMORY * free_bytes(torch.device("cpu"))
    if weights + kv > free:
        raise ResourceError(
            f"memory: {weights / 2**30:.2f} GiB of weights and {kv / 2**30:.2f} GiB of KV do not fit the "
            f"{free / 2**30:.2f} GiB that are free; lower kv_memory, max_model_len or num_drafts"
        )
