"""What target and draft processes share: where they run and how they stop."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import torch

from ssd_ray.actors.drafting import Draft
from ssd_ray.config import MAX_LOOKAHEAD, Backup, EngineConfig
from ssd_ray.models.contract import ModelRunner
from ssd_ray.models.info import head_taps, translation_between
from ssd_ray.models.loader import load_runner
from ssd_ray.models.runners import Runner
from ssd_ray.models.translation import Translated
from ssd_ray.saguaro.fanout import POLICIES
from ssd_ray.sampling.rejection import Proposing
from ssd_ray.speculation.window import SCRATCH
from ssd_ray.tracing import Recorder
from ssd_ray.transport.channel import Channel

logger = logging.getLogger(__name__)

BUDGET = 16
"""Branches in one draft forward where the configuration leaves it open."""


def pin(cores: Sequence[int] | None) -> None:
    """Keep the calling thread, and the threads that it makes, on these cores; None leaves it alone."""
    if cores is not None:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))


def lookahead(config: EngineConfig) -> int:
    """The longest speculation. What of it is verified is found round by round."""
    return MAX_LOOKAHEAD if config.lookahead == "auto" else config.lookahead


def backup(config: EngineConfig) -> Backup:
    """What a row does on a miss. Plain sd always drafts, unless the text itself is the draft."""
    if config.drafts_from_text:
        return "ngram"
    if config.method != "ssd" or (config.backup == "auto" and not config.text_lookup):
        return "draft"
    return config.backup


def recorder(config: EngineConfig, name: str) -> Recorder | None:
    """What notes the events of the loop of this name; None if no trace is wanted."""
    return None if config.trace is None else Recorder(name)


def load_draft(config: EngineConfig, channel: Channel, session: int, trace: Recorder | None) -> Draft:
    """Load the draft's model and make the draft."""
    branching = config.method == "ssd"
    budget = BUDGET if config.budget == "auto" else config.budget
    runner = load_model(config, "draft", SCRATCH)
    return Draft(
        runner if runner.reads else in_target_tokens(config, runner),
        channel,
        session,
        POLICIES[config.fan_out],
        width=min(BUDGET, budget),
        lookahead=lookahead(config),
        branching=branching,
        proposing=Proposing(config.law_tokens) if config.sampler == "rejection" else None,
        budget=budget,
        strict=config.budget != "auto",
        text_lookup=config.text_lookup,
        prefill_chunk=config.prefill_chunk,
        prefix_cache=config.prefix_cache,
        trace=trace,
    )


def in_target_tokens(config: EngineConfig, runner: ModelRunner) -> ModelRunner:
    """A draft that takes and gives tokens of its target, whatever its own vocabulary is."""
    translation = translation_between(config.target, config.draft, trust_remote_code=config.trust_remote_code)
    if translation is None:
        return runner
    logger.info("draft: it has %.0f%% of the target's tokens", 100 * translation.shared)
    return Translated(runner, translation)


def load_model(config: EngineConfig, role: str, scratch: int) -> Runner:
    """Load the target's or the draft's model as the configuration has it."""
    reads = role == "target" and config.runs_draft
    trust = config.trust_remote_code
    return load_runner(
        getattr(config, role),
        role=role,  # type: ignore[arg-type]
        rows=config.max_num_seqs,
        max_length=config.max_model_len,
        scratch=scratch,
        kv_memory=config.kv_memory,
        device=config.device,
        dtype=config.dtype,
        quantize=config.quantised,
        adapter=config.adapter_of(role),
        compile=config.compile,
        prefill_chunk=config.prefill_chunk,
        calibrated=True,
        trust_remote_code=trust,
        taps=head_taps(config.target, config.draft, trust_remote_code=trust) if reads else (),
        target=config.target,
    )
