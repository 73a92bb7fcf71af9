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
              This is what lifts acceptance: a draft need not know Python, it has to know the target. This stage alone,
              for a target that is there, is `ssd-ray train-draft`.
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
from pair_recipe.measure import measure
from pair_recipe.models import DRAFT, TARGET, Shape, grow, new_model
from pair_recipe.vocabulary import pack, train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from ssd_ray.training.drafts import export
from ssd_ray.training.lessons import Lessons, Writing, write_parts
from ssd_ray.training.runs import Run, load_run, train, train_step
from ssd_ray.training.schedules import Schedule, optimizers, precision
from ssd_ray.training.texts import Text
from ssd_ray.training.workers import Batches, employ

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

    @property
    def depths(self) -> list[tuple[int, int]]:
        """How deep the target is until which step."""
        return [(layers, round(share * self.steps)) for layers, share in self.growth]

    def target_schedule(self) -> Schedule:
        shares = [share for _, share in self.growth]
        lengths = [(self.length if share == 1.0 else self.length // 2, round(share * self.steps)) for share in shares]
        return self.schedule(tuple(lengths), self.steps)

    def draft_schedule(self, steps: int) -> Schedule:
        return self.schedule(((self.length, steps),), steps)

    def distil_schedule(self) -> Schedule:
        """The draft is trained already, so the distillation goes gently."""
        steps = self.distil_steps
        gentle = {"decay_from": steps // 3, "matrix_lr": 0.01, "vector_lr": 2e-3, "long_length": self.length}
        return replace(self.draft_schedule(steps), **gentle)

    def schedule(self, lengths: tuple[tuple[int, int], ...], steps: int) -> Schedule:
        decay_from = round(steps * (1 - self.decay_share))
        return Schedule(lengths, decay_from, self.tokens_per_step, long_length=self.long_length)


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

    def load(self, name: str, shape: Shape, layers: int, schedule: Schedule) -> Run:
        torch.manual_seed(self.plan.seed)
        make = lambda depth: new_model(shape, depth, self.plan.vocab_size, self.plan.long_length).to(self.device)  # noqa: E731
        return load_run(self.checkpoint(name), make, layers, schedule)

    def load_target(self, name: str = "target") -> Run:
        return self.load(name, self.plan.target, self.plan.depths[0][0], self.plan.target_schedule())

    def train(self, name: str, run: Run, schedule: Schedule, batches: Batches, until: int | None = None) -> Run:
        return train(run, schedule, batches, self.checkpoint(name), self.processes, name=name, until=until)


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
    """The target, grown when it is due."""
    plan, run = studio.plan, studio.load_target()
    schedule = plan.target_schedule()
    for layers, until in plan.depths:
        if run.step >= until:
            continue
        if layers != run.layers:
            run.model = grow(run.model, plan.target, layers).to(studio.device)
            run.optimizers, run.changed_at = optimizers(run.model, schedule), run.step
        run = studio.train("target", run, schedule, Text(studio.corpus), until)
    return run


def draft_stage(studio: Studio) -> Run:
    """The draft learns the corpus."""
    plan = studio.plan
    schedule = plan.draft_schedule(plan.draft_steps)
    run = studio.load("draft", plan.draft, plan.draft.layers, schedule)
    return studio.train("draft", run, schedule, Text(studio.corpus)) if run.step < schedule.steps else run


def distil_stage(studio: Studio) -> Run:
    """The draft learns the target."""
    plan = studio.plan
    schedule = plan.distil_schedule()
    run = studio.load("distilled", plan.draft, plan.draft.layers, schedule)
    if run.step >= schedule.steps:
        return run
    if run.step == 0:
        run.model.load_state_dict(draft_stage(studio).model.state_dict())
    return studio.train("distilled", run, schedule, lessons(studio))


def lessons(studio: Studio) -> Lessons:
    """What the draft is distilled on: corpus that the target has read, and how it went on."""
    plan = studio.plan
    rows = 64 if plan.written_tokens > 64 * plan.length else 4
    prompt = round(plan.length * (1 - plan.written_share))
    writing = Writing(studio.out / "lessons", studio.corpus, rows, prompt, plan.length, plan.seed)
    parts = range(1, 2 + plan.written_tokens // (rows * (plan.length - prompt)))
    if missing := [part for part in parts if not writing.path(part).exists()]:
        teacher = target_stage(studio).model.to(precision(studio.device)).eval().requires_grad_(False)
        write_parts(writing, teacher, missing, studio.processes)
    return Lessons([writing.path(part) for part in parts], plan.seed)


def export_stage(studio: Studio) -> None:
    """Write the folders. A target that has not grown to its full depth yet is grown here: the function is the same."""
    target, draft = target_stage(studio).model, distil_stage(studio).model
    if len(target.model.layers) != studio.plan.target.layers:
        target = grow(target, studio.plan.target, studio.plan.target.layers)
    pair = studio.out / "pair"
    export(target, studio.tokenizer, pair / "target", torch.bfloat16)
    export(draft, studio.tokenizer, pair / "draft", torch.bfloat16)
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
    depths = ", ".join(f"{layers} layers until step {until}" for layers, until in plan.depths)
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
    run = replace(studio, plan=plan).load_target("trial")
    workers = employ(run.model, Text(studio.corpus), studio.processes)
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
    step = studio.load_target().step
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
