"""Matching a Gaussian to each unit's posterior by the scores at a few draws."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vharm.inference.gaussians import UnitGaussian, multiply
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.minibatches import WORTH_CUTTING, Selector

__all__ = [
    "MOST_COST",
    "Matched",
    "ScoredDraws",
    "largest_spread",
    "log_weights",
    "match_in_rounds",
    "match_scores",
    "score_draws",
]

MOST_COST = 0.1
_LEAST_ROUNDS, _LEAST_PAIRS, _PULL = 2, 8, 10.0
_LEAST_LIMIT, _DRAWS_PER_DIM = 0.25, 12
_STEEPEST = 0.3  # a power of the largest number: matching squares scores, and sums them


class ScoredDraws(NamedTuple):
    """Points with the density and its gradient there, in the coordinates of a Gaussian.

    Attributes:
        whitened: e with h = m + L e, shape ``(particle, unit, dim)``.
        log_prior: log p(h; θ), shape ``(particle, unit)``.
        log_joint: log p(v, h; θ), shape ``(particle, unit)``.
        scores: ∇_e log p(v, h; θ), shape ``(particle, unit, dim)``.
    """

    whitened: Tensor
    log_prior: Tensor
    log_joint: Tensor
    scores: Tensor

    def where(self, chosen: Tensor, other: ScoredDraws) -> ScoredDraws:
        """These where chosen, shape ``(particle, unit)`` or ``(unit,)``, else the others."""
        pairs = zip(self, other, strict=True)
        wide = chosen[..., None]
        return ScoredDraws(*(torch.where(chosen if a.dim() == 2 else wide, a, b) for a, b in pairs))

    def select(self, units: Tensor) -> ScoredDraws:
        """Those of some of the units."""
        return ScoredDraws(*(field[:, units] for field in self))

    def replaced(self, units: Tensor, other: ScoredDraws) -> ScoredDraws:
        """These, but for some of the units the others."""
        return ScoredDraws(*(a.index_copy(1, units, b) for a, b in zip(self, other, strict=True)))


def score_draws(densities: UnitDensities, gaussian: UnitGaussian, whitened: Tensor) -> ScoredDraws:
    """Evaluate the joint density and its gradient at points of a Gaussian's coordinates.

    Where either is no finite number, or the square of a score would soon be none, log p(v, h; θ)
    counts as −∞ and the score as 0.

    Args:
        densities: the units.
        gaussian: one for each unit, or several: a first one for all units, then a second one, …
        whitened: points in the coordinates of each.
    """
    with torch.enable_grad():
        latents = gaussian.unwhiten(whitened).requires_grad_()
        terms = densities.terms(latents.reshape(-1, densities.num_units, densities.dim))
        (gradient,) = torch.autograd.grad(terms.log_joint.sum(), latents)
    log_prior, log_joint = (term.detach().reshape(whitened.shape[:2]) for term in terms)
    scores = multiply(gaussian.scale_tril.mT, gradient)
    largest = torch.finfo(scores.dtype).max ** _STEEPEST
    known = torch.isfinite(log_joint) & (scores.abs() < largest).all(-1)
    log_joint = log_joint.masked_fill(~known, -torch.inf)
    scores = scores.masked_fill(~known[..., None], 0.0)
    return ScoredDraws(whitened, log_prior, log_joint, scores)


class Matched(NamedTuple):
    """A Gaussian per unit, draws of it, and the variance of their log weights, ``(unit,)``."""

    gaussian: UnitGaussian
    draws: ScoredDraws
    spread: Tensor

    @classmethod
    def at(cls, densities: UnitDensities, gaussian: UnitGaussian) -> Matched:
        """As a Gaussian is, with fresh draws."""
        draws = _draw_pairs(densities, gaussian)
        spread = log_weights(gaussian, draws).var(0).nan_to_num(nan=math.inf)
        return cls(gaussian, draws, spread)

    def select(self, units: Tensor) -> Matched:
        """That of some of the units."""
        return Matched(self.gaussian.select(units), self.draws.select(units), self.spread[units])

    def replaced(self, units: Tensor, other: Matched) -> Matched:
        """This one, but for some of the units the other."""
        gaussian = self.gaussian.replaced(units, other.gaussian)
        draws = self.draws.replaced(units, other.draws)
        return Matched(gaussian, draws, self.spread.index_copy(0, units, other.spread))


def largest_spread(dim: int) -> float:
    """How large the variance of the log weights of draws may be for a Gaussian to be good enough.

    ¼ + dim / 24: one whose covariance comes from n independent draws leaves about dim² / (2n), and
    tempering takes 12 draws for each dim; one without any width would leave dim / 2.
    """
    return _LEAST_LIMIT + dim / (2 * _DRAWS_PER_DIM)


def match_in_rounds(
    densities: UnitDensities,
    gaussian: UnitGaussian,
    num_rounds: int,
    select: Selector | None = None,
) -> Matched:
    """The best of several rounds of `match_scores`, each at draws of the one before.

    Args:
        densities: the units.
        gaussian: where to begin; several for each unit, as for `score_draws`, if `select` is not
            given.
        num_rounds: most rounds, at least two; a unit that is matched well enough needs no more.
        select: what gives the densities of some of the units, so that rounds go on for those alone
            that take more of them.
    """
    limit = largest_spread(densities.dim)
    best = tried = Matched.at(densities, gaussian)
    left, part = torch.arange(len(best.spread), device=best.spread.device), densities
    for i in range(num_rounds):
        wide = best.spread[left] > limit
        if i >= _LEAST_ROUNDS and not bool(wide.any()):
            break
        if (
            i >= _LEAST_ROUNDS
            and select is not None
            and float(wide.double().mean()) < WORTH_CUTTING
        ):
            kept = wide.nonzero().flatten()
            left, tried = left[kept], tried.select(kept)
            part = select(left)
        tried = Matched.at(part, match_scores(tried.gaussian, tried.draws))
        better = (tried.spread < best.spread[left]).nonzero().flatten()
        best = best.replaced(left[better], tried.select(better))
    return best


def _draw_pairs(densities: UnitDensities, gaussian: UnitGaussian) -> ScoredDraws:
    """Draws of the Gaussian in pairs e, −e, enough of them to tell a covariance matrix."""
    num_pairs = max(densities.dim + 2, _LEAST_PAIRS)
    half = torch.randn_like(gaussian.mean.expand(num_pairs, -1, -1))
    return score_draws(densities, gaussian, torch.cat([half, -half]))


def log_weights(gaussian: UnitGaussian, draws: ScoredDraws) -> Tensor:
    """Log p(v, h; θ) − log N(h; m, L Lᵀ), shape ``(particle, unit)``."""
    return draws.log_joint - gaussian.log_prob_whitened(draws.whitened)


def match_scores(gaussian: UnitGaussian, draws: ScoredDraws) -> UnitGaussian:
    """The Gaussian whose scores are nearest to those of the posterior at draws of another.

    It minimises E[‖∇ log q − ∇ log p‖²_Σ] over the draws, with Σ the covariance of q, plus
    KL(q_0 ‖ q) / (λ/2) from the Gaussian q_0 that made the draws, in closed form. With λ ten times
    the draws times the dims, the first term rules: a Gaussian posterior is met in two or three
    steps from far off.

    Args:
        gaussian: q_0.
        draws: of it, more of them than dims.

    Source: "Batch and match: black-box variational inference with a score-based divergence", Cai,
    Modi, Pillaud-Vivien, Margossian, Gower, Blei, Saul (2024).

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_vharm.model.problem import prepare
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         h = pyro.sample("h", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(h, 0.5), obs=x)
    >>> (densities,) = prepare(model, None, (torch.tensor([5.0, -5.0]),)).densities
    >>> found = UnitGaussian(torch.zeros(2, 1), torch.ones(2, 1, 1))
    >>> for _ in range(3):
    ...     found = match_scores(found, score_draws(densities, found, torch.randn(16, 2, 1)))
    >>> bool(((found.mean[:, 0] - torch.tensor([4.0, -4.0])).abs() < 0.01).all())
    True
    """
    num_draws, _, dim = draws.whitened.shape
    pull = _PULL * num_draws * dim
    share = pull / (1 + pull)
    mean, slope = draws.whitened.mean(0), draws.scores.mean(0)
    eye = torch.eye(dim, dtype=mean.dtype, device=mean.device)
    spread = eye + pull * _covariance(draws.whitened) + share * _outer(mean)
    tension = pull * _covariance(draws.scores) + share * _outer(slope)
    root = torch.linalg.cholesky(spread)
    values, vectors = torch.linalg.eigh(root.mT @ tension @ root)
    # Σ U Σ + Σ = V with V = R Rᵀ: Σ = R X Rᵀ, and X Rᵀ U R X + X = 1
    shrunk = 2 / (1 + (1 + 4 * values.clamp(min=0.0)).sqrt())
    half = root @ vectors * shrunk.sqrt()[:, None]
    moved = share * (mean + multiply(half @ half.mT, slope[None])[0])
    return UnitGaussian(
        gaussian.unwhiten(moved[None])[0], gaussian.scale_tril @ _cholesky_of_square(half)
    )


def _covariance(vectors: Tensor) -> Tensor:
    centred = vectors - vectors.mean(0)
    return torch.einsum("pui,puj->uij", centred, centred) / len(vectors)


def _outer(vector: Tensor) -> Tensor:
    return vector[:, :, None] * vector[:, None, :]


def _cholesky_of_square(half: Tensor) -> Tensor:
    """The Cholesky factor of B Bᵀ, without squaring the condition of B."""
    upper: Tensor = torch.linalg.qr(half.mT).R
    positive = upper.diagonal(dim1=-2, dim2=-1) > 0
    return torch.where(positive[..., None], upper, -upper).mT
