"""Training a draft: what it is made of, what it is taught, what it is worth, and what is refused before it begins."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from ssd_ray.errors import ConfigError, ModelError, SsdRayError, StoppedError, UnsupportedModelError
from ssd_ray.models.info import check_pair
from ssd_ray.models.loader import load_runner
from ssd_ray.training import lessons as lessons_module
from ssd_ray.training import plan as plan_module
from ssd_ray.training import recipe
from ssd_ray.training.acceptance import accepted, tokens_per_round
from ssd_ray.training.config import TrainingConfig
from ssd_ray.training.drafts import SHAPES, Costs, Shape, candidates, make_draft, worth
from ssd_ray.training.lessons import HEATS, Law, Lessons, Writing, write, write_parts
from ssd_ray.training.recipe import train_draft
from ssd_ray.training.runs import Run, load_run, train
from ssd_ray.training.schedules import Schedule, optimizers, trained
from tests.support.tiny import save_model, tiny_model

COSTS = st.builds(
    Costs,
    hidden=st.integers(64, 8192),
    depth=st.integers(1, 100),
    a_layer=st.integers(10_000, 10**9),
    head=st.integers(10_000, 2 * 10**9),
    total=st.just(0),
).map(lambda costs: replace(costs, total=costs.head + costs.depth * costs.a_layer))


@given(costs=COSTS)
def test_shapes_are_as_deep_as_a_step_may_cost(costs: Costs) -> None:
    shapes = candidates(costs)
    assert shapes[0].width == costs.hidden
    for shape, (_, most) in zip(shapes, SHAPES, strict=False):
        assert costs.step(shape) <= most * (1 + 1e-9) or shape.layers == 1
        deeper = replace(shape, layers=shape.layers + 1)
        assert costs.step(deeper) > most * (1 - 1e-9) or shape.layers == max(1, costs.depth // 2)


@given(costs=COSTS, layers=st.integers(1, 8))
def test_a_large_vocabulary_leaves_room_for_fewer_layers(costs: Costs, layers: int) -> None:
    larger = replace(costs, head=2 * costs.head, total=costs.total + costs.head)
    assert costs.step(Shape(layers, costs.hidden)) < costs.step(Shape(layers + 1, costs.hidden))
    assert candidates(larger)[0].layers <= candidates(costs)[0].layers


def test_a_draft_is_worth_more_the_cheaper_and_the_better_it_is() -> None:
    assert worth(0.8, 0.1) > worth(0.8, 0.2) > worth(0.7, 0.2) > worth(0.1, 0.9) > worth(0.0, 0.9) == 1.0


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_draft_with_all_layers_and_directions_is_its_target(architecture: str, turned: bool) -> None:
    overrides = {"sliding_window": None} if architecture in ("mistral", "qwen2") else {}
    target = tiny_model(architecture, layers=3, use_sliding_window=False, **overrides)
    with torch.no_grad():
        for weight in target.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    basis = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q if turned else None
    draft = make_draft(target, Shape(3, 32), basis)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(draft(ids).logits, target(ids).logits, atol=1e-4, rtol=1e-4)


def test_what_is_no_llama_gets_a_draft_of_its_vocabulary() -> None:
    target = tiny_model("gpt2")
    draft = make_draft(target, Shape(2, 16), torch.eye(32)[:, :16])
    assert draft.config.model_type == "llama"
    assert draft(torch.arange(5)[None]).logits.shape == (1, 5, 96)


def written(target: Any, rows: int = 4, length: int = 24) -> np.ndarray:
    heats = torch.tensor([HEATS[row % len(HEATS)] for row in range(rows)])
    return write(target, torch.arange(4).repeat(rows, 1), 4, length, heats, torch.arange(rows))


def test_lessons_have_the_targets_own_laws() -> None:
    target = tiny_model()
    lesson = written(target)
    logp = target(torch.from_numpy(lesson["id"].astype(np.int64))).logits.log_softmax(-1)
    np.testing.assert_allclose(lesson["logp"], logp.topk(32).values.detach(), atol=2e-2)
    np.testing.assert_array_equal(lesson["id"][0::2, 5:], lesson["top"][0::2, 4:-1, 0])  # greedy ones
    assert (lesson["id"][1::2, 5:] != lesson["top"][1::2, 4:-1, 0]).any()
    assert lesson["counts"].all()


def test_behind_an_end_nothing_counts() -> None:
    target = tiny_model()
    end = int(written(target)["id"][0, 8])
    lesson = write(target, torch.arange(4)[None], 4, 24, torch.zeros(1), torch.zeros(1, dtype=torch.int64), [end])
    first = 4 + int(np.argmax(lesson["id"][0, 4:] == end))
    assert lesson["counts"][0].tolist() == [at < first for at in range(24)]


def test_the_loss_is_the_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = tiny_model(vocab=30), tiny_model(vocab=30, seed=1)
    lesson = written(target)
    law = Law.of(lesson, torch.device("cpu"))
    ids = torch.from_numpy(lesson["id"].astype(np.int64))
    p, q = (model(ids).logits.log_softmax(-1).flatten(0, 1) for model in (target, draft))
    whole = F.kl_div(q, p, log_target=True, reduction="batchmean").item()
    assert law.divergence(draft, 0).item() == pytest.approx(whole, abs=0.02)

    few = Law(
        law.ids, law.counts, law.top[:, :4], law.p[:, :4]
    )  # the others are one then, and a part of the logits does
    exact = few.divergence(draft, 0).item()
    monkeypatch.setattr(lessons_module, "WHOLE_VOCABULARY", 0)
    assert few.divergence(draft, 0).item() == pytest.approx(exact, rel=0.05)


def test_chances_are_those_of_shared_noise() -> None:
    target, draft = tiny_model(vocab=30), tiny_model(vocab=30, seed=1)
    lesson = written(target)
    chances = accepted(draft, lesson, 4)
    ids = torch.from_numpy(lesson["id"].astype(np.int64))
    p, q = (model(ids).logits.detach() for model in (target, draft))
    assert chances[0].tolist() == (q[0, 3:-1].argmax(-1) == ids[0, 4:]).double().tolist()
    noise = -torch.log(torch.empty(4000, 1, 30).exponential_(generator=torch.Generator().manual_seed(0)))
    agree = ((p[1, 3:-1] + noise).argmax(-1) == (q[1, 3:-1] + noise).argmax(-1)).double().mean(0)
    np.testing.assert_allclose(chances[1], agree, atol=0.04)


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 7))
def test_tokens_of_a_round_are_those_of_a_simulation(right: list[bool], lookahead: int) -> None:
    rounds = tokens = position = 0
    while position + lookahead < len(right):
        run = next((k for k in range(lookahead) if not right[position + k]), lookahead)
        position, tokens, rounds = position + run + 1, tokens + run + 1, rounds + 1
    assert tokens_per_round(np.array([right], dtype=float), lookahead) == pytest.approx(tokens / max(1, rounds))


def lessons_of(target: Any, folder: Path) -> Lessons:
    for part in range(2):
        np.save(folder / f"{part}.npy", written(target, 8, 32))
    return Lessons([folder / "0.npy", folder / "1.npy"])


SCHEDULE = Schedule(
    lengths=((32, 8),), decay_from=4, tokens_per_step=128, long_length=32, warmup=2, matrix_lr=None, vector_lr=1e-3
)


@pytest.mark.parametrize("matrix_lr", [None, 0.02])
def test_a_run_that_goes_on_ends_as_one_that_was_not_disturbed(tmp_path: Path, matrix_lr: float | None) -> None:
    target, schedule = tiny_model(), replace(SCHEDULE, matrix_lr=matrix_lr)
    lessons, make = lessons_of(target, tmp_path), lambda layers: make_draft(target, Shape(layers, 32), None)
    whole = train(load_run(tmp_path / "whole.pt", make, 1, schedule), schedule, lessons)
    for until in (3, 8):
        parted = load_run(tmp_path / "parted.pt", make, 1, schedule)
        train(parted, schedule, lessons, tmp_path / "parted.pt", until=until)
    assert (parted.step, parted.row, parted.tokens) == (8, 32, 1024)
    for name, weight in trained(whole.model).items():
        assert torch.equal(weight, trained(parted.model)[name]), name


def test_a_signal_ends_a_run_with_what_was_done(tmp_path: Path) -> None:
    target = tiny_model()
    lessons = lessons_of(target, tmp_path)

    class Interrupted(Lessons):
        def loss(self, *arguments: Any) -> Any:
            signal.raise_signal(signal.SIGTERM)
            return lessons.loss(*arguments)

    draft = make_draft(target, Shape(1, 32), None)
    run = Run(draft, optimizers(draft, SCHEDULE))
    with pytest.raises(StoppedError, match="stopped at step 1 of 8"):
        train(run, SCHEDULE, Interrupted(lessons.paths), tmp_path / "run.pt")
    assert torch.load(tmp_path / "run.pt", weights_only=True)["step"] == 1


def test_a_signal_during_the_last_part_is_heard(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(40, dtype=np.int32))
    writing = Writing(tmp_path, tmp_path / "ids.npy", rows=2, prompt=4, length=8, seed=0)

    class Interrupted(Writing):
        def write(self, model: Any, part: int) -> None:
            signal.raise_signal(signal.SIGTERM)
            writing.write(model, part)

    with pytest.raises(StoppedError, match="0 of 1 parts to do"):
        write_parts(Interrupted(**vars(writing)), tiny_model(), [0], 1)
    assert writing.missing(1) == []


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return save_model(tmp_path / "target", tiny_model(layers=4))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and short texts."""
    monkeypatch.setattr(plan_module, "LENGTH", 40)
    monkeypatch.setattr(recipe, "RATE", 5e-3)
    monkeypatch.setattr(recipe, "candidates", lambda _: [Shape(1, 32), Shape(2, 32)])


