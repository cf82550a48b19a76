"""Quick learning by EM on particles that are drawn now and then, and reweighted in between."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.learning.foresight import timed
from pyro_vharm.learning.guide_training import GuideTraining
from pyro_vharm.learning.learning_run import Ending, LearningRun, quick_choice
from pyro_vharm.learning.posterior_particles import PosteriorParticles, draw_posteriors
from pyro_vharm.learning.quasi_newton import descend
from pyro_vharm.model.problem import Problem
from pyro_vharm.particles import effective_sample_size

__all__ = ["ExpectationMaximization"]

_PARTICLES = 16
_LEAST_SHARE = 0.5  # of the effective size, which reweighting may leave
_LEAST_GAIN = 1e-3


@dataclass(frozen=True)
class ExpectationMaximization:
    """EM on fixed particles: seconds, not minutes, for a first look at what could be gained.

    Particles of every unit are drawn at the present θ₀, by quadrature, enumeration or a short
    annealing. An E-step weights them anew, w_p ∝ w_p p(v, h_p; θ) / p(v, h_p; θ₀); an M-step
    raises Σ_u Σ_p w̃_up log p(v_u, h_up; θ) by a few iterations of L-BFGS. Where the weights have
    become uneven, or nothing more is gained, particles are drawn anew. With exact particles no
    step can lower the evidence.

    Args:
        num_steps: EM steps.
        max_iterations: of L-BFGS in an M-step.
        max_draws: how often particles may be drawn.
        guide_training: how φ is retrained at θ_ref.

    Source: "Maximum Likelihood from Incomplete Data via the EM Algorithm", Dempster, Laird, Rubin
    (1977); "Implementations of the Monte Carlo EM Algorithm", Levine, Casella (2001).
    """

    num_steps: int = 20
    max_iterations: int = 10
    max_draws: int = 5
    guide_training: GuideTraining = field(default_factory=lambda: GuideTraining(200))

    def __post_init__(self) -> None:
        for name in ("num_steps", "max_iterations", "max_draws"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def name(self) -> str:
        """What it does, with its budget."""
        return f"EM, {self.num_steps} steps"

    def check(self, problem: Problem) -> None:
        """Any problem will do."""

    def most_seconds(self, problem: Problem) -> float:
        """All draws of particles and all iterations of all M-steps, from timing one of each."""
        leaves = problem.model_parameters.trainable()
        choice = quick_choice(problem, _PARTICLES)
        begun = time.perf_counter()
        posteriors = draw_posteriors(problem.densities, choice)
        drawing = time.perf_counter() - begun

        def iterate() -> None:
            losses = [part.loss(part.log_shares.exp()) for part in posteriors]
            torch.autograd.grad(torch.stack(losses).sum(), leaves, allow_unused=True)

        iterations = self.num_steps * self.max_iterations
        return self.max_draws * drawing + iterations * timed(iterate)

    def learn(self, run: LearningRun) -> Ending:
        """Train θ, in place; φ stays as it is."""
        done, gain = 0, 0.0
        for i in range(self.max_draws):
            ended = run.piece(f"draw-{i}", partial(self._climb, run, self.num_steps - done))
            done, gain = done + int(ended["num_steps"]), ended["gain"]
            if gain < _LEAST_GAIN:
                return Ending(True, f"{gain:.2g} nats gained by the last particles")
            if done >= self.num_steps:
                return Ending(False, f"{done} steps, {gain:.2g} nats gained by the last particles")
        return Ending(False, f"particles drawn {self.max_draws} times")

    def _climb(self, run: LearningRun, most_steps: int) -> dict[str, float]:
        """EM steps on one set of particles; how many, and the log evidence they gained."""
        choice = quick_choice(run.problem, _PARTICLES)
        posteriors = draw_posteriors(run.problem.densities, choice)
        leaves = run.problem.model_parameters.trainable()
        fresh = _sizes([part.log_shares for part in posteriors])
        done, gain = 0, 0.0
        while True:
            log_weights = [part.reweighted() for part in posteriors]
            reached = float(torch.cat([w.logsumexp(0) for w in log_weights]).double().sum())
            worn = float((_sizes(log_weights) / fresh).mean()) < _LEAST_SHARE
            if done == most_steps or (done and (worn or reached - gain < _LEAST_GAIN)):
                return {"num_steps": done, "gain": reached}
            gain = reached
            self._maximise(posteriors, [w.softmax(0) for w in log_weights], leaves)
            done, run.num_steps = done + 1, run.num_steps + 1
            run.note()

    def _maximise(
        self,
        posteriors: Sequence[PosteriorParticles],
        shares: Sequence[Tensor],
        leaves: Sequence[Tensor],
    ) -> None:
        def losses() -> tuple[float, Sequence[Tensor | None]]:
            pairs = zip(posteriors, shares, strict=True)
            total = torch.stack([part.loss(share) for part, share in pairs]).sum()
            return float(total.detach()), torch.autograd.grad(total, leaves, allow_unused=True)

        descend(losses, leaves, tolerance=_LEAST_GAIN, max_iterations=self.max_iterations)


def _sizes(log_weights: Sequence[Tensor]) -> Tensor:
    """Effective number of particles of every unit of every batch."""
    return torch.cat([effective_sample_size(part) for part in log_weights])
