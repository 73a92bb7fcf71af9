"""Train the bundled pair from nothing: a deep target and a shallow draft that guesses what the target will write.

    python examples/train_pair.py --out runs/pair --minutes 70     # all stages, sized to the machine
    python examples/train_pair.py --out runs/pair                  # goes on where the last run stopped
    python examples/train_pair.py --out runs/pair --decay-now      # land early: shrink what is left to the decay
    python examples/train_pair.py --out /tmp/tiny --smoke          # the whole recipe on a tiny pair, in seconds

Six stages, each of which leaves files in `--out` and is skipped when they are there:

1. corpus     Python files of this environment whose licence is permissive, the standard library first; generated
              tables, licence headers and near-copies dropped. Thirty files are held out, with all that resembles them.
2. tokenizer  one byte-level BPE of 4096 tokens for both models: speculation needs equal vocabularies.
3. target     begins with 5 layers and grows to 20. A new layer is a copy whose outputs start at zero, so growing never
              hurts, and most of the tokens are learned at a quarter of the price. Muon trains the matrices, AdamW the
              rest; the rate is constant and falls to zero at the end. Every eighth step has the full context length.
4. draft      two layers, first on the corpus alone.
5. distil     the draft then learns the target's whole distribution, on the corpus and on text that the target wrote.
              This is what lifts acceptance: a draft need not know Python, it has to know the target.
6. export     stock `transformers` folders in bfloat16, the held-out prompts, the figures and the model card.

On a CPU with several cores the batch is dealt out over single-threaded processes; on a GPU everything runs in one
process with a larger batch. Steps are counted, not seconds: one plan and one seed give one sequence of batches.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from pair_recipe.card import write_card
from pair_recipe.corpus import HELD_OUT, Source, collect, load_sources, save_sources
from pair_recipe.distil import Distillation, mix, write_text
from pair_recipe.measure import measure
from pair_recipe.models import DRAFT, TARGET, Shape, export, grow
from pair_recipe.training import (
    LossOf,
    Phase,
    Run,
    Schedule,
    employ,
    load_run,
    next_token_loss,
    train,
    train_step,
)
from pair_recipe.vocabulary import pack, train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT_TOKENS = 1500


@dataclass(frozen=True)
class Plan:
    """What is trained for how long. Written to plan.json by the first run; later runs read it."""

    target: Shape = TARGET
    draft: Shape = DRAFT
    vocab_size: int = 4096
    length: int = 512
    long_length: int = 2048
    tokens_per_step: int = 4096
    steps: int = 2600
    growth: tuple[tuple[int, float], ...] = ((5, 0.85), (20, 1.0))  # layers, until which share of the steps
    decay_share: float = 0.25
    draft_steps: int = 1200
    distil_steps: int = 800
    written_tokens: int = 300_000
    written_share: float = 0.35
    scan: int | None = None  # how many candidate files to read; None = all
    seed: int = 0

    def target_schedule(self) -> Schedule:
        phases = tuple(
            Phase(layers, round(share * self.steps), self.length if share == 1.0 else self.length // 2)
            for layers, share in self.growth
        )
        return self.schedule(phases, self.steps)

    def draft_schedule(self, steps: int, warm: bool) -> Schedule:
        """`warm`: the draft is trained already, so the distillation goes gently."""
        schedule = self.schedule((Phase(self.draft.layers, steps, self.length),), steps)
        return replace(schedule, decay_from=steps // 3, matrix_lr=0.01, vector_lr=2e-3) if warm else schedule

    def schedule(self, phases: tuple[Phase, ...], steps: int) -> Schedule:
        decay_from = round(steps * (1 - self.decay_share))
        return Schedule(phases, decay_from, self.tokens_per_step, long_length=self.long_length)


SMOKE = Plan(
    target=Shape(layers=4, hidden=64, intermediate=128, heads=2, kv_heads=1),
    draft=Shape(layers=1, hidden=32, intermediate=64, heads=1, kv_heads=1),
    vocab_size=512,
    length=64,
    long_length=128,
    tokens_per_step=512,
    steps=16,
    growth=((2, 0.5), (4, 1.0)),
    draft_steps=8,
    distil_steps=8,
    written_tokens=512,
    scan=80,
)


@dataclass(frozen=True)
class Studio:
    """Where the work happens: the folder, the device, the number of processes."""

    out: Path
    plan: Plan
    device: torch.device
    processes: int

    @property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.out / "tokenizer")

    @property
    def corpus(self) -> Path:
        return self.out / "corpus.npy"

    def checkpoint(self, name: str) -> Path:
        return self.out / f"{name}.pt"

    def load(self, name: str, shape: Shape, schedule: Schedule) -> Run:
        torch.manual_seed(self.plan.seed)
        return load_run(self.checkpoint(name), shape, schedule, self.plan.vocab_size, self.device)

    def train(self, name: str, run: Run, shape: Shape, schedule: Schedule, loss_of: LossOf, corpus: Path) -> Run:
        return train(run, shape, schedule, loss_of, corpus, self.checkpoint(name), self.processes)


def corpus_stage(studio: Studio) -> None:
    if (studio.out / "sources.json").exists():
        return
    sources, held_out = collect(studio.plan.scan)
    save_sources(held_out, studio.out / "held_out.json")
    save_sources(sources, studio.out / "sources.json")
    typer.echo(f"corpus: {len(sources)} files, {sum(len(s.text) for s in sources) / 1e6:.1f} MB")


def tokenizer_stage(studio: Studio) -> None:
    if studio.corpus.exists():
        return
    sources = load_sources(studio.out / "sources.json")
    order = np.random.default_rng(studio.plan.seed).permutation(len(sources))
    train_tokenizer([sources[i].text for i in order[:2500]], studio.out / "tokenizer", studio.plan.vocab_size)
    ids = pack(studio.tokenizer, sources, studio.plan.seed)
    np.save(studio.corpus, ids)
    typer.echo(f"tokenizer: {len(ids) / 1e6:.2f}M tokens")


def target_stage(studio: Studio) -> Run:
    schedule = studio.plan.target_schedule()
    run = studio.load("target", studio.plan.target, schedule)
    if run.step >= schedule.steps:
        return run
    return studio.train("target", run, studio.plan.target, schedule, next_token_loss, studio.corpus)


def draft_stage(studio: Studio) -> Run:
    """The draft learns the corpus, then the target."""
    plan = studio.plan
    schedule = plan.draft_schedule(plan.draft_steps, warm=False)
    run = studio.load("draft", plan.draft, schedule)
    if run.step < schedule.steps:
        run = studio.train("draft", run, plan.draft, schedule, next_token_loss, studio.corpus)
    return run


def distil_stage(studio: Studio) -> Run:
    plan = studio.plan
    schedule = plan.draft_schedule(plan.distil_steps, warm=True)
    run = studio.load("distilled", plan.draft, schedule)
    if run.step >= schedule.steps:
        return run
    if run.step == 0:
        run.model.load_state_dict(draft_stage(studio).model.state_dict())
    teacher = target_stage(studio).model.bfloat16().eval().requires_grad_(False)
    lesson = lesson_file(studio, teacher)
    return studio.train("distilled", run, plan.draft, schedule, Distillation(teacher), lesson)


def lesson_file(studio: Studio, teacher: Any) -> Path:
    """What the draft is distilled on: the corpus and the target's own text, shuffled."""
    path = studio.out / "lesson.npy"
    if not path.exists():
        plan = studio.plan
        written = studio.out / "written.npy"
        rows = 64 if plan.written_tokens > 64 * plan.length else 4
        corpus = np.load(studio.corpus, mmap_mode="r")
        write_text(teacher, corpus, written, plan.written_tokens, plan.seed, rows, plan.length // 5, plan.length)
        tokens = plan.distil_steps * plan.tokens_per_step
        np.save(path, mix(np.load(written), corpus, tokens, plan.written_share, plan.seed, plan.long_length))
    return path


def export_stage(studio: Studio) -> None:
    """Write the folders. A target that has not grown to its full depth yet is grown here: the function is the same."""
    target, draft = target_stage(studio).model, distil_stage(studio).model
    if len(target.model.layers) != studio.plan.target.layers:
        target = grow(target, studio.plan.target, studio.plan.target.layers)
    pair = studio.out / "pair"
    export(target, studio.tokenizer, pair / "target")
    export(draft, studio.tokenizer, pair / "draft")
    (pair / "prompts").mkdir(exist_ok=True)
    for index, source in enumerate(held_out_sources(studio)):
        name = source.name.removesuffix(".py").replace("/", "_")
        text = shorten(source.text, studio.tokenizer, min(PROMPT_TOKENS, studio.plan.long_length * 3 // 4))
        (pair / "prompts" / f"{index:02d}_{name}.py.txt").write_text(text, encoding="utf-8")


def held_out_sources(studio: Studio) -> list[Source]:
    return sorted(load_sources(studio.out / "held_out.json"), key=lambda source: HELD_OUT.index(source.name))


def shorten(text: str, tokenizer: Any, tokens: int) -> str:
    """The longest run of whole lines from the start that has at most `tokens` tokens."""
    lines = text[:8000].splitlines(keepends=True)
    low, high = 0, len(lines)
    while low < high:
        middle = (low + high + 1) // 2
        fits = len(tokenizer("".join(lines[:middle]))["input_ids"]) <= tokens
        low, high = (middle, high) if fits else (low, middle - 1)
    return "".join(lines[:low])


def evaluate_stage(studio: Studio) -> dict[str, Any]:
    pair = studio.out / "pair"
    target, draft = (
        AutoModelForCausalLM.from_pretrained(pair / name, dtype=torch.bfloat16).to(studio.device)
        for name in ("target", "draft")
    )
    prompts = [path.read_text(encoding="utf-8") for path in sorted((pair / "prompts").iterdir())]
    texts = [torch.tensor(studio.tokenizer(prompt)["input_ids"], device=studio.device) for prompt in prompts]
    length = studio.plan.length
    figures = measure(target, draft, texts, length // 2, length)
    (studio.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    card = write_card(
        target,
        draft,
        figures,
        training_text(studio),
        corpus_tokens=len(np.load(studio.corpus, mmap_mode="r")),
        sources=load_sources(studio.out / "sources.json"),
        held_out=held_out_sources(studio),
        prompts=[path.name for path in sorted((pair / "prompts").iterdir())],
        prefix=length // 2,
        written=length - length // 2,
    )
    (pair / "README.md").write_text(card, encoding="utf-8")
    return figures


def training_text(studio: Studio) -> str:
    plan = studio.plan
    depths = ", ".join(f"{phase.layers} layers until step {phase.until}" for phase in plan.target_schedule().phases)
    tokens = plan.tokens_per_step
    return (
        f"Target: {plan.steps} steps of {tokens} tokens ({depths}), Muon and AdamW, seed {plan.seed}. "
        f"Draft: {plan.draft_steps} steps on the corpus, then {plan.distil_steps} steps of distillation, "
        f"{plan.written_share:.0%} of it on text that the target wrote."
    )


def steps_for(studio: Studio, minutes: float) -> Plan:
    """A plan whose target takes about `minutes`, from the time of a few steps at the first depth."""
    plan = replace(studio.plan, steps=10_000)
    schedule = plan.target_schedule()
    run = studio.load("trial", plan.target, schedule)
    workers = employ(run.model, next_token_loss, studio.corpus, studio.device, studio.processes)
    train_step(run, schedule, workers)
    began = time.monotonic()
    for _ in range(8):
        train_step(run, schedule, workers)
    a_step = (time.monotonic() - began) / 8
    workers.close()
    shares = np.diff([0.0, *(share for _, share in plan.growth)])
    depth = sum(layers * share for (layers, _), share in zip(plan.growth, shares, strict=True)) / plan.growth[0][0]
    steps = max(100, round(minutes * 60 / (a_step * depth)))
    return replace(plan, steps=steps, draft_steps=steps // 2, distil_steps=steps // 3)


def read_plan(path: Path, default: Plan) -> Plan:
    if not path.exists():
        return default
    stored = json.loads(path.read_text(encoding="utf-8"))
    shapes = {name: Shape(**stored.pop(name)) for name in ("target", "draft")}
    growth = tuple((int(layers), float(share)) for layers, share in stored.pop("growth"))
    return Plan(**stored, **shapes, growth=growth)


def land(studio: Studio) -> Plan:
    """A plan in which the decay begins at the step that the target has reached."""
    plan = studio.plan
    step = studio.load("target", plan.target, plan.target_schedule()).step
    steps = min(plan.steps, max(step + 1, round(step / (1 - plan.decay_share))))
    deepest = plan.target.layers
    grown = tuple((n, s * plan.steps / steps) for n, s in plan.growth if n < deepest and s * plan.steps <= step)
    return replace(plan, steps=steps, growth=(*grown, (deepest, 1.0)))


def main(
    out: Annotated[Path, typer.Option(help="Folder of all results; the same folder resumes.")] = Path("runs/pair"),
    minutes: Annotated[float | None, typer.Option(help="Size the target's training to this time.")] = None,
    steps: Annotated[int | None, typer.Option(help="Or give the target's steps.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    processes: Annotated[int, typer.Option(help="Processes on a CPU; 0 = one a core.")] = 0,
    decay_now: Annotated[bool, typer.Option("--decay-now", help="Begin the decay at the checkpoint's step.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="A tiny pair, to try the recipe.")] = False,
) -> None:
    """Train, distil, export and measure the pair."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    count = 1 if name != "cpu" or smoke else processes or len(os.sched_getaffinity(0))
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1 if count > 1 else torch.get_num_threads())
    default = SMOKE if smoke else Plan(tokens_per_step=4096 if name == "cpu" else 32768)
    fresh = not (out / "plan.json").exists()
    studio = Studio(out, read_plan(out / "plan.json", default), torch.device(name), count)
    corpus_stage(studio)
    tokenizer_stage(studio)
    if steps is not None:
        studio = replace(studio, plan=replace(studio.plan, steps=steps))
    elif minutes is not None and fresh:
        studio = replace(studio, plan=steps_for(studio, minutes))
    if decay_now:
        studio = replace(studio, plan=land(studio))
    (out / "plan.json").write_text(json.dumps(asdict(studio.plan), indent=2) + "\n", encoding="utf-8")
    export_stage(studio)
    typer.echo(json.dumps(evaluate_stage(studio)))


if __name__ == "__main__":
    typer.run(main)
