"""Heads for multi-token prediction in their targets' checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ssd_ray.cluster import preflight
from ssd_ray.cluster.preflight import check
from ssd_ray.config import EngineConfig, SamplingParams
from ssd_ray.errors import ModelError
from ssd_ray.models.info import ModelInfo
from ssd_ray.models.loader import load_runner
from ssd_ray.models.mtp import mtp_config
from ssd_ray.models.reading import HeadRunner
from ssd_ray.models.sources import Role
from tests.support.engines import engine, target_alone
from tests.support.tiny import save_model, tiny_model

VOCAB, LENGTH = 96, 128
TOKENS = torch.randint(0, VOCAB, (30,), generator=torch.Generator().manual_seed(1)).tolist()
DEEPSEEK = {"model.norm.": "shared_head.norm.", "lm_head.": "shared_head.head.", "model.embed_tokens.": "embed_tokens."}
QWEN = {"model.norm.": "norm.", "model.layers.0.": "layers.0."}
JOINING = {
    "enorm.weight": "pre_fc_norm_embedding.weight",
    "hnorm.weight": "pre_fc_norm_hidden.weight",
    "eh_proj.weight": "fc.weight",
}


def with_head(folder: Path, family: str) -> tuple[str, PreTrainedModel, dict[str, Tensor]]:
    """A target with a random head in its checkpoint; the head's model of one layer and its other weights."""
    target = tiny_model(family, vocab=VOCAB, context=LENGTH)
    save_model(folder / "target", target)
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_config(mtp_config(target.config)).eval()
    with torch.no_grad():
        base.model.embed_tokens.weight.copy_(target.model.embed_tokens.weight)
        base.lm_head.weight.copy_(target.lm_head.weight)
    base.save_pretrained(folder / "base")
    hidden = target.config.hidden_size
    own = {
        "enorm.weight": torch.rand(hidden),
        "hnorm.weight": torch.rand(hidden),
        "eh_proj.weight": torch.randn(hidden, 2 * hidden) * 0.3,
    }
    weights = load_file(folder / "target" / "model.safetensors")
    deepseek = family.startswith("deepseek")
    prefix, names = (f"model.layers.{target.config.num_hidden_layers}.", DEEPSEEK) if deepseek else ("mtp.", QWEN)
    for name, weight in load_file(folder / "base" / "model.safetensors").items():
        if not deepseek and name.startswith(("lm_head.", "model.embed_tokens.")):
            continue
        theirs = next((new + name.removeprefix(old) for old, new in names.items() if name.startswith(old)), name)
        weights[prefix + theirs.removeprefix("model.layers.0.")] = weight
    weights |= {prefix + (name if deepseek else JOINING[name]): weight for name, weight in own.items()}
    save_file(weights, folder / "target" / "model.safetensors", metadata={"format": "pt"})
    return str(folder / "target"), base, own


@torch.inference_mode()
def plain(base: PreTrainedModel, own: dict[str, Tensor], tokens: Sequence[int], read: Tensor) -> Tensor:
    """Logits [n, V] after each token, without a cache; the target's states [m, hidden] of the first ones were read."""
    base.set_attn_implementation("eager")
    norms = {}
    for name in ("enorm", "hnorm"):
        norms[name] = type(base.model.norm)(base.config.hidden_size, eps=base.config.rms_norm_eps)
        norms[name].weight.data.copy_(own[f"{name}.weight"])
    embedded = base.model.embed_tokens(torch.tensor(tokens))
    states = [torch.zeros_like(embedded[0])]
    logits = []
    for count in range(1, len(tokens) + 1):
        wide = torch.cat([norms["enorm"](embedded[:count]), norms["hnorm"](torch.stack(states))], -1)
        places = torch.arange(count)
        seen = (places <= places[:, None]) & ((places > 0) | (places[:, None] == 0))
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
        output = base.model(
            inputs_embeds=(wide @ own["eh_proj.weight"].T)[None],
            attention_mask=mask,
            position_ids=places[None],
            use_cache=False,
        ).last_hidden_state[0]
        states.append(read[count - 1] if count <= len(read) else output[-1])
        logits.append(base.lm_head(output[-1]))
    return torch.stack(logits)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3", pytest.param("qwen3_next", marks=pytest.mark.slow)])
def test_a_head_in_its_targets_checkpoint(tmp_path: Path, family: str) -> None:
    target, base, own = with_head(tmp_path, family)
    assert "draft" not in check(EngineConfig(target=target, draft="mtp")).fingerprints
    made = load_runner("mtp", role="draft", target=target, rows=1, scratch=64, device="cpu", dtype="float32")
    assert isinstance(made, HeadRunner)
    read = torch.randn(22, made.reads, generator=torch.Generator().manual_seed(2))
    made.read(0, 0, read)
    made.prefill(0, TOKENS[:20])
    logits = made.append([0], [TOKENS[20:]], [20])[0]
    want = plain(base, own, TOKENS, read)[20:]
    torch.testing.assert_close(logits, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def test_memory_is_counted_with_the_head_and_what_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, base, _ = with_head(tmp_path, "qwen3")
    seen: list[dict[Role, ModelInfo]] = []
    monkeypatch.setattr(preflight, "is_private", lambda: True)
    monkeypatch.setattr(preflight, "_require_memory", lambda _, found, __: seen.append(found))
    check(EngineConfig(target=target, draft="mtp", device="cpu"))
    check(EngineConfig(target=target, method="ar", device="cpu"))
    (read, head), (alone, none) = [(found["target"], found.get("draft")) for found in seen]
    assert none is None
    assert head is not None
    made = load_runner("mtp", role="draft", target=target, rows=1, scratch=64, device="cpu", dtype="float32")
    assert read.kept[0].slot_bytes == alone.kept[0].slot_bytes + 4 * made.reads
    assert head.parameter_bytes == 4 * sum(weight.numel() for weight in base.parameters())
    assert 0 < head.kept[0].slot_bytes < alone.kept[0].slot_bytes


def test_texts_are_the_targets(tmp_path: Path) -> None:
    target, _, _ = with_head(tmp_path, "qwen3")
    params = SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.8, seed=1)
    prompts = [TOKENS, TOKENS[:3]]
    config = EngineConfig(target=target, draft="mtp", method="sd", text_lookup=False)
    with engine(config, "memory") as generate:
        texts, stats = generate(prompts, params)
    assert texts == target_alone(target, prompts, params)
    assert all(each.tree_tokens > 0 for each in stats)


def test_a_checkpoint_without_a_head(tmp_path: Path) -> None:
    target = str(save_model(tmp_path, tiny_model("llama", vocab=VOCAB, context=LENGTH)))
    with pytest.raises(ModelError, match="no head for multi-token prediction"):
        check(EngineConfig(target=target, draft="mtp"))
