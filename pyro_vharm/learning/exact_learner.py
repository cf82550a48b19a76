"""Learning θ by quasi-Newton steps on the log evidence itself, where that can be had exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.learning.foresight import timed
from pyro_vharm.learning.guide_training import GuideTraining
from pyro_vharm.learning.learning_run import Ending, LearningRun
from pyro_vharm.learning.quasi_newton import descend
from pyro_vharm.model.problem import Problem
from pyro_vharm.objectives.exact import ExactEvidence

__all__ = ["ExactLearner"]

_USUAL = 15  # evaluations, and as many more for each parameter


@dataclass(frozen=True)
class ExactLearner:
    """Maximises Σ_u log p(v_u; θ), by enumeration or quadrature, with L-BFGS on unconstrained θ.

    It has converged when what is left to gain, ½ gᵀ B g with g the gradient and B the inverse
    Hessian as L-BFGS knows it, is below the tolerance. Every evaluation is over all the data.

    Args:
        max_iterations: the budget.
        tolerance: nats in total.
        objective: how the evidence is computed.
        guide_training: how φ is retrained at θ_ref.
    """

    max_iterations: int = 500
    tolerance: float = 1e-3
    objective: ExactEvidence = field(default_factory=ExactEvidence)
    guide_training: GuideTraining = field(default_factory=GuideTraining)

    def __post_init__(self) -> None:
        if not isinstance(self.objective, ExactEvidence):
            raise InputError(f"objective must be ExactEvidence(...), not {self.objective!r}")
        if self.max_iterations < 1:
            raise InputError(f"max_iterations must be at least 1, not {self.max_iterations}")
        if not self.tolerance > 0:
            raise InputError(f"tolerance must be positive, not {self.tolerance}")

    @property
    def name(self) -> str:
        """What it climbs."""
        return "exact evidence"

    def check(self, problem: Problem) -> None:
        """Refuse a problem whose evidence cannot be had exactly.

        Raises:
            InputError: if a unit has too many continuous dimensions.
        """
        self.objective.check(problem.densities[0])

    def most_seconds(self, problem: Problem) -> float:
        """As many evaluations as are usual for so many parameters, from timing one."""
        leaves, objective = problem.model_parameters.trainable(), self.objective.renewed()
        usual = min(_USUAL + _USUAL * sum(leaf.numel() for leaf in leaves), self.max_iterations)

        def evaluate() -> None:
            loss = objective.evaluate(problem.densities[0]).loss
            torch.autograd.grad(loss, leaves, allow_unused=True)

        share = problem.num_units / problem.densities[0].num_units
        return usual * share * timed(evaluate)

    def learn(self, run: LearningRun) -> Ending:
        """Train θ, in place; φ stays as it is.

        Raises:
            UnresolvedIntegralError: if the evidence cannot be had where it starts.
        """
        problem, objective = run.problem, self.objective.renewed()
        leaves = problem.model_parameters.trainable()

        def losses() -> tuple[float, Sequence[Tensor]]:
            total, sums = 0.0, [torch.zeros_like(leaf) for leaf in leaves]
            for densities in problem.densities:
                loss = objective.evaluate(densities).loss
                total += float(loss.detach())
                found = torch.autograd.grad(loss, leaves, allow_unused=True)
                sums = [s if g is None else s + g for s, g in zip(sums, found, strict=True)]
            return total, sums

        def note(loss: float) -> None:
            run.num_steps += 1
            run.note(evidence=-loss / problem.num_units)

        def ascend() -> dict[str, float]:
            ended = descend(
                losses,
                leaves,
                tolerance=self.tolerance,
                max_iterations=self.max_iterations,
                note=note,
            )
            return {"left": ended.left, "num_iterations": ended.num_iterations}

        ended = run.piece("ascent", ascend)
        converged = ended["left"] <= self.tolerance
        reason = f"{ended['left']:.2g} nats left to gain after {ended['num_iterations']} iterations"
        return Ending(converged, reason)
