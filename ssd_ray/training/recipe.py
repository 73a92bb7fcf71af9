"""A draft for any target: the target writes, a few shapes are tried, one is trained, written out and judged."""

from __future__ import annotations

import logging
import time
from contextlib import closing
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ssd_ray.models.describe import at_best
from ssd_ray.models.loader import load_model
from ssd_ray.training.acceptance import figures
from ssd_ray.training.config import TrainingConfig
from ssd_ray.training.drafts import Costs, Shape, candidates, directions, export, make_draft, worth
from ssd_ray.training.lessons import Lessons, Writing, write_parts
from ssd_ray.training.plan import PROMPT, Checked, Plan, check
from ssd_ray.training.runs import Run, load_run, train, train_step
from ssd_ray.training.schedules import Schedule, optimizers
from ssd_ray.training.workers import employ

logger = logging.getLogger(__name__)

WRITING_SHARE = 0.4
"""Of the time, what the target may take to write."""

TRIAL_SHARE = 0.15
"""Of the time, what trying the shapes may take."""

RATE = 1e-3
"""Of learning, before it falls."""

TRIAL_STEPS = 4, 40
"""Steps of a trial: at least and at most."""

DIRECTION_ROWS = 8
"""Texts of the exam that tell which directions of the residual stream matter."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A draft that is there.

    Attributes:
        folder: where.
        target: for whom.
        shape: what it is.
        step: what a step of it takes of a verification.
        before, after: figures of :func:`~ssd_ray.training.acceptance.figures`, as it began and as it is.
    """

    folder: str
    target: str
    shape: Shape
    step: float
    before: dict[str, Any]
    after: dict[str, Any]

    def advice(self) -> str:
        """How to serve it, and what to expect, in a line."""
        cases = []
        for name, words in (("greedy", "greedy"), ("temperature_1", "at temperature 1")):
            waiting, hidden = at_best(self.after[name]["acceptance"], self.step)
            cases.append(f"{words} {waiting:.1f} x with sd and at best {hidden:.1f} x with ssd")
        command = f"ssd-ray generate --target {self.target} --draft {self.folder}"
        return f"serve with `{command}`: expect, to plain decoding's 1 x, {'; '.join(cases)}"

    def lines(self) -> list[str]:
        """What it is, what it was and is worth, and the advice."""
        shape = f"{self.shape.layers} layers, width {self.shape.width}: a step takes {self.step:.0%} of a verification"
        rows = [f"{name.replace('_', ' ')}: {_gain(self.before[name], self.after[name])}" for name in self.after]
        return [shape, *rows, self.advice()]

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON takes it."""
        return asdict(self) | {"advice": self.advice()}


def _gain(old: dict[str, Any], new: dict[str, Any]) -> str:
    rounds = [
        f"{old['tokens_per_round'][k]:.2f} -> {tokens:.2f} with {k} drafted"
        for k, tokens in new["tokens_per_round"].items()
    ]
    return f"{old['acceptance']:.0%} -> {new['acceptance']:.0%} accepted, tokens a round {', '.join(rounds)}"


def train_draft(config: TrainingConfig) -> Trained:
    """Train a draft, or go on with one; see the fields of the configuration.

    Raises:
        ConfigError, ModelError, ResourceError: before anything is started; see :func:`~ssd_ray.training.plan.check`.
        StoppedError: a signal came; the same call goes on.
    """
    checked, plan = check(config)
    if "after" not in plan:
        Training(checked, plan).run()
    names = ("step", "before", "after")
    shape = Shape(**plan["shape"])
    return Trained(str(config.folder), checked.target.source, shape, **{name: plan[name] for name in names})


class Training:
    """The stages. Each keeps what it found in the plan, and is passed over when that is there."""

    def __init__(self, checked: Checked, plan: Plan) -> None:
        self.checked, self.plan, self.config = checked, plan, checked.config
        self.work = self.config.work
        self.work.mkdir(parents=True, exist_ok=True)
        plan.keep("identity", checked.identity)
        np.save(self.work / "prompts.npy", checked.ids)
        self.target = load_model(
            self.config.target, role="target", device=checked.device, dtype=self.config.dtype,
            trust_remote_code=self.config.trust_remote_code,
        ).requires_grad_(False).eval()  # fmt: skip
        self.costs = Costs.of(self.target.config, checked.target.parameters)
        self.writing = Writing(
            self.work / "lessons", self.work / "prompts.npy", checked.rows, min(PROMPT, checked.length // 4),
            checked.length, self.config.seed, checked.ends,
        )  # fmt: skip

    def run(self) -> None:
        """All stages."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if self.checked.processes > 1 else threads)
        try:
            self.write()
            shape = self.choose()
            self.learn(shape)
        finally:
            torch.set_num_threads(threads)

    def write(self) -> None:
        """The target's texts: the exam, by whose time the others are counted, and the lessons."""
        if self.writing.missing(1):
            start = time.monotonic()
            write_parts(self.writing, self.target, [0], 1)
            self.plan.keep("seconds_of_a_part", time.monotonic() - start)
        if "parts" not in self.plan:
            rows, texts = self.writing.rows, self.config.texts
            each = self.plan.known.get("seconds_of_a_part", 60.0) / self.checked.processes
            room = int(60 * self.config.minutes * WRITING_SHARE / each)
            self.plan.keep("parts", 1 + max(1, -(-texts // rows) if texts else room))
        write_parts(self.writing, self.target, self.writing.missing(self.plan["parts"]), self.checked.processes)

    @property
    def exam(self) -> np.ndarray:
        """Texts that are not learned from."""
        lesson: np.ndarray = np.load(self.writing.path(0), mmap_mode="r")
        return lesson

    @property
    def lessons(self) -> Lessons:
        """The others."""
        return Lessons([self.writing.path(part) for part in range(1, self.plan["parts"])], self.config.seed)

    def make(self, shape: Shape) -> Any:
        """A draft as it begins."""
        basis = None
        if shape.width < self.costs.hidden:
            ids = torch.from_numpy(self.exam["id"][:DIRECTION_ROWS].astype(np.int64))
            basis = directions(self.target, ids, shape.width)
        return make_draft(self.target, shape, basis, self.config.seed).to(self.checked.device)

    def judge(self, draft: Any) -> dict[str, Any]:
        """Figures along the exam."""
        return figures(draft, self.exam, self.writing.prompt)

    def schedule(self, steps: int) -> Schedule:
        """Rates that fall from half of the steps on."""
        length = self.writing.length
        return Schedule(
            lengths=((length, steps),), decay_from=steps // 2, tokens_per_step=self.checked.tokens_per_step,
            long_length=length, warmup=min(20, 1 + steps // 10), matrix_lr=None, vector_lr=RATE,
        )  # fmt: skip

    def choose(self) -> Shape:
        """The shape whose worth is highest after a few steps; it is trained from its beginning then."""
        if "shape" not in self.plan:
            trials = {shape: self.try_out(shape) for shape in candidates(self.costs)}
            shape = max(trials, key=lambda each: trials[each]["worth"])
            for name in ("before", "seconds_of_a_step"):
                self.plan.keep(name, trials[shape][name])
            self.plan.keep("step", self.costs.step(shape))
            self.plan.keep("shape", asdict(shape))
        return Shape(**self.plan["shape"])

    def try_out(self, shape: Shape) -> dict[str, Any]:
        """Train a shape for a moment, and judge it."""
        name = f"trial of {shape.layers} layers, width {shape.width}"
        if name not in self.plan:
            begun = self.begin(f"{name}, begun", shape)
            draft = self.train(name, shape, begun["steps"])
            after = self.judge(draft)
            gain = sum(worth(each["acceptance"], self.costs.step(shape)) for each in after.values()) / len(after)
            logger.info("%s: worth %.2f", name, gain)
            self.plan.keep(name, begun | {"after": after, "worth": gain})
        return dict(self.plan[name])

    def begin(self, name: str, shape: Shape) -> dict[str, Any]:
        """What a shape is before it is trained, and how many steps of its trial there is time for."""
        if name not in self.plan:
            draft = self.make(shape)
            a_step = self._seconds_of_a_step(draft)
            least, most = TRIAL_STEPS
            room = 60 * self.config.minutes * TRIAL_SHARE / len(candidates(self.costs)) / a_step
            steps = min(most, max(least, self.config.steps // 10 if self.config.steps else int(room)))
            self.plan.keep(name, {"before": self.judge(draft), "seconds_of_a_step": a_step, "steps": steps})
        return dict(self.plan[name])

    def train(self, name: str, shape: Shape, steps: int) -> Any:
        """A draft after so many steps, of which a checkpoint of this name has some if it was begun before."""
        schedule, checkpoint = self.schedule(steps), self.work / f"{name}.pt"
        run = load_run(checkpoint, lambda _: self.make(shape), shape.layers, schedule)
        return train(run, schedule, self.lessons, checkpoint, self.checked.processes, name=name).model

    def _seconds_of_a_step(self, draft: Any) -> float:
        """What a step takes once processes run, on a copy."""
        copy, schedule = deepcopy(draft), self.schedule(2)
        run = Run(copy, optimizers(copy, schedule))
        with closing(employ(copy, self.lessons, self.checked.processes)) as workers:
            train_step(run, schedule, workers)
            start = time.monotonic()
            train_step(run, schedule, workers)
            return time.monotonic() - start

    def learn(self, shape: Shape) -> None:
        """Train the draft, write it out and judge it."""
        if "training_steps" not in self.plan:
            room = 60 * self.config.minutes * (1 - WRITING_SHARE - TRIAL_SHARE) / self.plan["seconds_of_a_step"]
            self.plan.keep("training_steps", self.config.steps or max(TRIAL_STEPS[0], int(room)))
        draft = self.train("training", shape, self.plan["training_steps"])
        after = self.judge(draft)
        export(draft, self.checked.tokenizer, self.config.folder, getattr(torch, self.checked.target.dtype))
        self.plan.keep("after", after)
