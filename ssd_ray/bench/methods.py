"""Decoding methods side by side on the same prompts: ar, sd and ssd here, generation and assisted generation there.

Everything runs in one go on the same cores, prompt by prompt in turn, so that a machine whose speed drifts does not
favour anybody. Figures are medians over prompts; ratios are taken prompt by prompt first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter, process_time
from typing import Any

from ssd_ray.config import EngineConfig, SamplingParams
from ssd_ray.stats import Stats, add
from ssd_ray.wire import RequestStats

OWN = ("ar", "sd", "ssd")
THEIRS = ("transformers", "assisted")

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Run:
    """One prompt decoded by one method."""

    tokens: int
    seconds: float
    stats: Stats | None = None
    processor_seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second, prefill included."""
        return self.tokens / self.seconds


Contender = Callable[[list[int], SamplingParams], Run]


@dataclass(frozen=True, slots=True)
class Result:
    """What one method did on all prompts."""

    method: str
    temperature: float
    runs: list[Run]

    @property
    def rate(self) -> float:
        """Median tokens per second."""
        return median(run.rate for run in self.runs)

    def ratio(self, other: Result) -> float:
        """Median over prompts of this method's speed over another's."""
        return median(mine.rate / theirs.rate for mine, theirs in zip(self.runs, other.runs, strict=True))

    @property
    def processor_seconds(self) -> float:
        """Seconds of all processors for 1,000 tokens."""
        return 1e3 * sum(run.processor_seconds for run in self.runs) / sum(run.tokens for run in self.runs)

    @property
    def stats(self) -> Stats | None:
        """The figures of all prompts, summed; None for a method that has none."""
        total = RequestStats()
        for run in self.runs:
            if run.stats is None:
                return None
            total = add(total, run.stats.sums)
        return Stats(sums=total)

    def as_dict(self) -> dict[str, Any]:
        """Figures for JSON."""
        figures: dict[str, Any] = {
            "method": self.method,
            "temperature": self.temperature,
            "tokens_per_s": round(self.rate, 2),
            "processor_seconds_per_1000_tokens": round(self.processor_seconds, 2),
        }
        stats = self.stats
        if stats is not None:
            figures |= {name: round(value, 4) for name, value in per_round(stats).items()}
            figures |= {"misses": stats.misses, "accepted": list(stats.accepted)}
        return figures


def per_round(stats: Stats) -> dict[str, float]:
    """The figures of a table's row: ratios, and where a round's milliseconds go."""
    rounds = max(1, stats.rounds)
    return {
        "tokens_per_round": stats.tokens_per_round,
        "verified_per_token": stats.verified_per_token,
        "hit_rate": stats.hit_rate,
        "duty_cycle": stats.duty_cycle,
        "verify_ms": stats.verify_ms / rounds,
        "wait_ms": stats.wait_ms / rounds,
        "host_ms": stats.host_ms / rounds,
    }


def verdict(results: Sequence[Result]) -> str:
    """Which of our methods serves one request best on this machine, and what to expect, in a sentence."""
    parts = []
    for temperature in dict.fromkeys(result.temperature for result in results):
        here = [result for result in results if result.temperature == temperature]
        ours = [result for result in here if result.method in OWN]
        best = max(ours, key=_rate, default=None)
        if best is None:
            continue
        against = [f"{best.ratio(other):.2f} x {other.method}" for other in here if other.method != best.method]
        parts.append(
            f"{best.method} at temperature {temperature:g}: {', '.join([f'{best.rate:.0f} tokens/s', *against])}"
        )
    return f"Served best here by {'; '.join(parts)}." if parts else ""


def _rate(result: Result) -> float:
    return result.rate


