"""Heads of EAGLE-3: what their configs say, what they compute, and who is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ssd_ray.cluster.preflight import check
from ssd_ray.config import EngineConfig
from ssd_ray.errors import ConfigError, ModelError, SsdRayError, UnsupportedModelError
from ssd_ray.models.eagle import make_head
from ssd_ray.models.heads import Head, parse_head
from ssd_ray.models.info import head_taps, model_info
from ssd_ray.models.loader import load_runner
from ssd_ray.models.reading import HeadRunner
from ssd_ray.models.recurrent import RecurrentRunner
from ssd_ray.models.runner import HFRunner
from ssd_ray.models.taps import LAST
from ssd_ray.speculation.window import SCRATCH
from tests.support.heads import (
    PlainHead,
    authors_config,
    layer_config,
    random_weights,
    save_head,
    speculators_config,
)
from tests.support.tiny import save_model, tiny_config, tiny_model

VOCAB, LENGTH, LAYERS, DRAFT_VOCAB = 96, 128, 8, 64
LAYER = layer_config(tiny_config("llama", vocab=VOCAB, context=LENGTH))
HIDDEN = LAYER["hidden_size"]
TOKENS = torch.randint(0, VOCAB, (60,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = tiny_model("llama", vocab=VOCAB, context=LENGTH, layers=LAYERS)
    return str(save_model(tmp_path_factory.mktemp("target"), model))


def parsed(config: Mapping[str, Any]) -> Head:
    head = parse_head(config)
    assert head is not None
    return head


def runner(weights: Mapping[str, Tensor], config: Mapping[str, Any], rows: int = 1) -> HeadRunner:
    model = make_head(parsed(config), weights, {}, torch.float32)
    return HeadRunner(model, rows=rows, max_length=LENGTH, scratch=64, prefill_chunk=16)


def exact(weights: Mapping[str, Tensor], **options: bool) -> PlainHead:
    return PlainHead({name: each.double() for name, each in weights.items()}, **options)


def states(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3 * HIDDEN, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


class TestConfigs:
    def test_a_whole_model_is_none(self) -> None:
        assert parse_head(tiny_config("llama").to_dict()) is None

    def test_the_authors_count_the_layers_whose_outputs_they_read(self) -> None:
        said = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 6], "use_aux_hidden_state": True}}
        head = parsed(authors_config(LAYER, 64, **said))
        assert (head.layers, head.draft_vocab_size, head.target_hidden_size) == ((2, 4, 7), 64, HIDDEN)
        assert head.config.rope_parameters["rope_theta"] == LAYER["rope_theta"]

    def test_speculators_count_those_before(self) -> None:
        head = parsed(speculators_config(LAYER, 64, eagle_aux_hidden_state_layer_ids=[2, 4], norm_before_residual=True))
        assert (head.layers, head.states, head.norm_before_residual) == ((2, 4), 2, True)

    def test_by_default_low_middle_and_high_layers_are_read(self) -> None:
        assert parsed(authors_config(LAYER, 64)).taps(tiny_config("llama", layers=32)) == (2, 16, 29)

    def test_a_config_without_the_name_is_known_by_its_draft_vocabulary(self) -> None:
        assert parse_head(authors_config(LAYER, 64, architectures=["LlamaForCausalLM"])) is not None

    @pytest.mark.parametrize(
        ("config", "reason"),
        [
            ({"architectures": ["EagleLlamaForCausalLM"]}, "EagleLlamaForCausalLM"),
            (speculators_config(LAYER, 64, speculators_model_type="eagle"), "speculator 'eagle'"),
            (speculators_config(LAYER, 64, speculators_model_type="medusa"), "speculator 'medusa'"),
            (speculators_config({**LAYER, "model_type": "mamba"}, 64), "'mamba'"),
            (authors_config({**LAYER, "model_type": "llama4_text"}, 64), "'llama4_text'"),
            (authors_config(LAYER, 64, eagle_config={"use_aux_hidden_state": False}), "single hidden state"),
        ],
    )
    def test_other_heads_are_refused(self, config: dict[str, Any], reason: str) -> None:
        with pytest.raises(UnsupportedModelError, match=reason):
            parse_head(config)


class TestBeforeTheStart:
    """All of it is told by configs alone."""

    def refused(self, target: str, folder: Path, config: Mapping[str, Any], **fields: Any) -> SsdRayError:
        draft = save_head(folder, config, random_weights(LAYER, DRAFT_VOCAB))
        with pytest.raises(SsdRayError) as raised:
            check(EngineConfig(target=target, draft=draft, **fields))
        return raised.value

    def test_a_head_that_fits_passes(self, target: str, tmp_path: Path) -> None:
        draft = save_head(tmp_path, authors_config(LAYER, DRAFT_VOCAB), random_weights(LAYER, DRAFT_VOCAB))
        assert check(EngineConfig(target=target, draft=draft)).vocab_size == VOCAB
        assert head_taps(target, draft) == (2, 4, 5)

    def test_another_hidden_size(self, target: str, tmp_path: Path) -> None:
        error = self.refused(target, tmp_path, authors_config(LAYER, DRAFT_VOCAB, target_hidden_size=40))
        assert isinstance(error, ModelError)
        assert "hidden states of 40 numbers, the target's have 32" in str(error)

    def test_another_vocabulary(self, target: str, tmp_path: Path) -> None:
        error = self.refused(target, tmp_path, authors_config({**LAYER, "vocab_size": 200}, DRAFT_VOCAB))
        assert "vocabulary of 200 tokens, the target's has 96" in str(error)

    def test_layers_that_are_not_there(self, target: str, tmp_path: Path) -> None:
        said = {"eagle_aux_hidden_state_layer_ids": [2, 9]}
        error = self.refused(target, tmp_path, speculators_config(LAYER, DRAFT_VOCAB, **said))
        assert "after layers [2, 9] of a target that has 8" in str(error)

    def test_rejection_mode(self, target: str, tmp_path: Path) -> None:
        error = self.refused(target, tmp_path, authors_config(LAYER, DRAFT_VOCAB), sampler="rejection")
        assert isinstance(error, ConfigError)
        assert error.field == "sampler"

    def test_a_head_is_no_target(self, tmp_path: Path) -> None:
        head = save_head(tmp_path, authors_config(LAYER, DRAFT_VOCAB), random_weights(LAYER, DRAFT_VOCAB))
        with pytest.raises(UnsupportedModelError, match="is a head"):
            model_info(head)


class TestWeights:
    def load(self, folder: str, target: str) -> HeadRunner:
        made = load_runner(folder, role="draft", rows=1, scratch=64, device="cpu", dtype="float32", target=target)
        assert isinstance(made, HeadRunner)
        return made

    def test_both_formats_are_the_same_head(self, target: str, tmp_path: Path) -> None:
        weights = random_weights(LAYER, DRAFT_VOCAB)
        configs = authors_config(LAYER, DRAFT_VOCAB), speculators_config(LAYER, DRAFT_VOCAB)
        logits = []
        for number, config in enumerate(configs):
            made = self.load(save_head(tmp_path / str(number), config, weights), target)
            made.read(0, 0, states(20))
            made.prefill(0, TOKENS[:20])
            logits.append(made.append([0], [TOKENS[20:25]], [20])[0])
        assert torch.equal(*logits)
        assert logits[0].shape == (5, VOCAB)
        assert logits[0][:, : VOCAB - DRAFT_VOCAB].eq(float("-inf")).all()
        close(logits[0][:, VOCAB - DRAFT_VOCAB :], exact(weights).text(TOKENS[:25], states(20).double())[20:])

    @pytest.mark.parametrize("tied", [False, True])
    def test_what_a_head_lacks_is_its_targets(self, tmp_path: Path, tied: bool) -> None:
        model = tiny_model("llama", vocab=VOCAB, context=LENGTH, tie_word_embeddings=tied)
        target = str(save_model(tmp_path / "target", model))
        weights = random_weights(LAYER, VOCAB, embeds=False)
        del weights["lm_head.weight"]
        made = self.load(save_head(tmp_path / "head", authors_config(LAYER, VOCAB), weights), target)
        made.prefill(0, TOKENS[:9])
        theirs = load_file(f"{target}/model.safetensors")
        assert ("lm_head.weight" in theirs) != tied
        embedding = theirs["model.embed_tokens.weight"]
        whole = weights | {"embed_tokens.weight": embedding, "lm_head.weight": theirs.get("lm_head.weight", embedding)}
        close(made.append([0], [TOKENS[9:12]], [9])[0], exact(whole).text(TOKENS[:12])[9:])

    @pytest.mark.parametrize(
        ("name", "shape", "message"),
        [("norm.weight", None, "lacks weights: body.norm.weight"), ("fc.weight", (HIDDEN, 64), r"\(32, 64\), not")],
    )
    def test_weights_that_do_not_fit(
        self, target: str, tmp_path: Path, name: str, shape: tuple[int, ...] | None, message: str
    ) -> None:
        weights = random_weights(LAYER, DRAFT_VOCAB)
        del weights[name]
        if shape is not None:
            weights[name] = torch.zeros(shape)
        folder = save_head(tmp_path, authors_config(LAYER, DRAFT_VOCAB), weights)
        with pytest.raises(ModelError, match=message):
            self.load(folder, target)


class TestRunner:
    """Against the head in plain torch, in float64 and without a cache of ours."""

    @pytest.mark.parametrize("before_residual", [False, True])
    def test_a_text_whose_states_were_read(self, before_residual: bool) -> None:
        weights = random_weights(LAYER, VOCAB)
        made = runner(weights, authors_config(LAYER, VOCAB, norm_before_residual=before_residual))
        read = states(50)
        made.read(0, 0, read[:40])
        made.prefill(0, TOKENS[:40])
        made.read(0, 40, read[40:])
        logits = made.append([0], [TOKENS[40:]], [40])[0]  # behind the last two the head goes on by itself
        close(logits, exact(weights, before_residual=before_residual).text(TOKENS, read.double())[40:])

    def test_a_tree_goes_on_from_its_own_states_until_the_targets_come(self) -> None:
        weights = random_weights(LAYER, VOCAB)
        made = runner(weights, authors_config(LAYER, VOCAB), rows=2)
        read = states(30)
        made.read(1, 0, read[:20])
        made.prefill(1, TOKENS[:20])
        window = 100
        chain = TOKENS[20:24]  # the bonus token and three more, of which two are accepted
        slots = torch.arange(window, window + 4)[None]
        extent = made.extent(window + 4)
        columns = torch.arange(extent)
        visible = (columns < 20) | ((columns >= window) & (columns <= slots[..., None]))
        logits = made.extend([1], torch.tensor([chain]), torch.arange(20, 24)[None], slots, visible)[0]
        close(logits, exact(weights).text(TOKENS[:24], read[:20].double())[20:])
        made.read(1, 20, read[20:23])
        # The committed tokens again, at their places, and the new bonus token, all at once: their states are there.
        tokens, places = torch.tensor([[*TOKENS[20:23], 7]]), torch.tensor([[20, 21, 22, window]])
        visible = columns <= torch.arange(20, 24)[None, :, None]
        visible[0, 3] = (columns < 23) | (columns == window)
        logits = made.extend([1], tokens, torch.arange(20, 24)[None], places, visible)[0]
        close(logits, exact(weights).text([*TOKENS[:23], 7], read[:23].double())[20:])

    def test_rows_that_have_levels_and_rows_that_have_none(self) -> None:
        weights = random_weights(LAYER, VOCAB)
        made = runner(weights, authors_config(LAYER, VOCAB), rows=2)
        read = states(20)
        for row, known in enumerate((13, 10)):
            made.read(row, 0, read[:known])
            made.prefill(row, TOKENS[:10])
        visible = (torch.arange(made.extent(13)) <= torch.arange(10, 13)[:, None]).expand(2, -1, -1)
        places = torch.arange(10, 13).expand(2, -1)
        logits = made.extend([0, 1], torch.tensor([TOKENS[10:13]] * 2), places, places, visible)
        for row, known in enumerate((13, 10)):
            close(logits[row], exact(weights).text(TOKENS[:13], read[:known].double())[10:])


class TestTaps:
    @pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
    def test_a_target_shows_what_its_layers_read(self, family: str) -> None:
        model = tiny_model(family, vocab=VOCAB, context=LENGTH, layers=4)
        with torch.inference_mode():
            hidden = model(torch.tensor([TOKENS]), output_hidden_states=True).hidden_states
        want = torch.cat([hidden[place][0] for place in (0, 2, 3)], -1)
        made = HFRunner(model, rows=2, max_length=LENGTH, scratch=64, prefill_chunk=16, taps=(0, 2, 3))
        made.prefill(1, TOKENS[:40])
        for start in range(40, 60, 4):  # replayed after the first ones
            made.append([1], [TOKENS[start : start + 4]], [start])
        assert made.shows == want.shape[1]
        torch.testing.assert_close(made.show(1, 0, 60), want, rtol=1e-4, atol=1e-4)

    def test_a_target_with_recurrent_layers_shows_its_last_states(self) -> None:
        model = tiny_model("qwen3_next", vocab=VOCAB, context=LENGTH)
        with torch.inference_mode():
            want = model.get_decoder()(torch.tensor([TOKENS])).last_hidden_state[0]
        made = RecurrentRunner(model, rows=2, max_length=LENGTH, scratch=64, prefill_chunk=16, taps=(LAST,))
        made.prefill(1, TOKENS[:40])
        made.append([1], [TOKENS[40:50]], [40])
        made.append([1], [TOKENS[44:]], [44])  # the first of them go on from a state before them
        torch.testing.assert_close(made.show(1, 0, 60), want, rtol=1e-3, atol=1e-3)

    def test_what_was_rolled_back_is_written_over(self) -> None:
        model = tiny_model("llama", vocab=VOCAB, context=LENGTH)
        made = HFRunner(model, rows=1, max_length=LENGTH, scratch=SCRATCH, taps=(1,))
        made.append([0], [TOKENS[:8]], [0])
        first = made.show(0, 0, 8)
        made.append([0], [[5, 6, 7]], [3])
        made.append([0], [TOKENS[3:8]], [3])
        torch.testing.assert_close(made.show(0, 0, 8), first)
