"""Two independent estimates of the score of log evidence and of the ELBO, along directions of θ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch

from pyro_vharm.diagnostics.scores import Directions, PosteriorScores, score_particles
from pyro_vharm.inference.choice import Choice
from pyro_vharm.learning.posterior_particles import PosteriorParticles, draw_posteriors
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.problem import Problem
from pyro_vharm.particles import effective_sample_size

__all__ = ["CrossedScores", "cross_elbo_scores", "cross_evidence_scores"]


class CrossedScores(NamedTuple):
    """The same scores from two independent sets of particles.

    A product of one with the other has no share of noise in expectation. Where the particles are
    nodes of quadrature, or sums, the two are the same.

    Attributes:
        first: from one set.
        second: from the other.
        least_size: the smallest effective number of particles of a unit; infinite for nodes.
    """

    first: PosteriorScores
    second: PosteriorScores
    least_size: float


def cross_evidence_scores(
    problem: Problem, choice: Choice, directions: Directions, *, progress: bool
) -> CrossedScores:
    """∇ℓ by Fisher's identity, from two runs of an inference method, pilots and all."""

    def run() -> tuple[PosteriorScores, float]:
        posteriors = draw_posteriors(problem.densities, choice, progress=progress)
        scores = [_of_posterior(part, directions) for part in posteriors]
        return _joined(scores), min(map(_least_size, posteriors))

    first, size = run()
    if size == math.inf:
        return CrossedScores(first, first, size)
    second, other = run()
    return CrossedScores(first, second, min(size, other))


def cross_elbo_scores(
    problem: Problem, directions: Directions, num_particles: int
) -> CrossedScores | None:
    """∇_θ L at fixed q, from two sets of draws of the guide; ``None`` without its density."""
    if not problem.densities[0].has_guide_density:
        return None

    def run() -> PosteriorScores:
        return _joined([_of_guide(d, directions, num_particles) for d in problem.densities])

    return CrossedScores(run(), run(), float(num_particles))


def _joined(parts: Sequence[PosteriorScores]) -> PosteriorScores:
    return reduce(PosteriorScores.joined, parts)


def _least_size(part: PosteriorParticles) -> float:
    if not part.random:
        return math.inf
    sizes = effective_sample_size(part.log_shares) / part.dilution
    return float(sizes.min())


def _of_posterior(part: PosteriorParticles, directions: Directions) -> PosteriorScores:
    log_joint = part.densities.log_joint(part.latents)
    shares, random = part.log_shares.exp(), part.random
    return score_particles(log_joint, shares, directions, random=random, dilution=part.dilution)


def _of_guide(
    densities: UnitDensities, directions: Directions, num_particles: int
) -> PosteriorScores:
    """Draws of the guide are its posterior's particles, with equal weights."""
    log_joint = densities.draw_guide(num_particles).log_joint
    shares = torch.full_like(log_joint, 1 / num_particles).detach()
    dilution = torch.ones_like(shares[0])
    return score_particles(log_joint, shares, directions, random=True, dilution=dilution)
