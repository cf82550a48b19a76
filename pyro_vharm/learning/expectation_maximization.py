"""Quick learning by EM, with steps longer than EM's where the particles allow it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch

from pyro_vharm.errors import InputError
from pyro_vharm.learning.foresight import timed
from pyro_vharm.learning.guide_training import GuideTraining
from pyro_vharm.learning.learning_run import Ending, LearningRun, quick_choice
from pyro_vharm.learning.particle_chains import ParticleChains
from pyro_vharm.learning.posterior_particles import draw_posteriors
from pyro_vharm.learning.proximal_steps import PARTICLES, ProximalSteps
from pyro_vharm.model.clock import now
from pyro_vharm.model.problem import Problem

__all__ = ["ExpectationMaximization"]

_STEPS_PER_DRAW = 25
_LEAST_GAIN = 1e-3


@dataclass(frozen=True)
class ExpectationMaximization:
    """Accelerated EM on particles: seconds, not minutes, for a first look at what could be gained.

    Particles of every unit are drawn at the present θ₀, by quadrature, enumeration or a short
    annealing. At any θ near it their weights w_p ∝ p(v, h_p; θ) / p(v, h_p; θ₀) estimate log
    evidence: ℓ(θ) ≈ ℓ(θ₀) + Σ_u log Σ_p w_up. A step from θ_k raises, by L-BFGS,

        Σ_u log Σ_p w_up(θ) − β Σ_u KL_u(p(h | v; θ_k) ‖ p(h | v; θ)),

    with the divergence taken on the same particles. With β = 1 that is EM's expected log joint
    density, and a step an EM step, which closes only as much of the way as the data say of the
    latents. So β starts at 1 and falls with each step; it rises where a step would leave fewer
    than half the effective number of particles, and that step is undone. With exact particles no
    step can lower the evidence, whatever β.

    Nodes of a quadrature or an enumeration stay until they are worn. Random particles follow θ:
    after each step they are resampled and moved by a few Hamiltonian transitions. Near the end,
    up to 16 sets of them are averaged, as the noise of one would be a good part of a nat where the
    latents say much more than the data.

    Args:
        num_steps: steps, of an E-step and a maximisation each.
        max_iterations: of L-BFGS in a step.
        max_draws: how often particles may be drawn from scratch: when nodes are worn, and after
            every 25 steps of random ones.
        guide_training: how φ is retrained at θ_ref.

    Source: "Maximum Likelihood from Incomplete Data via the EM Algorithm", Dempster, Laird, Rubin
    (1977); "Kullback Proximal Algorithms for Maximum-Likelihood Estimation", Chrétien, Hero
    (2000); "Constrained Monte Carlo Maximum Likelihood for Dependent Data", Geyer, Thompson
    (1992).
    """

    num_steps: int = 50
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
        """All draws of particles and all steps, from timing one draw and parts of a step."""
        leaves = problem.model_parameters.trainable()
        begun = now()
        particles = draw_posteriors(problem.densities, quick_choice(problem, PARTICLES))
        drawing, moving = now() - begun, 0.0
        if particles[0].random:
            chains = [ParticleChains.of(part, self.num_steps) for part in particles]
            pairs = list(zip(chains, particles, strict=True))
            moving = timed(lambda: [own.carry_on(part) for own, part in pairs])

        def iterate() -> None:
            losses = [part.proximal_loss(part.log_shares.exp(), 1.0) for part in particles]
            torch.autograd.grad(torch.stack(losses).sum(), leaves, allow_unused=True)

        step = self.max_iterations * timed(iterate) + moving
        return self.max_draws * drawing + self.num_steps * step

    def learn(self, run: LearningRun) -> Ending:
        """Train θ, in place; φ stays as it is."""
        done, penalty, last = 0, 1.0, 0.0
        for i in range(self.max_draws):
            most = min(self.num_steps - done, _STEPS_PER_DRAW)
            ended = run.piece(f"draw-{i}", partial(self._climb, run, most, penalty))
            done, penalty = done + int(ended["num_steps"]), ended["penalty"]
            last = ended["last"]
            if ended["converged"]:
                return Ending(True, f"{last:.2g} nats gained by the last step")
            if done >= self.num_steps:
                return Ending(False, f"{done} steps, {last:.2g} nats gained by the last of them")
        reason = f"particles drawn {self.max_draws} times, {last:.2g} nats gained by the last step"
        return Ending(False, reason)

    def _climb(self, run: LearningRun, most_steps: int, penalty: float) -> dict[str, float]:
        """Steps with particles that were drawn once: how many, and what they gained."""
        steps = ProximalSteps.begin(
            run.problem,
            penalty=penalty,
            max_iterations=self.max_iterations,
            most_steps=most_steps,
        )
        done, gains, settled = 0, [0.0], False
        while done < most_steps and not settled:
            gain = steps.step()
            if gain is None:
                break
            gains.append(gain)
            done, run.num_steps = done + 1, run.num_steps + 1
            run.note()
            settled = steps.has_settled(gain)
            if not settled:
                steps.carry_on(gain)
        converged = settled and (bool(steps.chains) or sum(gains) < _LEAST_GAIN)
        return {
            "num_steps": done,
            "penalty": steps.penalty,
            "last": gains[-1],
            "converged": float(converged),
        }
