"""Steps of EM with a penalty that adapts, on particles that are kept, carried on, or worn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_vharm.learning.learning_run import quick_choice
from pyro_vharm.learning.particle_chains import ParticleChains
from pyro_vharm.learning.posterior_particles import PosteriorParticles, draw_posteriors
from pyro_vharm.learning.quasi_newton import descend
from pyro_vharm.model.problem import Problem

__all__ = ["PARTICLES", "ProximalSteps"]

PARTICLES = 16
_LEAST_SHARE = 0.5  # of the effective size, which reweighting may leave
_MOST_SETS, _MOST_ELEMENTS, _NEAR = 16, 2**24, 1.0
_LEAST_GAIN, _LEAST_NOISY_GAIN = 1e-3, 1e-2
_LIGHTER, _HEAVIER, _TRIES = 0.25, 2.0, 30
_LEAST_PENALTY, _SMALL_PENALTY = 1e-4, 0.1


@dataclass
class ProximalSteps:
    """The particles of all batches, and the penalty on going far from where they stand.

    Attributes:
        leaves: of θ.
        sets: particles of every batch, drawn at one θ after the other; the last are the newest.
        chains: what carries them on; none for nodes.
        penalty: β of the next step.
        max_iterations: of L-BFGS in a step.
        fresh: whether the newest were drawn at the present θ.
    """

    leaves: Sequence[Tensor]
    sets: list[list[PosteriorParticles]]
    chains: list[ParticleChains] = field(default_factory=list)
    penalty: float = 1.0
    max_iterations: int = 10
    fresh: bool = True

    @classmethod
    def begin(
        cls, problem: Problem, *, penalty: float, max_iterations: int, most_steps: int
    ) -> ProximalSteps:
        """With new particles at the present θ."""
        drawn = draw_posteriors(problem.densities, quick_choice(problem, PARTICLES))
        leaves = problem.model_parameters.trainable()
        chains: list[ParticleChains] = []
        if drawn[0].random:
            chains = [ParticleChains.of(part, most_steps) for part in drawn]
            drawn = _carried(chains, drawn)
        return cls(leaves, [drawn], chains, penalty, max_iterations)

    def step(self) -> float | None:
        """Raise the estimate of log evidence less β times the divergence, in place.

        A step that wears out the newest particles is undone. From where they were drawn it is
        tried again with a larger β.

        Returns:
            how much the estimate rose, in nats; ``None`` where new particles are needed.
        """
        begun = [leaf.detach().clone() for leaf in self.leaves]
        before = self._estimate()
        for i in range(_TRIES):
            self._maximise()
            if self._is_good(self.sets[-1]):
                if i == 0:
                    self.penalty = max(_LIGHTER * self.penalty, _LEAST_PENALTY)
                return self._estimate() - before
            with torch.no_grad():
                for leaf, value in zip(self.leaves, begun, strict=True):
                    leaf.copy_(value)
            if not self.fresh:
                return None
            self.penalty *= _HEAVIER
        return 0.0

    def has_settled(self, gain: float) -> bool:
        """Whether a step with such a gain leaves nothing to look for with these particles."""
        if self.chains:
            return len(self.sets) == self._most_sets and gain < _LEAST_NOISY_GAIN
        return gain < _LEAST_GAIN and self.penalty < _SMALL_PENALTY

    def carry_on(self, gain: float) -> None:
        """Bring random particles to the posterior at the present θ.

        Near the end, where steps gain little, earlier sets stay as long as they are not worn: their
        average is less noisy.
        """
        self.fresh = bool(self.chains)
        if self.chains:
            newest = _carried(self.chains, self.sets[-1])
            kept = [each for each in self.sets if gain < _NEAR and self._is_good(each)]
            self.sets = [*kept, newest][-self._most_sets :]

    @property
    def _most_sets(self) -> int:
        """How many sets are kept at most: fewer where memory counts."""
        size = sum(part.latents.numel() for part in self.sets[-1])
        return min(max(_MOST_ELEMENTS // max(size, 1), 1), _MOST_SETS)

    def _is_good(self, particles: Sequence[PosteriorParticles]) -> bool:
        return float(torch.cat([part.share_left() for part in particles]).mean()) >= _LEAST_SHARE

    def _estimate(self) -> float:
        """Of the rise of log evidence from where particles were drawn, averaged over sets."""
        parts = [part.reweighted().logsumexp(0) for each in self.sets for part in each]
        return float(torch.cat(parts).double().sum()) / len(self.sets)

    def _maximise(self) -> None:
        parts = [part for each in self.sets for part in each]
        shares = [part.reweighted().softmax(0) for part in parts]

        def losses() -> tuple[float, Sequence[Tensor | None]]:
            total, sums = 0.0, [torch.zeros_like(leaf) for leaf in self.leaves]
            for part, share in zip(parts, shares, strict=True):
                loss = part.proximal_loss(share, self.penalty) / len(self.sets)
                total += float(loss.detach())
                found = torch.autograd.grad(loss, self.leaves, allow_unused=True)
                sums = [s if g is None else s + g for s, g in zip(sums, found, strict=True)]
            return total, sums

        descend(losses, self.leaves, tolerance=_LEAST_GAIN, max_iterations=self.max_iterations)


def _carried(
    chains: Sequence[ParticleChains], particles: Sequence[PosteriorParticles]
) -> list[PosteriorParticles]:
    return [own.carry_on(part) for own, part in zip(chains, particles, strict=True)]
