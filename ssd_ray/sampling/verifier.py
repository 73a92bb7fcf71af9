"""What the target does with the logits of a verification: one object for each sequence, by the engine's sampler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ssd_ray.config import Sampler, SamplingParams
from ssd_ray.sampling.logits import scores
from ssd_ray.sampling.noise import NoiseRows
from ssd_ray.sampling.penalties import penalties
from ssd_ray.sampling.rejection import Proposal, stream_seed, verify_by_rejection
from ssd_ray.sampling.verify import Outcome, verify


class Verifier(ABC):
    """Decides the rounds of one sequence, which begins with ``prompt_tokens`` that are no part of the text."""

    def __init__(self, params: SamplingParams, prompt_tokens: int, vocab_size: int) -> None:
        self._params = params
        self._penalties = penalties(params, prompt_tokens, vocab_size)

    def decide(
        self, logits: Tensor, tokens: Sequence[int], speculation: Sequence[int], proposals: Sequence[Proposal | None]
    ) -> Outcome:
        """Verify a speculation.

        Args:
            logits: after the bonus token and after each speculated one, float32 [n + 1, V]; not changed.
            tokens: all committed tokens, the bonus token last.
            speculation: n tokens.
            proposals: what each of them was sampled from, as far as that is known.
        """
        if self._penalties is not None:
            paths = [speculation[:count] for count in range(len(logits))]
            logits = self._penalties.apply(logits, tokens, paths)
        return self._verify(logits, range(len(tokens), len(tokens) + len(logits)), speculation, proposals)

    @abstractmethod
    def _verify(
        self, logits: Tensor, positions: range, speculation: Sequence[int], proposals: Sequence[Proposal | None]
    ) -> Outcome:
        """The same with logits that penalties have changed and the positions of the tokens that they are for."""


class CoupledVerifier(Verifier):
    """The target makes its own choice everywhere, with noise that drafts share; a guess is right or wrong."""

    def __init__(
        self, params: SamplingParams, prompt_tokens: int, vocab_size: int, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(params, prompt_tokens, vocab_size)
        self._noise = None if params.greedy else NoiseRows(params.noise_seed, vocab_size, device=device)

    def _verify(
        self, logits: Tensor, positions: range, speculation: Sequence[int], proposals: Sequence[Proposal | None]
    ) -> Outcome:
        noise = None if self._noise is None else self._noise.rows(positions)
        return verify(speculation, scores(logits, self._params, noise).argmax(-1).tolist())


Study = Callable[[Tensor, Proposal], None]
"""Told the target's law, float32 [V], and the proposal of a position that was verified."""


class RejectionVerifier(Verifier):
    """Proposals are accepted by the ratio of the target's probability and the draft's."""

    def __init__(self, params: SamplingParams, prompt_tokens: int, vocab_size: int, study: Study | None = None) -> None:
        super().__init__(params, prompt_tokens, vocab_size)
        self._study = study
        self._noise = NoiseRows(stream_seed(params.noise_seed, "bonus"), vocab_size)
        self._draft_noise = NoiseRows(stream_seed(params.noise_seed, "draft"), vocab_size)
        self._coins = NoiseRows(stream_seed(params.noise_seed, "accept"), 1)

    def _verify(
        self, logits: Tensor, positions: range, speculation: Sequence[int], proposals: Sequence[Proposal | None]
    ) -> Outcome:
        # A draw of a token is a few numbers of a law that the drafts have sent: here, wherever the logits are.
        probabilities = scores(logits, self._params).softmax(-1).cpu()
        if self._study is not None and proposals and proposals[0] is not None:
            # Always the first position: where a round ends depends on what was drawn.
            self._study(probabilities[0], proposals[0])
        coins = torch.exp(-torch.exp(-self._coins.rows(positions)[:, 0]))  # Gumbel noise back to uniform
        return verify_by_rejection(
            speculation,
            probabilities,
            proposals,
            self._draft_noise.rows(positions),
            coins,
            self._noise.rows(positions),
        )


def verifier(
    sampler: Sampler,
    params: SamplingParams,
    prompt_tokens: int,
    vocab_size: int,
    *,
    device: torch.device | str = "cpu",
    study: Study | None = None,
) -> Verifier:
    """The verifier of a sequence, whose logits lie on ``device``. At temperature 0 both samplers are the same: the
    argmax."""
    if params.greedy or sampler == "coupled":
        return CoupledVerifier(params, prompt_tokens, vocab_size, device)
    return RejectionVerifier(params, prompt_tokens, vocab_size, study)
