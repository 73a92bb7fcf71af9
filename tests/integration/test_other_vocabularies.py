"""Drafts of another vocabulary than their target's: any proposal is exact, and what both know is proposed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ssd_ray.cluster.preflight import check
from ssd_ray.config import EngineConfig, SamplingParams
from ssd_ray.errors import VocabularyMismatchError
from ssd_ray.models.runner import HFRunner
from ssd_ray.models.translation import MISSING, Translated, Translation
from ssd_ray.text import written
from tests.support.engines import engine
from tests.support.tiny import save_model, tiny_model
from tests.support.tokenizers import BYTES, KEPT, PARTS, finished

VOCAB = 257
"""Bytes and an end token."""


def shuffled(tokenizer: PreTrainedTokenizerFast, lacking: int = 0) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """A tokenizer with the same tokens in another order, but for some; and which of the first one's each of them is."""
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0)).tolist()[: 256 - lacking]
    vocab = {word: number for number, word in enumerate(tokenizer.convert_ids_to_tokens(order))}
    other = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    other.decoder = decoders.ByteLevel()
    return finished(other), [*order, 256]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A target, and a draft that is nearly the same model, with its tokens in another order and 40 of them missing."""
    folder = tmp_path_factory.mktemp("pair")
    model, (tokenizer, order) = tiny_model(vocab=VOCAB), shuffled(BYTES, lacking=40)
    save_model(folder / "target", model)
    BYTES.save_pretrained(folder / "target")
    draft = tiny_model(vocab=len(order))
    weights = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][order]
    draft.load_state_dict(weights)
    save_model(folder / "draft", draft)
    tokenizer.save_pretrained(folder / "draft")
    return str(folder / "target"), str(folder / "draft")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_are_the_targets_own_and_what_both_know_is_accepted(pair: tuple[str, str], temperature: float) -> None:
    config = EngineConfig(target=pair[0], draft=pair[1], dtype="float32", device="cpu", max_num_seqs=1)
    params = SamplingParams(temperature=temperature, seed=4, max_tokens=60, ignore_eos=True)
    prompts = [[5, 6, 7], [*range(100, 160)]]
    with engine(replace(config, method="ar"), "memory") as generate:
        expected = generate(prompts, params)[0]
    with engine(replace(config, method="ssd"), "memory") as generate:
        assert generate(prompts, params)[0] == expected
    with engine(replace(config, method="sd", lookahead=4), "memory") as generate:  # which waits for its draft
        texts, stats = generate(prompts, params)
    assert texts == expected
    assert sum(each.tokens for each in stats) > 1.1 * sum(each.rounds for each in stats)


def test_how_much_they_share_is_told(pair: tuple[str, str]) -> None:
    checked = check(EngineConfig(target=pair[0], draft=pair[1]))
    assert checked.shared_vocabulary == pytest.approx((VOCAB - 40) / VOCAB)
    assert check(EngineConfig(target=pair[0], draft=pair[0])).shared_vocabulary == 1.0


def test_accepting_by_ratios_takes_one_vocabulary(pair: tuple[str, str]) -> None:
    with pytest.raises(VocabularyMismatchError, match="its tokenizer is not the target's"):
        check(EngineConfig(target=pair[0], draft=pair[1], sampler="rejection"))


def test_too_little_in_common_is_an_error(pair: tuple[str, str], tmp_path: Path) -> None:
    save_model(tmp_path, tiny_model(vocab=VOCAB))
    shuffled(BYTES, lacking=250)[0].save_pretrained(tmp_path)
    with pytest.raises(VocabularyMismatchError, match=r"of whose tokens it has 1%; .* at least 10%"):
        check(EngineConfig(target=pair[0], draft=str(tmp_path)))


class TestTranslation:
    def test_bytes_and_marks_for_spaces_are_read(self) -> None:
        assert written(PARTS)[PARTS.get_vocab()["Ġthe"]] == (False, b" the")
        assert written(KEPT)[1] == (False, b" a")
        assert written(KEPT)[5 + 0xE2] == (False, b"\xe2")
        assert written(KEPT)[KEPT.get_vocab()["<end>"]] == (True, b"<end>")

    def test_tokens_are_the_same_where_they_write_the_same(self) -> None:
        between = Translation.between(PARTS, KEPT, len(PARTS))
        ours, theirs = PARTS.get_vocab(), KEPT.get_vocab()
        assert between.same[ours["c"]] == theirs["c"]
        assert between.same[ours["Ġ"]] == theirs["▁"]
        assert between.same[ours["<end>"]] == theirs["<end>"]
        assert between.same[ours["Ġthe"]] == MISSING
        assert between.shared == pytest.approx(sum(token != MISSING for token in between.same) / len(ours))

    def test_what_is_missing_is_read_as_its_end(self) -> None:
        between = Translation.between(PARTS, KEPT, len(PARTS))
        assert between.read[PARTS.get_vocab()["Ġthe"]] == KEPT(" the", add_special_tokens=False)["input_ids"][-1]
        assert all(0 <= token < len(KEPT) for token in between.read)

    def test_a_model_may_have_more_tokens_than_its_tokenizer(self) -> None:
        between = Translation.between(BYTES, BYTES, VOCAB + 7)
        assert between.same == [*range(VOCAB), *[MISSING] * 7]
        assert between.shared == 1.0


def test_a_translated_draft_gives_what_the_target_would() -> None:
    model, (tokenizer, order) = tiny_model(vocab=VOCAB), shuffled(BYTES, lacking=40)
    draft = tiny_model(vocab=len(order))
    weights = model.state_dict() | {
        name: model.state_dict()[name][order] for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    draft.load_state_dict(weights)
    size = {"rows": 1, "max_length": 64, "scratch": 16}
    runner = Translated(HFRunner(draft, **size), Translation.between(BYTES, tokenizer, VOCAB))
    plain = HFRunner(model, **size)
    tokens = order[:12]  # both know these
    (got,), (want,) = runner.append([0], [tokens], [0]), plain.append([0], [tokens], [0])
    known = torch.tensor(sorted(order))
    assert got.shape == want.shape
    torch.testing.assert_close(got[:, known], want[:, known], rtol=1e-5, atol=1e-5)
    lacking = torch.tensor(sorted({*range(VOCAB)} - {*order}))
    assert (got[:, lacking] == -torch.inf).all()
