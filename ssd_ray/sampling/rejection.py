"""Rejection mode: proposals that drafts sample from a law of their own, and the verification that undoes it.

A drafted token s was sampled from q'. It is accepted with probability min(1, p(s) / q'(s)); after the first rejection
the bonus token is drawn from max(0, p - q') normalised, after full acceptance from p (Leviathan et al., 2023; Chen et
al., 2023). The output has the target's law p for any q', as long as s was really drawn from it.

So that nobody has to be believed, the draw itself is a function: s = argmax(log q' + g) with noise g that draft and
target share (and that nothing else uses). The target repeats it and verifies s, also where the draft drafted another
token. A token that comes without a law is a fixed guess d: accepted with probability p(d), and else the bonus token is
drawn from p without d, normalised.

Saguaro's sampling (paper, section 4.2) lowers the draft's mass on the tokens that will be guessed as bonus token, so
that the residual falls on them: more hits for fewer acceptances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssd_ray.sampling.laws import Law
from ssd_ray.sampling.verify import Outcome

STREAMS = {"accept": 1, "bonus": 2, "draft": 3}
"""Independent noise of one seed: for the coin of an acceptance, for the bonus token, for the draft's draws."""

_MASK = (1 << 63) - 1


def stream_seed(seed: int, stream: str) -> int:
    """The seed of one of the streams: another one for every stream, and none that is a plain seed plus a little."""
    return (seed + STREAMS[stream] * 0x9E3779B97F4A7C15) & _MASK


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a drafted token was sampled from.

    Attributes:
        tokens: token ids with mass, int64 [M], all different.
        probabilities: their probabilities q', float32 [M], not negative, summing to 1.
        plain: q, float32 [M], before Saguaro's C; None if that is not known.
        guesses: F of :func:`saguaro`.
    """

    tokens: Tensor
    probabilities: Tensor
    plain: Tensor | None = None
    guesses: int = 0


def saguaro(probabilities: Tensor, guesses: Sequence[int], c: float | Tensor) -> Tensor:
    """Lower the mass of the tokens that will be guessed: q' ~ c q on the top F + 1 tokens of q, q elsewhere.

    Args:
        probabilities: q, float32 [R, V], not changed.
        guesses: F of each row. The drafted token is not guessed, hence F + 1.
        c: in [0, 1], or float32 [R, 1], one for each row; 1 changes nothing.

    Returns:
        q', float32 [R, V], normalised. A row whose whole mass would go keeps it.
    """
    if isinstance(c, float) and c == 1.0:
        return probabilities
    count = min(max(guesses, default=0) + 1, probabilities.shape[-1])
    top = probabilities.topk(count).indices  # [R, F + 1]
    lowered = torch.arange(count)[None] <= torch.tensor(list(guesses))[:, None]
    factors = torch.ones_like(probabilities).scatter_(-1, top, torch.where(lowered, c, 1.0))
    scaled = probabilities * factors
    total = scaled.sum(-1, keepdim=True)
    return torch.where(total > 0.0, scaled / total, probabilities)


def truncate(probabilities: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Keep the ``most`` largest probabilities of each row (0: all of them), normalised.

    Returns:
        Token ids, int64 [R, M], and probabilities, float32 [R, M]; those of zero may be among them.
    """
    vocab_size = probabilities.shape[-1]
    if not 0 < most < vocab_size:
        return torch.arange(vocab_size).expand_as(probabilities), probabilities
    kept, tokens = probabilities.topk(most)
    return tokens, kept / kept.sum(-1, keepdim=True)


def draw(tokens: Tensor, probabilities: Tensor, noise: Tensor) -> Tensor:
    """Sample one token of each row by the Gumbel-max trick.

    Args:
        tokens: token ids, int64 [R, M].
        probabilities: float32 [R, M].
        noise: Gumbel noise over the vocabulary, float32 [R, V].

    Returns:
        int64 [R].
    """
    scores = probabilities.log() + noise.gather(-1, tokens)
    return tokens.gather(-1, scores.argmax(-1, keepdim=True)).squeeze(-1)


@dataclass(frozen=True, slots=True)
class Proposing:
    """How a draft draws its tokens.

    Attributes:
        most: tokens that a law is cut to; 0 keeps all.
    """

    most: int = 0

    def draw(
        self, probabilities: Tensor, guesses: Sequence[int], c: float, noise: Tensor
    ) -> tuple[list[int], list[Law]]:
        """Draw one token of each row.

        Args:
            probabilities: the draft's own law q, float32 [R, V].
            guesses: F of each row, see :func:`saguaro`.
            c: Saguaro's C.
            noise: float32 [R, V].

        Returns:
            The tokens, and what each was drawn from.
        """
        tokens, weights = truncate(probabilities, self.most)
        drawn: list[int] = draw(tokens, saguaro(weights, guesses, c), noise).tolist()
        whole = tokens.shape[-1] == probabilities.shape[-1]
        named = tokens.to(torch.int32).numpy()[:, : 0 if whole else None]
        parts = zip(named, weights.numpy(), guesses, strict=True)
        return drawn, [Law(ids, chances, guessed, c) for ids, chances, guessed in parts]


