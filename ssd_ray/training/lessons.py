"""What a draft is taught: texts that its target wrote, with the law of every next token as the target has it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from ssd_ray.errors import EngineError, StoppedError
from ssd_ray.sampling.noise import gumbel
from ssd_ray.training.runs import progress_bar, stop_asked
from ssd_ray.training.texts import windows
from ssd_ray.training.workers import begin_work, start_deaf

HEATS = (0.0, 1.0)
"""Temperatures at which rows are written, by turns: drafts are asked for both."""

TOP = 32
"""Of a law, how many of the likeliest tokens are kept; the others are one."""

LOGITS_AT_ONCE = 1 << 26

WHOLE_VOCABULARY = 16_384
"""Above so many tokens, a step of training looks at a part of the draft's logits."""

SAMPLED = 4096
"""How many tokens then stand for those that no law of the batch names."""


@dataclass(frozen=True)
class Writing:
    """How lessons are written.

    Attributes:
        folder: of the parts, one file each.
        prompts: a file of token ids that prompts are cut from, [tokens]; its first sixteenth is for the exam.
        rows: texts of a part.
        prompt: tokens of a prompt. What it is short of, the target draws at temperature 1.
        length: tokens of a text.
        seed: names the prompts and the noise.
        ends: tokens behind which nothing counts.
    """

    folder: Path
    prompts: Path
    rows: int
    prompt: int
    length: int
    seed: int
    ends: tuple[int, ...] = ()

    def path(self, part: int) -> Path:
        """The file of a part; part 0 is the exam."""
        return self.folder / f"{part:05d}.npy"

    @property
    def parts(self) -> list[Path]:
        """What has been written, the exam first."""
        return sorted(self.folder.glob("[0-9]*.npy"))

    def missing(self, count: int) -> list[int]:
        """Parts below ``count`` that have not been written."""
        return [part for part in range(count) if not self.path(part).exists()]

    def cut(self, part: int) -> Tensor:
        """The prompts of a part, int64 [rows, at most prompt]: another stretch of the text for the exam."""
        ids = np.load(self.prompts, mmap_mode="r")
        size = min(self.prompt, len(ids))
        border = max(size + 1, len(ids) // 16)
        apart = len(ids) > 2 * border
        stretch = (ids[:border] if part == 0 else ids[border:]) if apart else ids
        return windows(stretch, (self.seed + 1) * 1_000_003 + part * self.rows, self.rows, size)

    def write(self, model: Any, part: int) -> None:
        """Write a part, whole or not at all."""
        seeds = torch.arange(self.rows) + (part * self.rows + (self.seed << 32))
        heats = torch.tensor([HEATS[row % len(HEATS)] for row in range(self.rows)])
        lesson = write(model, self.cut(part), self.prompt, self.length, heats, seeds, self.ends)
        unfinished = self.path(part).with_suffix(".tmp")
        with unfinished.open("wb") as file:
            np.save(file, lesson)
        unfinished.replace(self.path(part))


def lesson_type(top: int) -> np.dtype:
    """A token, whether the law of the next one counts, and that law: its likeliest tokens and their log-probabilities
    in nats, the likeliest first."""
    return np.dtype([("id", "<i4"), ("counts", "?"), ("top", "<i4", (top,)), ("logp", "<f2", (top,))])


@torch.inference_mode()
def write(
    model: Any, prompts: Tensor, drawn: int, length: int, heats: Tensor, seeds: Tensor, ends: Iterable[int] = ()
) -> np.ndarray:
    """Have a model go on with prompts.

    Args:
        prompts: int64 [rows, tokens].
        drawn: position until which tokens that no prompt has are drawn at temperature 1.
        heats: temperatures from there on, float [rows]; 0 is greedy.
        seeds: name each row's noise, int64 [rows].
        ends: tokens behind which nothing counts.

    Returns:
        [rows, length] of :func:`lesson_type`.
    """
    device = model.device
    cache = DynamicCache(config=model.config)
    size = model.config.get_text_config().vocab_size
    top, rows = min(TOP, size), len(prompts)
    lesson = np.zeros((rows, length), lesson_type(top))
    ids, position = prompts.to(device), 0
    over = torch.zeros(rows, dtype=torch.bool, device=device)
    while True:
        for piece in torch.split(ids, max(1, LOGITS_AT_ONCE // (rows * size)), dim=1):
            # The cache by its place: what it is called depends on the version of transformers.
            logits = model(piece, None, None, cache, use_cache=True).logits.float()
            laws = logits.log_softmax(-1).topk(top)
            part = lesson[:, position : position + piece.shape[1]]
            part["id"], part["counts"] = piece.cpu().numpy(), ~over.cpu().numpy()[:, None]
            part["top"], part["logp"] = laws.indices.cpu().numpy(), laws.values.cpu().numpy()
            position += piece.shape[1]
        if position == length:
            return lesson
        ids = _next(logits[:, -1], position, torch.ones_like(heats) if position < drawn else heats, seeds)
        over |= torch.isin(ids[:, 0], torch.tensor([*ends], device=device, dtype=torch.int64))


def _next(logits: Tensor, position: int, heats: Tensor, seeds: Tensor) -> Tensor:
    """The tokens at a position, int64 [rows, 1]."""
    hot = heats.nonzero()[:, 0]
    places = torch.full_like(hot, position)
    noise = gumbel(seeds[hot], places, logits.shape[-1], device=logits.device)
    logits[hot.to(logits.device)] += noise * heats[hot].to(logits.device)[:, None]
    return logits.argmax(-1, keepdim=True)


def write_parts(writing: Writing, model: Any, parts: list[int], processes: int) -> None:
    """Write parts; on a CPU in processes of one thread each, which share the model.

    Raises:
        StoppedError: a signal came. What is whole is kept.
    """
    writing.folder.mkdir(parents=True, exist_ok=True)
    with stop_asked() as stop, progress_bar() as progress:
        total = len(parts) * writing.rows * writing.length
        task = progress.add_task("writing", total=total, figures="tokens")
        advance = partial(progress.advance, task, writing.rows * writing.length)
        if processes > 1 and len(parts) > 1 and model.device.type == "cpu":
            _write_beside(writing, model, parts, min(processes, len(parts)), stop, advance)
        else:
            for part in parts:
                if stop():
                    break
                writing.write(model, part)
                advance()
        if stop():
            left = sum(not writing.path(part).exists() for part in parts)
            raise StoppedError(f"writing: stopped with {left} of {len(parts)} parts to do; the same command goes on")


def _write_beside(
    writing: Writing, model: Any, parts: list[int], count: int, stop: Callable[[], bool], advance: Callable[[], None]
) -> None:
    context = torch.multiprocessing.get_context("spawn")
    model.share_memory()
    writers = [
        context.Process(target=_writer, args=(writing, model, parts[i::count]), daemon=True) for i in range(count)
    ]
    start_deaf(writers)
    left = set(parts)
    try:
        while not stop() and any(writer.is_alive() for writer in writers):
            time.sleep(0.2)
            for part in [part for part in left if writing.path(part).exists()]:
                left.discard(part)
                advance()
    finally:
        for writer in writers:
            writer.kill()
            writer.join()
    if not stop() and any(writer.exitcode for writer in writers):
        raise EngineError("a process in which the target wrote text ended early; it may have run out of memory")


def _writer(writing: Writing, model: Any, parts: list[int]) -> None:
    begin_work()
    for part in parts:
        writing.write(model, part)


class Lessons:
    """Parts that have been written, in an order of its own for each time that they are gone through."""

    def __init__(self, paths: list[Path], seed: int = 0) -> None:
        self.paths, self.seed = paths, seed

    @cached_property
    def parts(self) -> list[np.ndarray]:
        """The parts, [rows, length] each, of :func:`lesson_type`."""
        return [np.load(path, mmap_mode="r") for path in self.paths]

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "seed": self.seed}

    @property
    def rows(self) -> int:
        """Texts, all together."""
        return sum(map(len, self.parts))

    def take(self, first: int, rows: int) -> np.ndarray:
        """Rows in the order of training, [rows, length]."""
        size, total = len(self.parts[0]), self.rows
        wanted = [_order(self.seed, number // total, total)[number % total] for number in range(first, first + rows)]
        return np.stack([self.parts[row // size][row % size] for row in wanted])

    def loss(self, model: Any, first: int, rows: int, length: int) -> Tensor:
        """KL(target || draft) at temperature 1, mean over the positions that count, in nats. See :class:`Law`."""
        law = Law.of(self.take(first, rows)[:, :length], next(model.parameters()).device)
        return law.divergence(model, seed=(self.seed << 32) + first)


@lru_cache(maxsize=4)
def _order(seed: int, turn: int, total: int) -> np.ndarray:
    return np.random.default_rng((seed, turn)).permutation(total)


@dataclass(frozen=True)
class Law:
    """Laws of next tokens.

    Attributes:
        ids: the texts, int64 [rows, length].
        counts: whether the law of the next token counts, bool [rows, length].
        top: its likeliest tokens, int64 [counted, top].
        p: their probabilities, float32; what is short of 1 is that of all others together.
    """

    ids: Tensor
    counts: Tensor
    top: Tensor
    p: Tensor

    @classmethod
    def of(cls, lesson: np.ndarray, device: torch.device) -> Law:
        """Of an array of :func:`lesson_type`."""
        ids, counts = (torch.from_numpy(np.ascontiguousarray(lesson[name])).to(device) for name in ("id", "counts"))
        top, logp = (torch.from_numpy(lesson[name][lesson["counts"]]).to(device) for name in ("top", "logp"))
        return cls(ids.long(), counts, top.long(), logp.float().exp())

    def hidden(self, model: Any) -> Tensor:
        """What a model has before its head where laws count, [counted, hidden]."""
        output: Tensor = model.model(input_ids=self.ids, use_cache=False).last_hidden_state
        return output[self.counts]

    def divergence(self, model: Any, seed: int) -> Tensor:
        """KL(law || model), mean over the positions that count.

        With a large vocabulary most of the time would go to logits that hardly matter. So those that a law of the batch
        names are computed, and of the others a sample, which stands for all of them in the sum that normalises.
        """
        hidden, weight = self.hidden(model), model.lm_head.weight
        named, places = torch.unique(self.top, return_inverse=True)
        others = weight.shape[0] - len(named)
        columns, log_weight = named, torch.zeros(len(named), device=hidden.device)
        if others and weight.shape[0] > WHOLE_VOCABULARY:
            random = torch.Generator().manual_seed(seed % (1 << 63))
            sample = torch.randint(weight.shape[0], (SAMPLED,), generator=random).to(hidden.device)
            sample = sample[~torch.isin(sample, named)]
            share = torch.full((len(sample),), others / max(1, len(sample)), device=hidden.device).log()
            columns, log_weight = torch.cat([named, sample]), torch.cat([log_weight, share])
        elif others:
            columns, places = torch.arange(weight.shape[0], device=hidden.device), self.top
            log_weight = torch.zeros(1, device=hidden.device)
        logits = (hidden @ weight[columns].to(hidden.dtype).T).float()
        log_q = logits.gather(1, places) - (logits + log_weight).logsumexp(-1, keepdim=True)
        return _divergence(self.p, log_q)


def _divergence(p: Tensor, log_q: Tensor) -> Tensor:
    """KL of laws of some tokens and of one that stands for all others; p, log_q: [n, tokens]."""
    rest_p = (1.0 - p.sum(-1)).clamp(min=0.0)
    rest_q = (1.0 - log_q.exp().sum(-1)).clamp(min=1e-6)
    named = torch.special.xlogy(p, p) - p * log_q
    rest = torch.special.xlogy(rest_p, rest_p) - rest_p * rest_q.log()
    divergence: Tensor = (named.sum(-1) + rest).mean()
    return divergence
