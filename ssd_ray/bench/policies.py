"""The effect of each policy: fan-out at equal budgets, samplers, and what is done on a miss.

Every variant decodes the same prompts in virtual time (:mod:`~ssd_ray.bench.rehearsal`), with forwards that take what
they take on this machine, or what one says. So differences are the policies' and not the machine's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ssd_ray.bench.rehearsal import Play, Rehearsal
from ssd_ray.bench.simulate import Hardware
from ssd_ray.config import MAX_LOOKAHEAD, SamplingParams
from ssd_ray.models.contract import ModelRunner
from ssd_ray.saguaro.factors import FACTORS
from ssd_ray.saguaro.fanout import POLICIES
from ssd_ray.sampling.rejection import Proposing
from ssd_ray.stats import Stats, add
from ssd_ray.wire import RequestStats

BUDGETS = (8, 16, 32)
LAW_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to decode, as a row of a study's table."""

    study: str
    name: str
    budget: int
    play: Play


@dataclass(frozen=True, slots=True)
class Figure:
    """What a variant came to.

    Attributes:
        study, name, budget, temperature: of what.
        hit_rate, tokens_per_round, duty_cycle: see :class:`~ssd_ray.stats.Stats`.
        tokens_per_s: in virtual time, prefill apart.
    """

    study: str
    name: str
    budget: int
    temperature: float
    hit_rate: float
    tokens_per_round: float
    duty_cycle: float
    tokens_per_s: float


def variants(*, text_lookup: bool) -> list[Variant]:
    """All that is compared. The budgets of fan-out policies and samplers are strict."""
    found = [
        Variant("fan-out", name, budget, Play(policy=policy, budget=budget, strict=True))
        for name, policy in POLICIES.items()
        for budget in BUDGETS
    ]
    found.append(Variant("sampler", "coupled", 16, Play(strict=True)))
    for c in (*FACTORS, "auto"):
        play = Play(strict=True, proposing=Proposing(LAW_TOKENS), target={"saguaro_c": c})
        found.append(Variant("sampler", f"C = {c}", 16, play))
    found += [
        Variant("backup", "none", 16, Play(target={"backup": "none"})),
        Variant("backup", f"draft, all {MAX_LOOKAHEAD}", 16, Play(target={"backup": "draft", "exact_lookahead": True})),
        Variant("backup", "draft", 16, Play(target={"backup": "draft"})),
        Variant("backup", "ngram", 16, Play(target={"backup": "ngram"})),
        Variant("backup", "auto", 16, Play(target={"backup": "auto"})),
    ]
    return [replace(variant, play=replace(variant.play, text_lookup=text_lookup)) for variant in found]


def perform(
    target: ModelRunner,
    drafts: Sequence[ModelRunner],
    hardware: Hardware,
    play: Play,
    prompts: Sequence[Sequence[int]],
    params: Callable[[int], SamplingParams],
) -> Stats:
    """Decode prompts one after the other; ``params(i)`` are those of prompt i. Their figures together."""
    rehearsal = Rehearsal(target, drafts, hardware, play)
    total = RequestStats()
    for number, prompt in enumerate(prompts):
        total = add(total, rehearsal.run(prompt, params(number))[1])
    return Stats(sums=total)


def compare_policies(
    target: ModelRunner,
    draft: ModelRunner,
    hardware: Hardware,
    prompts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    *,
    max_tokens: int,
    text_lookup: bool = True,
) -> Iterator[Figure]:
    """The figures of every variant at every temperature, as they come. Greedy decoding has one sampler."""
    for temperature in temperatures:

        def params(seed: int, temperature: float = temperature) -> SamplingParams:
            return SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed, ignore_eos=True)

        for variant in variants(text_lookup=text_lookup):
            if temperature == 0.0 and variant.play.proposing is not None:
                continue
            stats = perform(target, [draft], hardware, variant.play, prompts, params)
            yield Figure(
                variant.study,
                variant.name,
                variant.budget,
                temperature,
                stats.hit_rate,
                stats.tokens_per_round,
                stats.duty_cycle,
                stats.tokens_per_s,
            )