def verify_by_rejection(
    speculation: Sequence[int],
    probabilities: Tensor,
    proposals: Sequence[Proposal | None],
    draft_noise: Tensor,
    coins: Tensor,
    noise: Tensor,
) -> Outcome:
    """Accept a prefix of the speculation and draw the bonus token.

    Args:
        speculation: n drafted tokens.
        probabilities: p after each input, float32 [n + 1, V].
        proposals: what each token was sampled from; None for a fixed guess, and so is what is not :func:`sound`.
        draft_noise: Gumbel noise of the drafts' draws, float32 [n + 1, V].
        coins: uniform in (0, 1), float32 [n + 1].
        noise: Gumbel noise for the bonus token at each position, float32 [n + 1, V].
    """
    for depth, (drafted, proposal) in enumerate(zip(speculation, proposals, strict=True)):
        p = probabilities[depth]
        token, mass = drafted, 1.0
        if proposal is not None:
            tokens, weights = proposal.tokens, proposal.probabilities
            token = int(draw(tokens[None], weights[None], draft_noise[depth][None]))
            mass = float(weights[tokens == token].sum())
        if float(coins[depth]) * mass >= float(p[token]):
            return Outcome(depth, _sample(_residual(p, token, proposal), noise[depth]))
        if token != drafted:  # accepted, but what was verified behind it continues another token
            return Outcome(depth, token)
    return Outcome(len(speculation), _sample(probabilities[len(speculation)], noise[len(speculation)]))


def sound(proposal: Proposal, vocab_size: int) -> bool:
    """Whether a proposal that came from somebody else is a law over different tokens of the vocabulary."""
    tokens, weights = proposal.tokens, proposal.probabilities
    return (
        0 < len(tokens) == len(weights)
        and bool((tokens >= 0).all() and (tokens < vocab_size).all())
        and bool((weights >= 0.0).all())  # NaN is not
        and abs(float(weights.sum(dtype=torch.float64)) - 1.0) < 1e-3
        and len(torch.unique(tokens)) == len(tokens)
    )


def proposal_of(law: Law | None, vocab_size: int) -> Proposal | None:
    """What came with a token as a proposal; None if there is nothing, or no law."""
    if law is None:
        return None
    ids = torch.from_numpy(law.tokens.astype(np.int64)) if len(law.tokens) else torch.arange(len(law.weights))
    plain = torch.from_numpy(law.weights.copy())
    if not sound(Proposal(ids, plain), vocab_size):
        return None
    return Proposal(ids, saguaro(plain[None], [law.guesses], law.c)[0], plain, law.guesses)


def weigh(p: Tensor, proposal: Proposal, factors: Sequence[float]) -> list[tuple[float, float]]:
    """What each C would have done at a position, in expectation.

    Args:
        p: the target's law, float32 [V].
        proposal: what was drawn there, its ``plain`` law included.
        factors: values of C.

    Returns:
        For each the probability of acceptance, sum of min(p, q'), and the one that the bonus token is among the guesses
        if it comes to a rejection.
    """
    if proposal.plain is None:
        raise ValueError("the proposal's plain law is not known")
    count = len(factors)
    laws = saguaro(proposal.plain.expand(count, -1), [proposal.guesses] * count, torch.tensor(factors)[:, None])
    at = p[proposal.tokens]
    accepted = torch.minimum(laws, at).sum(-1)
    # The drafted token is among these F + 1, and has no residual when it is rejected.
    guessed = proposal.plain.topk(min(proposal.guesses + 1, len(at))).indices
    residual = (at[guessed] - laws[:, guessed]).clamp_(min=0.0).sum(-1)
    hits = residual / (1.0 - accepted).clamp_(min=1e-6)
    return list(zip(accepted.tolist(), hits.clamp_(max=1.0).tolist(), strict=True))


def _residual(p: Tensor, token: int, proposal: Proposal | None) -> Tensor:
    """What is left of p once the proposal's share is taken, not normalised."""
    rest = p.clone()
    if proposal is None:
        rest[token] = 0.0
    else:
        rest[proposal.tokens] = (rest[proposal.tokens] - proposal.probabilities).clamp_(min=0.0)
    # Rounding alone can leave nothing, where p and q' are the same: then a rejection hardly ever happens.
    return rest if float(rest.sum()) > 0.0 else p


def _sample(weights: Tensor, noise: Tensor) -> int:
    return int((weights.log() + noise).argmax())