def compare(
    config: EngineConfig,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    methods: Sequence[str] = OWN + THEIRS,
    progress: Progress = lambda _: None,
) -> list[Result]:
    """Decode every prompt by every method for each of ``params``; results in that order."""
    with ExitStack() as stack:
        contenders: dict[str, Contender] = {}
        # The first engine starts Ray, which must not inherit the cores that the others are given: ssd takes no part.
        for method in sorted(methods, key=lambda method: method != "ssd"):
            progress(f"starting {method}")
            contenders[method] = stack.enter_context(_contender(config, method))
        contenders = {method: contenders[method] for method in methods}
        for contender in contenders.values():
            contender(prompts[0], replace(params[0], max_tokens=16))
        return [result for each in params for result in _interleaved(contenders, prompts, each, progress)]


def _interleaved(
    contenders: dict[str, Contender], prompts: Sequence[list[int]], params: SamplingParams, progress: Progress
) -> list[Result]:
    results = {method: Result(method, params.temperature, []) for method in contenders}
    for number, prompt in enumerate(prompts):
        for method, contender in contenders.items():
            progress(f"temperature {params.temperature:g}, prompt {number + 1} of {len(prompts)}: {method}")
            results[method].runs.append(contender(prompt, params))
    return list(results.values())


def _contender(config: EngineConfig, method: str) -> Any:
    if method in OWN:
        return _engine(replace(config, method=method))  # type: ignore[arg-type]
    return _transformers(config, assisted=method == "assisted")


@contextmanager
def _engine(config: EngineConfig) -> Iterator[Contender]:
    # Imported late: the command line is to be quick without Ray.
    from ssd_ray.llm import LLM

    fields = {name: getattr(config, name) for name in EngineConfig.__dataclass_fields__}
    with on_cores(cores_of(config)):
        llm = LLM(**fields)
    with llm:

        def run(prompt: list[int], params: SamplingParams) -> Run:
            used = process_time() + llm.processor_seconds()
            start = perf_counter()
            (output,) = llm.generate([prompt], params)
            seconds = perf_counter() - start
            used = process_time() + llm.processor_seconds() - used
            return Run(len(output.token_ids), seconds, output.stats, used)

        yield run


@contextmanager
def _transformers(config: EngineConfig, *, assisted: bool) -> Iterator[Contender]:
    """Transformers' own generate, in this process, on the cores or the GPU that a target would have."""
    import torch
    from transformers import AutoModelForCausalLM

    from ssd_ray.models.loader import find_device
    from ssd_ray.models.sources import ASSETS

    device, cores = find_device(config.device), cores_of(replace(config, method="ar"))

    def load(role: str) -> Any:
        dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
        model = AutoModelForCausalLM.from_pretrained(getattr(config, role) or ASSETS / role, dtype=dtype)
        return model.eval().to(device)

    target, draft = load("target"), load("draft") if assisted else None
    for model in filter(None, (target, draft)):
        model.generation_config.eos_token_id = None  # as long as ours, which go on after an end token, too

    def run(prompt: list[int], params: SamplingParams) -> Run:
        inputs = torch.tensor([prompt], device=device)
        sampling = {"do_sample": False} if params.greedy else {"do_sample": True, "temperature": params.temperature}
        torch.manual_seed(params.seed)
        with on_cores(cores):
            start, used = perf_counter(), process_time()
            tokens = target.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=params.max_tokens,
                assistant_model=draft,
                pad_token_id=0,
                **sampling,
            )
            seconds, used = perf_counter() - start, process_time() - used
        return Run(tokens.shape[1] - len(prompt), seconds, processor_seconds=used)

    yield run


def cores_of(config: EngineConfig) -> list[int] | None:
    """The cores that a contender is given, so that all have those of ssd's target; None: it divides all of them, as ssd
    does, or ssd has no drafts that take some."""
    drafts = replace(config, method="ssd").draft_actors
    return None if config.method == "ssd" or not drafts else target_cores()


def target_cores() -> list[int] | None:
    """The cores that a target has beside a draft: half of them. None where threads cannot be pinned."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    return cores[: max(1, len(cores) // 2)]


@contextmanager
def on_cores(cores: Sequence[int] | None) -> Iterator[None]:
    """Keep this thread on some cores for a while."""
    import torch

    if cores is None:
        yield
        return
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)
