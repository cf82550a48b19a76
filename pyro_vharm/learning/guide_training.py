"""Training φ alone on the ELBO at fixed θ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Estimate, concatenate
from pyro_vharm.learning.refit import estimate_elbo
from pyro_vharm.learning.training import Schedule, minimise, shuffled_passes
from pyro_vharm.model.minibatches import cut_units
from pyro_vharm.model.problem import Problem
from pyro_vharm.objectives.importance_weighted import importance_weighted_bound

__all__ = ["GuideTraining"]

_ELBO_DRAWS = 50


@dataclass(frozen=True)
class GuideTraining:
    """Retrains the guide on the ELBO, at parameters of the model that stay as they are.

    In rounds, as long as each raises the ELBO by more than two standard errors.

    Args:
        num_steps: gradient steps of a round; 0 leaves the guide as it is.
        learning_rate: first step size of Adam in a round; it falls along a half cosine to a
            hundredth.
        batch_size: units per step where one batch holds more and can be cut; see `cut_units`.
        num_replicates: draws per unit in each step.
        max_rounds: the budget.
    """

    num_steps: int = 1000
    learning_rate: float = 0.003
    batch_size: int = 100
    num_replicates: int = 8
    max_rounds: int = 5

    def __post_init__(self) -> None:
        if self.num_steps < 0:
            raise InputError(f"num_steps must not be negative, got {self.num_steps}")
        Schedule(max(self.num_steps, 1), self.learning_rate)
        for name in ("batch_size", "num_replicates", "max_rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")

    def train(self, problem: Problem, progress: bool) -> None:
        """Train φ, in place."""
        leaves = problem.guide_parameters.trainable()
        if not leaves or not self.num_steps or not problem.densities[0].has_guide_density:
            return
        reached = self._elbo(problem)
        for _ in range(self.max_rounds):
            self._descend(problem, leaves, progress)
            now = self._elbo(problem)
            rise, error = now.value - reached.value, math.hypot(now.mc_error, reached.mc_error)
            if rise <= 2 * error:
                return
            reached = now

    def _elbo(self, problem: Problem) -> Estimate:
        parts = [estimate_elbo(densities, _ELBO_DRAWS) for densities in problem.densities]
        return concatenate(parts).total()

    def _descend(self, problem: Problem, leaves: Sequence[Tensor], progress: bool) -> None:
        batches = [part for d in problem.densities for part in cut_units(d, self.batch_size)]
        order = shuffled_passes(len(batches), self.num_steps)

        def loss(step: int) -> Tensor:
            terms = importance_weighted_bound(batches[order[step]], 1, self.num_replicates)
            return terms.loss * len(batches)  # unbiased whatever the sizes of the batches

        schedule = Schedule(self.num_steps, self.learning_rate)
        minimise(loss, leaves, schedule, description="retraining the guide", progress=progress)
