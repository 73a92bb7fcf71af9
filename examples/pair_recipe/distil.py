"""Stage 4 and 5, the draft: first the corpus, then the target's own logits, also on text that the target wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch.nn import functional as F

from pair_recipe.measure import write
from pair_recipe.training import windows

TEMPERATURES = (0.0, 0.0, 0.7, 1.0)  # greedy text twice: it is what most people decode


class Distillation:
    """KL(target || draft) over the whole vocabulary at temperature 1, mean over positions."""

    def __init__(self, teacher: Any) -> None:
        self.teacher = teacher

    def __call__(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = F.log_softmax(self.teacher(input_ids=ids, use_cache=False).logits.float(), dim=-1)
        logits = model(input_ids=ids, use_cache=False).logits.float()
        given = F.log_softmax(logits, dim=-1)
        return F.kl_div(given.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean")


def write_text(
    target: Any,
    corpus: np.ndarray,
    path: Path,
    tokens: int,
    seed: int,
    rows: int = 64,
    prefix: int = 96,
    length: int = 512,
) -> None:
    """Let the target continue corpus prefixes until `path` holds `tokens` ids (prefixes included). Resumable."""
    device = next(target.parameters()).device
    parts = [np.load(path)] if path.exists() else []
    batch = rows * length
    done = sum(map(len, parts)) // batch
    heat = torch.tensor([TEMPERATURES[r % len(TEMPERATURES)] for r in range(rows)], device=device)[:, None]
    for index in track(range(done, -(-tokens // batch)), description="writing"):
        prefixes = windows(corpus, 1_000_000_000 * (seed + 1) + index * rows, rows, prefix).to(device)
        ids = write(target, prefixes, length, heat, seed=seed * 100_003 + index)
        parts.append(ids.cpu().numpy().astype(np.uint16).reshape(-1))
        np.save(path, np.concatenate(parts))


def mix(written: np.ndarray, corpus: np.ndarray, tokens: int, share: float, seed: int, block: int = 2048) -> np.ndarray:
    """About `tokens` ids in shuffled blocks, `share` of them from what the target wrote (repeated as needed)."""
    rng = np.random.default_rng(seed)
    total = tokens // block
    own = int(total * share)
    blocks = [written[o : o + block] for o in (np.arange(own) * block) % max(1, len(written) - block + 1)]
    blocks += [corpus[o : o + block] for o in rng.integers(0, len(corpus) - block, total - own)]
    return np.concatenate([blocks[i] for i in rng.permutation(len(blocks))])
