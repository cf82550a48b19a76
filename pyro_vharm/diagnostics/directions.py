"""Directions in which to look for local harm: every parameter, or a few where there are many."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_vharm.diagnostics.scores import Directions, coordinate_directions
from pyro_vharm.learning.expectation_maximization import ExpectationMaximization
from pyro_vharm.learning.journal import Journal
from pyro_vharm.learning.learning_run import LearningRun, quick_choice
from pyro_vharm.learning.posterior_particles import draw_posteriors
from pyro_vharm.model.problem import Problem

__all__ = ["choose_directions"]

MOST_PARAMETERS = 100
_PARTICLES, _EM_STEPS = 16, 5


def choose_directions(problem: Problem) -> Directions:
    """Every coordinate of θ, or, for more than a hundred, two directions for each tensor of it.

    Those are the tensor's score, and how far a few EM steps take it, both from particles of their
    own: a direction that shared its noise with the score would predict harm where there is none.
    """
    leaves = problem.model_parameters.trainable()
    if sum(leaf.numel() for leaf in leaves) <= MOST_PARAMETERS:
        return coordinate_directions(leaves)
    parts = [*_score(problem, leaves), *_after_em(problem, leaves)]
    known = sorted((p for p in parts if float(p.norm()) > 0), key=lambda p: -float(p.norm()))
    vectors = torch.stack([part / part.norm() for part in known[:MOST_PARAMETERS]])
    return Directions(leaves, vectors)


def _score(problem: Problem, leaves: Sequence[Tensor]) -> list[Tensor]:
    posteriors = draw_posteriors(problem.densities, quick_choice(problem, _PARTICLES))
    loss = torch.stack([part.loss(part.log_shares.exp()) for part in posteriors]).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    pairs = zip(found, leaves, strict=True)
    return _blocks([torch.zeros_like(leaf) if g is None else -g for g, leaf in pairs])


def _after_em(problem: Problem, leaves: Sequence[Tensor]) -> list[Tensor]:
    theta = problem.model_parameters
    with theta.at(theta.values()):
        before = [leaf.detach().clone() for leaf in leaves]
        run = LearningRun(problem, Journal(), progress=False)
        ExpectationMaximization(_EM_STEPS, max_draws=1).learn(run)
        return _blocks([leaf.detach() - old for leaf, old in zip(leaves, before, strict=True)])


def _blocks(parts: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor's part as a vector over all elements, 0 elsewhere."""
    sizes = [part.numel() for part in parts]
    total, start, vectors = sum(sizes), 0, []
    for part, size in zip(parts, sizes, strict=True):
        vector = torch.zeros(total, dtype=torch.float64, device=part.device)
        vector[start : start + size] = part.detach().reshape(-1)
        vectors.append(vector)
        start += size
    return vectors
