"""Train a head of EAGLE-3 for a target in seconds or minutes, on any text.

    python -m tests.support.train_head FOLDER --seconds 300   # one for the bundled target, on Python's standard library

The loss is the paper's, by distillation: the head is rolled out for some steps from its own states, and each step's
distribution is compared with the target's. It begins with the target's embedding and output layer.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ssd_ray.models.eagle import EagleHead
from ssd_ray.models.heads import parse_head
from tests.support.heads import authors_config, save_head

TARGET = Path(__file__).parents[2] / "ssd_ray" / "assets" / "target"
STEPS = 4
HELD_OUT = ("textwrap", "shelve", "queue", "fnmatch", "graphlib", "netrc", "locks", "decoder", "thread", "robotparser")
"""Files of which the bundled prompts are made."""


def new_head(target: PreTrainedModel, config: dict[str, Any]) -> EagleHead:
    """A head in float32 that begins as the last layer that it reads."""
    head = parse_head(config)
    assert head is not None
    torch.manual_seed(0)
    made = EagleHead(head.config, head).float()
    body, base = made.body, target.get_decoder()
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.02)
        body.embed_tokens.weight.copy_(base.embed_tokens.weight)
        made.lm_head.weight.copy_(target.get_output_embeddings().weight[: head.draft_vocab_size])
        body.norm.weight.copy_(base.norm.weight)
        hidden = head.target_hidden_size
        body.fc.weight.zero_()[:, -hidden:].copy_(torch.eye(hidden))
        for small in (body.layers[0].self_attn.o_proj, body.layers[0].mlp.down_proj):
            small.weight.mul_(0.1)
    body.embed_tokens.weight.requires_grad_(False)
    return made


def rolled_out(head: EagleHead, tokens: Tensor, read: Tensor, steps: int) -> list[Tensor]:
    """Logits [B, T - s, V] after tokens [B, T] with the states before them, for each number s of steps for which the
    head goes on by itself."""
    body, layer = head.body, head.body.layers[0]
    attention, count = layer.self_attn, tokens.shape[1]
    places = torch.arange(count)
    embedded = layer.input_layernorm(body.embed_tokens(tokens))
    cos, sin = body.rotary_emb(embedded, places[None])
    states, kept, logits = body.combine(read), [], []
    for step in range(steps):
        normed = layer.hidden_norm(states)
        wide = torch.cat([embedded, normed], -1)
        shape = (*wide.shape[:2], -1, attention.head_dim)
        query, key, value = (
            part(wide).view(shape).transpose(1, 2) for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        kept.append([each.repeat_interleave(attention.num_key_value_groups, 1) for each in (key, value)])
        first, *others = kept
        scores = [query @ first[0].transpose(-1, -2) + torch.where(places <= places[:, None] - step, 0.0, -torch.inf)]
        scores += [(query * _later(own[0], step - 1 - at)).sum(-1, keepdim=True) for at, own in enumerate(others)]
        weights = torch.cat(scores, -1).mul(attention.scaling)[..., step:, :].softmax(-1)
        attended = weights[..., :count] @ first[1]
        for at, own in enumerate(others):
            attended = attended + weights[..., count + at, None] * _later(own[1], step - 1 - at)[:, :, step:]
        attended = F.pad(attended, (0, 0, step, 0)).transpose(1, 2).flatten(2)
        states = states + attention.o_proj(attended)
        states = states + layer.mlp(layer.post_attention_layernorm(states))
        logits.append(head.lm_head(body.norm(states[:, step:])))
        states = _later(states, 1)
    return logits


def _later(states: Tensor, by: int) -> Tensor:
    """States [.., T, D] that stand so many places later."""
    return F.pad(states, (0, 0, by, 0))[..., : states.shape[-2], :]


def train(
    target: PreTrainedModel,
    head: EagleHead,
    batch: Callable[[int], Tensor],
    *,
    seconds: float = inf,
    batches: int | None = None,
    rate: float = 2e-3,
    steps: int = STEPS,
) -> list[float]:
    """Train for so many seconds, or on so many batches of tokens [B, T]; returns how often the head's first choice was
    the target's, after each number of its own steps."""
    taps = parse_taps(target)
    weights = [weight for weight in head.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    right, started, number = [0.0] * steps, time.monotonic(), 0
    while (spent := number / batches if batches else (time.monotonic() - started) / seconds) < 1.0:
        tokens = batch(number)
        with torch.no_grad():
            output = target(tokens, output_hidden_states=True)
        read = torch.cat([output.hidden_states[tap].float() for tap in taps], -1)
        wanted = output.logits.float()[:, 1:, : head.lm_head.out_features]
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (number + 1) / 20) * max(0.02, 1.0 - spent)
        loss = torch.zeros(())
        for step, logits in enumerate(rolled_out(head, tokens[:, 1:], read[:, :-1], steps)):
            law = wanted[:, step:]
            loss = loss + 0.8**step * F.cross_entropy(logits.flatten(0, 1), law.flatten(0, 1).softmax(-1))
            same = float((logits.argmax(-1) == law.argmax(-1)).float().mean())
            right[step] += (0.05 if number > 20 else 1.0 / (number + 1)) * (same - right[step])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        number += 1
        if number % 20 == 0:
            print(f"{time.monotonic() - started:.0f} s, batch {number}: loss {loss:.3f}, right {right}", flush=True)
    return right


def parse_taps(target: PreTrainedModel) -> Sequence[int]:
    """Where a head reads this target."""
    count = target.config.num_hidden_layers
    return 2, count // 2, count - 3


def published(head: EagleHead) -> dict[str, Tensor]:
    """The weights by the names of the authors, without the embedding, which is the target's."""
    names = {name.removeprefix("body.").replace("layers.0.", "midlayer."): w for name, w in head.state_dict().items()}
    return {name: weight for name, weight in names.items() if name not in ("embed_tokens.weight", "d2t")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0)
    options = parser.parse_args()
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    files = [path for path in Path(sysconfig.get_paths()["stdlib"]).rglob("*.py") if path.stem not in HELD_OUT]
    files = [path for path in files if not {"test", "tests", "site-packages", "idlelib"}.intersection(path.parts)]
    texts = [path.read_text(errors="ignore") for path in sorted(files)]
    stream = torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]])
    print(f"{len(stream):,} tokens", flush=True)

    def batch(number: int, rows: int = 8, length: int = 192) -> Tensor:
        random = torch.Generator().manual_seed(number)
        starts = torch.randint(0, len(stream) - length, (rows, 1), generator=random)
        return stream[starts + torch.arange(length)]

    text = target.config
    layer = {name: getattr(text, name) for name in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")}
    layer |= {name: getattr(text, name) for name in ("num_attention_heads", "num_key_value_heads", "rms_norm_eps")}
    layer |= {"model_type": "llama", "num_hidden_layers": 1, "rope_theta": 10_000.0, "torch_dtype": "bfloat16"}
    layer |= {"max_position_embeddings": text.max_position_embeddings, "tie_word_embeddings": False}
    config = authors_config(layer, text.vocab_size)
    head = new_head(target, config)
    print(train(target, head, batch, seconds=options.seconds))
    save_head(options.folder, config, {name: weight.bfloat16() for name, weight in published(head).items()})


if __name__ == "__main__":
    main()