def config(target: Path, **values: Any) -> TrainingConfig:
    options = {"out": str(target.parent / "draft"), "texts": 32, "steps": 30, "device": "cpu", "processes": 1}
    return TrainingConfig(target=str(target), **(options | values))


@pytest.mark.usefixtures("small")
def test_a_draft_is_trained_and_loads_as_one(target: Path) -> None:
    trained = train_draft(config(target))
    before, after = (sum(each["acceptance"] for each in of.values()) for of in (trained.before, trained.after))
    assert after > before + 0.05
    plan = json.loads((Path(trained.folder) / "training" / "plan.json").read_text())
    tried = {each["worth"]: name for name, each in plan.items() if name.startswith("trial") and "worth" in each}
    assert tried[max(tried)] == f"trial of {trained.shape.layers} layers, width 32"
    assert len(tried) == 2
    assert f"--target {target} --draft {target.parent / 'draft'}" in trained.advice()

    check_pair(str(target), trained.folder)
    runner = load_runner(trained.folder, role="draft", rows=1, scratch=32, device="cpu")
    assert runner.vocab_size == 96
    model = AutoModelForCausalLM.from_pretrained(trained.folder)
    assert model.config.num_hidden_layers == trained.shape.layers

    again = train_draft(config(target))  # there is nothing left to do
    assert again == trained
    with pytest.raises(ConfigError, match=r"out: expected a folder without another plan .*steps"):
        train_draft(config(target, steps=31))


