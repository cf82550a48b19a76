"""Hamiltonian transitions for all particles of all units, whitened by a factor per unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.inference.gaussians import FEW_DIMS, UnitGaussian, UnitMixture, multiply
from pyro_vharm.inference.path import AnnealingPath, PathState
from pyro_vharm.inference.start import StartDensity
from pyro_vharm.model.compilation import Accelerated, accelerate
from pyro_vharm.model.densities import UnitDensities

__all__ = ["HamiltonianKernel", "HamiltonianMoves", "Transition"]


class Transition(NamedTuple):
    """Where a transition ended, and how likely the proposals were to be accepted.

    Attributes:
        state: the position and the path there.
        acceptance: acceptance probabilities, shape ``(particle, unit)``.
    """

    state: PathState
    acceptance: Tensor


@dataclass(frozen=True)
class HamiltonianKernel:
    """One Hamiltonian Monte Carlo step, which leaves f_β invariant and is its own reversal.

    In the coordinates e with h = m + L e, momenta are standard normal and r ← r + ½ε ∇log f_β(e),
    e ← e + ε r, r ← r + ½ε ∇log f_β(e), repeated; then a Metropolis test. A proposal whose
    energy is not finite is rejected. The step size ε of a unit varies at random by ± `jitter` from
    transition to transition, so that no orbit closes on itself.

    Args:
        num_leapfrog: leapfrog steps of a transition, one gradient each.
        whitened: take m and L from a Gaussian per unit; otherwise m = 0 and L = 1.
        target_acceptance: what a pilot tunes step sizes to.
        jitter: relative half-width of the random factor of the step size, in [0, 1).

    Source: "MCMC using Hamiltonian dynamics", Neal (2011).
    """

    num_leapfrog: int = 5
    whitened: bool = True
    target_acceptance: float = 0.75
    jitter: float = 0.2

    def __post_init__(self) -> None:
        if self.num_leapfrog < 1:
            raise InputError(f"num_leapfrog must be at least 1, not {self.num_leapfrog}")
        if not 0 < self.target_acceptance < 1:
            raise InputError(f"target_acceptance must lie in (0, 1), not {self.target_acceptance}")
        if not 0 <= self.jitter < 1:
            raise InputError(f"jitter must lie in [0, 1), not {self.jitter}")

    def moves(
        self,
        densities: UnitDensities,
        start: StartDensity,
        num_particles: int,
        num_calls: int,
        *,
        own_metric: bool = False,
    ) -> HamiltonianMoves:
        """Transitions along the path from `start`, in the form that the calls ahead pay for.

        Args:
            densities: the units.
            start: f_0.
            num_particles: of each unit.
            num_calls: how many transitions lie ahead.
            own_metric: whether each call brings its own metric; by default it is the start's.
        """
        layout = _Layout(dims_first=densities.dim <= FEW_DIMS)
        path = AnnealingPath(densities, start, self.whitened)
        fields = layout.pack_start(start)
        trajectory = _Trajectory(
            start.prior_share, self.num_leapfrog, self.whitened, own_metric, layout
        )
        inputs = self._example(path, layout, num_particles)
        metric = layout.pack(start.gaussian.scale_tril, 2)
        further = (metric, *fields) if own_metric else fields
        call = accelerate(trajectory, densities, (*inputs, *further), num_calls)
        return HamiltonianMoves(self, path, own_metric, layout, fields, call)

    def _example(
        self, path: AnnealingPath, layout: _Layout, num_particles: int
    ) -> tuple[Tensor, ...]:
        """A transition to try: what it depends on, random numbers among it.

        From the start's mean, where densities and slopes count as 0: what is to be tried are the
        time it takes, and whether a graph gives the same numbers.
        """
        mean = path.start.gaussian.mean
        position = path.position(mean.expand(num_particles, -1, -1).clone())
        slope, density = torch.zeros_like(position), torch.zeros_like(position[..., 0])
        state = PathState(position, density, density.clone(), slope, slope.clone())
        per_pair = torch.full_like(density, 0.5)
        momentum = layout.pack(0.1 + torch.zeros_like(state.position), 1)
        return (*layout.pack_state(state), momentum, per_pair, per_pair[0], 0.1 * per_pair[0])


@dataclass(frozen=True)
class _Layout:
    """How the tensors of a transition lie in memory.

    Attributes:
        dims_first: the few dims of latents before particle and unit, so that loops run over units.
    """

    dims_first: bool

    def pack(self, tensor: Tensor, num_dims: int) -> Tensor:
        """The last dims first, if so; contiguous."""
        if self.dims_first:
            tensor = tensor.movedim(tuple(range(-num_dims, 0)), tuple(range(num_dims)))
        return tensor.contiguous()

    def unpack(self, tensor: Tensor, num_dims: int) -> Tensor:
        """The dims where they belong."""
        if not self.dims_first:
            return tensor
        return tensor.movedim(tuple(range(num_dims)), tuple(range(-num_dims, 0)))

    def pack_start(self, start: StartDensity) -> tuple[Tensor, ...]:
        """Means and Cholesky factors of a start density, with the shares of a mixture."""
        gaussian = self._pack_gaussian(start.gaussian)
        if start.mixture is None:
            return gaussian
        return *gaussian, start.mixture.log_shares, *self._pack_gaussian(start.mixture.gaussians)

    def unpack_start(self, fields: Sequence[Tensor], prior_share: float) -> StartDensity:
        """The start density of such fields."""
        gaussian, mixture = self._unpack_gaussian(fields[:2]), None
        if len(fields) > 2:
            mixture = UnitMixture(fields[2], self._unpack_gaussian(fields[3:]))
        return StartDensity(gaussian, prior_share, mixture)

    def _pack_gaussian(self, gaussian: UnitGaussian) -> tuple[Tensor, Tensor]:
        return self.pack(gaussian.mean, 1), self.pack(gaussian.scale_tril, 2)

    def _unpack_gaussian(self, fields: Sequence[Tensor]) -> UnitGaussian:
        mean, scale_tril = fields
        return UnitGaussian(self.unpack(mean, 1), self.unpack(scale_tril, 2))

    def pack_state(self, state: PathState) -> tuple[Tensor, ...]:
        """The fields of a state."""
        return tuple(self.pack(field, field.dim() - 2) for field in state)

    def unpack_state(self, fields: Sequence[Tensor]) -> PathState:
        """The state of such fields."""
        return PathState(*(self.unpack(field, field.dim() - 2) for field in fields))


@dataclass(frozen=True)
class HamiltonianMoves:
    """A kernel bound to the path from a start density to the joint density of some units.

    Attributes:
        kernel: its settings.
        path: the densities, f_0 and the coordinates that it moves in.
        own_metric: whether each call brings its own metric.
        layout: how tensors lie in memory.
        fields: the tensors of the start density, in that layout.
        trajectory: the transition as a function of tensors.
    """

    kernel: HamiltonianKernel
    path: AnnealingPath
    own_metric: bool
    layout: _Layout
    fields: tuple[Tensor, ...]
    trajectory: Accelerated

    @property
    def densities(self) -> UnitDensities:
        """The units."""
        return self.path.densities

    @property
    def start(self) -> StartDensity:
        """f_0."""
        return self.path.start

    def at(self, latents: Tensor, *, resting: bool = False) -> PathState:
        """The path at latents ``(particle, unit, dim)``, which may be where nothing moves on."""
        position = self.path.position(latents)
        return self.path.resting(position) if resting else self.path.state(position)

    def latents(self, state: PathState) -> Tensor:
        """The latents of a state, ``(particle, unit, dim)``."""
        return self.path.latents(state.position).contiguous()

    def draw_start(self, num_particles: int, *, resting: bool = False) -> PathState:
        """Draws of f_0."""
        return self.at(self.start.sample(self.densities, num_particles), resting=resting)

    def __call__(
        self,
        state: PathState,
        temperature: Tensor,
        step_size: Tensor,
        metric: Tensor | None = None,
    ) -> Transition:
        """One transition that leaves f_β of every unit invariant.

        Args:
            state: where to start.
            temperature: β per unit, shape ``(unit,)``.
            step_size: ε per unit, shape ``(unit,)``.
            metric: Cholesky factor of a covariance of positions per unit, ``(unit, dim, dim)``, for
                moves that take their own.
        """
        noise = torch.rand_like(step_size)
        step_size = step_size * (1 + self.kernel.jitter * (2 * noise - 1))
        fields = self.layout.pack_state(state)
        momentum = torch.randn_like(fields[0])
        uniform = torch.rand_like(state.log_joint)
        inputs = (*fields, momentum, uniform, temperature, step_size)
        if self.own_metric:
            assert metric is not None, "moves that take their own metric need one"
            inputs = (*inputs, self.layout.pack(metric, 2))
        *moved, acceptance = self.trajectory(*inputs, *self.fields)
        return Transition(self.layout.unpack_state(moved), acceptance)

    def on(self, densities: UnitDensities, start: StartDensity) -> HamiltonianMoves:
        """The same for another batch of the same shape, from a start of the same form."""
        assert start.prior_share == self.start.prior_share, "it is part of the compiled function"
        fields = self.layout.pack_start(start)
        assert len(fields) == len(self.fields), "and so is a mixture"
        return replace(
            self,
            path=replace(self.path, densities=densities, start=start),
            fields=fields,
            trajectory=self.trajectory.on(densities),
        )


@dataclass(frozen=True)
class _Trajectory:
    """A transition as a function of tensors in a layout, random numbers among them."""

    prior_share: float
    num_leapfrog: int
    whitened: bool
    own_metric: bool
    layout: _Layout

    def __call__(self, densities: UnitDensities, *inputs: Tensor) -> tuple[Tensor, ...]:
        state = self.layout.unpack_state(inputs[:5])
        momentum = self.layout.unpack(inputs[5], 1)
        uniform, temperature, step_size = inputs[6:9]
        num_own = int(self.own_metric)
        start = self.layout.unpack_start(inputs[9 + num_own :], self.prior_share)
        path = AnnealingPath(densities, start, self.whitened)
        metric = self.layout.unpack(inputs[9], 2) if self.own_metric and self.whitened else None
        proposed, moving = self._integrate(path, state, momentum, temperature, step_size, metric)
        before = state.log_density(temperature) - 0.5 * momentum.square().sum(-1)
        after = proposed.log_density(temperature) - 0.5 * moving.square().sum(-1)
        change = (after - before).nan_to_num(nan=-torch.inf)
        acceptance = change.clamp(max=0.0).exp()
        moved = proposed.where(uniform < acceptance, state)
        return *self.layout.pack_state(moved), acceptance

    def _integrate(
        self,
        path: AnnealingPath,
        state: PathState,
        momentum: Tensor,
        temperature: Tensor,
        step_size: Tensor,
        metric: Tensor | None,
    ) -> tuple[PathState, Tensor]:
        """Leapfrog steps to a proposal, and the momentum there."""
        step = step_size[:, None]

        def force(gradient: Tensor) -> Tensor:
            return gradient if metric is None else multiply(metric.mT, gradient)

        def velocity(momentum: Tensor) -> Tensor:
            return momentum if metric is None else multiply(metric, momentum)

        moving = momentum + 0.5 * step * force(state.gradient(temperature))
        position = state.position + step * velocity(moving)
        for _ in range(self.num_leapfrog - 1):
            moving = moving + step * force(path.gradient(position, temperature))
            position = position + step * velocity(moving)
        proposed = path.state(position)
        moving = moving + 0.5 * step * force(proposed.gradient(temperature))
        return proposed, moving
