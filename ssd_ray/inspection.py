"""A target and its draft, described for whoever thinks of serving them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from ssd_ray.cluster.preflight import check
from ssd_ray.config import EngineConfig
from ssd_ray.errors import SsdRayError
from ssd_ray.models.describe import Description, at_best, describe

LENGTHS = 4096, 32768
"""Tokens of sequences whose KV is told, beside the longest."""

ACCEPTANCES = 0.6, 0.8


@dataclass(frozen=True, slots=True)
class Pair:
    """What was found.

    Attributes:
        models: by role.
        max_length: tokens of the longest sequence.
        draft: what drafts: a model, or "ngram".
        rows: sequences that decode at the same time at most.
        problem: why it cannot be served here.
    """

    models: dict[str, Description]
    max_length: int | None
    draft: str | None
    rows: int
    problem: SsdRayError | None = None

    @property
    def step(self) -> float | None:
        """What a draft step takes of a verification where both read all their weights; None without a draft model."""
        if "draft" not in self.models:
            return None
        return self.models["draft"].parameters / self.models["target"].parameters

    def expectation(self) -> str:
        """What the pair may bring, in a sentence."""
        if self.step is None:
            return "No draft model: what followed the same tokens earlier in the text is speculated, at no cost."
        best = [(chance, *at_best(chance, self.step)) for chance in ACCEPTANCES]
        cases = "; ".join(
            f"{hidden:.1f} x plain decoding with ssd and {waiting:.1f} x with sd if {chance:.0%} of tokens are accepted"
            for chance, waiting, hidden in best
        )
        return f"The draft has {self.step:.0%} of the target's parameters. At best, where drafting is hidden: {cases}."

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON takes it."""
        return {
            "models": {role: asdict(model) for role, model in self.models.items()},
            "max_model_len": self.max_length,
            "draft": self.draft,
            "step": self.step,
            "at_best": {str(chance): at_best(chance, self.step) for chance in ACCEPTANCES} if self.step else None,
            "problem": None if self.problem is None else str(self.problem),
        }

    def show(self) -> None:
        """Print it as a table and a sentence."""
        console = Console(highlight=False)
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column()
        for role in self.models:
            table.add_column(role)
        for name, *cells in self._rows():
            table.add_row(name, *cells)
        console.print(table)
        console.print(self.expectation())
        if self.problem is None:
            console.print("`ssd-ray bench machine` measures what it comes to on this machine.")

    def _states(self) -> list[list[str]]:
        """What recurrent layers keep, if there are some."""
        models = self.models.values()
        if not any(model.info.state_bytes for model in models):
            return []
        return [
            ["a state", *(_bytes(model.info.state_bytes) for model in models)],
            [
                f"states of {self.rows} texts",
                *(_bytes(model.state_bytes(self.rows, self.max_length or LENGTHS[0])) for model in models),
            ],
        ]

    def _rows(self) -> list[list[str]]:
        models = self.models.values()
        lengths = sorted({*(each for each in LENGTHS if each < (self.max_length or 0)), self.max_length or LENGTHS[0]})
        return [
            ["model", *(model.source for model in models)],
            ["architecture", *(f"{model.kind}, {model.layers} layers" for model in models)],
            ["parameters", *(_count(model.parameters) for model in models)],
            ["weights", *(_weights(model) for model in models)],
            ["experts", *(model.experts or "none" for model in models)],
            ["a token sees", *(model.sees for model in models)],
            ["context", *(f"{model.info.max_length:,}" if model.info.max_length else "any" for model in models)],
            ["vocabulary", *(f"{model.info.vocab_size:,}" for model in models)],
            *(
                [f"KV of {length:,} tokens", *(_bytes(model.kv_bytes(length)) for model in models)]
                for length in lengths
            ),
            *self._states(),
            ["sampling", *(", ".join(f"{k} {v:g}" for k, v in model.sampling.items()) or "ours" for model in models)],
        ]


def _weights(model: Description) -> str:
    how = f"{model.quantised}, other weights " if model.quantised else ""
    return f"{_bytes(model.weight_bytes)} in {how}{model.dtype}"


def inspect_pair(config: EngineConfig) -> Pair:
    """Describe a target and the draft that would be taken.

    Raises:
        ModelError: the target, or the draft that is named, is not there or cannot work.
    """
    look = partial(describe, quantize=config.quantised, trust_remote_code=config.trust_remote_code)
    models = {"target": look(config.target)}
    if config.draft is not None and config.drafts_from_files:
        models["draft"] = look(config.draft, role="draft")
    limit = config.max_model_len or models["target"].info.max_length
    try:
        checked = check(config)
    except SsdRayError as error:
        return Pair(models, limit, config.draft, config.max_num_seqs, error)
    if checked.config.drafts_from_files:
        models.setdefault("draft", look(checked.config.draft, role="draft"))
    return Pair(models, checked.max_length, checked.config.draft, config.max_num_seqs)


def _count(number: int) -> str:
    for size, name in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:,}"


def _bytes(number: int) -> str:
    for size, name in ((2**30, "GiB"), (2**20, "MiB")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number / 2**10:.3g} KiB"