@pytest.mark.usefixtures("small")
def test_a_training_that_was_killed_goes_on_and_ends_as_it_would_have(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = target.parent / "data.txt"
    data.write_text("a text that the target goes on with, " * 40, encoding="utf-8")
    options = {"data": (str(data),), "steps": 6}
    whole = train_draft(config(target, out=str(target.parent / "whole"), **options))
    for stage in ("choose", "begin", "train", "learn"):
        with monkeypatch.context() as patch:
            patch.setattr(recipe.Training, stage, lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                train_draft(config(target, **options))
    parted = train_draft(config(target, **options))
    assert (parted.shape, parted.after) == (whole.shape, whole.after)
    weights = [AutoModelForCausalLM.from_pretrained(each.folder).state_dict() for each in (parted, whole)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"out": None}, "out: expected a folder for the draft"),
        ({"minutes": 0}, "minutes: expected a number above 0"),
        ({"steps": 0}, "steps: expected an integer from 1"),
        ({"seed": -1}, "seed: expected an integer from 0"),
        ({"dtype": "int8"}, "dtype: expected one of"),
        ({"device": "tpu"}, "device: expected 'auto', 'cpu', 'cuda'"),
        ({"data": ("/nowhere.txt",)}, "data: expected text files in UTF-8, got .*nowhere.txt"),
        ({"data": (__file__.replace(".py", ""),)}, "data: expected text files"),
        ({"out": "target"}, "out: expected a folder that is new, empty or was begun by this command"),
        ({"out": "target/config.json"}, "out: expected a folder, got"),
    ],
)
def test_bad_input_is_refused_before_anything_is_started(
    target: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(target.parent)
    monkeypatch.setattr(recipe, "load_model", None)
    with pytest.raises(ConfigError, match=words):
        train_draft(config(target, **values))


def test_data_of_another_kind_or_too_little_is_refused(target: Path, tmp_path: Path) -> None:
    for content, words in ((b"\xff\xfe\x00", "text files in UTF-8"), (b"short", "at least 512 tokens of text")):
        (tmp_path / "data").write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            train_draft(config(target, data=(str(tmp_path / "data"),)))


def _without_tokenizer(target: Path) -> None:
    for file in target.glob("tokenizer*"):
        file.unlink()


def _encoder_decoder(target: Path) -> None:
    AutoConfig.for_model("t5").save_pretrained(target)


def _gone(target: Path) -> None:
    target.rename(target.parent / "elsewhere")


def _plan_cut_short(target: Path) -> None:
    (target.parent / "draft" / "training").mkdir(parents=True)
    (target.parent / "draft" / "training" / "plan.json").write_text('{"identity": ')


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (_without_tokenizer, ModelError, "target: cannot load"),
        (_encoder_decoder, UnsupportedModelError, "encoder-decoder"),
        (_gone, ModelError, "target: no folder at"),
        (_plan_cut_short, ConfigError, "out: expected a folder whose plan can be read"),
    ],
)
def test_targets_that_cannot_have_a_draft_are_refused(
    target: Path, change: Any, kind: type[SsdRayError], words: str
) -> None:
    change(target)
    with pytest.raises(kind, match=words):
        train_draft(config(target))
    assert not (target.parent / "draft" / "training" / "lessons").exists()


def test_figures_are_json(target: Path) -> None:
    trained = recipe.Trained("d", "t", Shape(1, 32), 0.2, *[{"greedy": FIGURE, "temperature_1": FIGURE}] * 2)
    assert json.loads(json.dumps(trained.as_dict()))["after"]["greedy"] == FIGURE
    assert trained.lines()[-1] == (
        "serve with `ssd-ray generate --target t --draft d`: expect, to plain decoding's 1 x, greedy 1.4 x with sd and "
        "at best 2.4 x with ssd; at temperature 1 1.4 x with sd and at best 2.4 x with ssd"
    )


FIGURE = {"acceptance": 0.6, "tokens_per_round": {"3": 2.1}}
