"""The law of the sampled token is the target's: a chi-square test that also notices broken samplers."""

import numpy as np
import pytest
import torch
from scipy import stats

from ssd_ray.config import SamplingParams
from ssd_ray.sampling.logits import scores
from ssd_ray.sampling.noise import NoiseRows, gumbel

torch.set_num_threads(1)

DRAWS = 40_000
PROBABILITIES = np.array([0.3, 0.22, 0.15, 0.1, 0.08, 0.05, 0.04, 0.03, 0.02, 0.01])
LOGITS = torch.tensor(np.log(PROBABILITIES), dtype=torch.float32) + 7.0
LAWS = {
    "plain": (SamplingParams(), PROBABILITIES),
    "temperature 0.7": (SamplingParams(temperature=0.7), PROBABILITIES ** (1 / 0.7)),
    "temperature 1.5": (SamplingParams(temperature=1.5), PROBABILITIES ** (1 / 1.5)),
    "top_p": (SamplingParams(top_p=0.95), PROBABILITIES * (np.arange(10) < 8)),  # 0.94 falls short, 0.97 does not
    "top_k": (SamplingParams(top_k=4), PROBABILITIES * (np.arange(10) < 4)),
    "min_p": (SamplingParams(min_p=0.15), PROBABILITIES * (PROBABILITIES >= 0.045)),
    "all": (
        SamplingParams(temperature=0.7, top_k=9, top_p=0.9, min_p=0.1),
        PROBABILITIES ** (1 / 0.7) * (np.arange(10) < 5),
    ),
}


def over_seeds():
    seeds = torch.arange(DRAWS)
    return gumbel(seeds, torch.full_like(seeds, 17), 10, device="cpu")


def over_positions():
    return torch.cat([NoiseRows(3, 10, block=1000).rows(range(at, at + 1000)) for at in range(0, DRAWS, 1000)])


def goodness_of_fit(noise, params, weights):
    """The p-value of the tokens drawn with this noise [DRAWS, V] under the law that has these weights."""
    tokens = scores(LOGITS.expand(len(noise), -1), params, noise).argmax(-1)
    counts = np.bincount(tokens.numpy(), minlength=len(weights))
    if counts[weights == 0].any():
        return 0.0
    possible = weights > 0
    expected = weights[possible] / weights.sum() * len(noise)
    return stats.chisquare(counts[possible], expected).pvalue


@pytest.mark.parametrize("draw", [over_seeds, over_positions])
@pytest.mark.parametrize("name", LAWS)
def test_tokens_have_the_targets_law(name, draw):
    assert goodness_of_fit(draw(), *LAWS[name]) > 1e-3


BROKEN = {
    "scaled": lambda noise: noise * 1.05,
    "uniform": lambda noise: torch.special.ndtr(noise),
    "normal": lambda noise: torch.special.ndtri(torch.exp(-torch.exp(-noise.double()))).float(),
    "clipped": lambda noise: noise.clamp(max=3.0),
    "mirrored": lambda noise: -noise,
    "one token favoured": lambda noise: noise + 0.1 * torch.eye(10)[4],
    "reused at all positions": lambda noise: noise[:1].expand_as(noise),
    "none": torch.zeros_like,
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_noise_is_noticed(name):
    assert goodness_of_fit(BROKEN[name](over_seeds()), *LAWS["plain"]) < 1e-3


@pytest.mark.parametrize("name", [name for name in LAWS if name != "plain"])
def test_ignored_parameters_are_noticed(name):
    assert goodness_of_fit(over_seeds(), SamplingParams(), LAWS[name][1]) < 1e-3


def test_tokens_at_neighbouring_positions_are_independent():
    """Reusing noise keeps the law of each token and breaks that of the text: pairs of tokens must be right too."""

    def pairs(noise):
        tokens = scores(LOGITS.expand(len(noise), -1), SamplingParams(), noise).argmax(-1).numpy()
        counts = np.histogram2d(tokens[::2], tokens[1::2], bins=np.arange(11))[0]
        return stats.chisquare(counts.ravel(), np.outer(PROBABILITIES, PROBABILITIES).ravel() * len(noise) / 2).pvalue

    noise = over_positions()
    assert pairs(noise) > 1e-3
    assert pairs(noise[: DRAWS // 2].repeat_interleave(2, 0)) < 1e-3
