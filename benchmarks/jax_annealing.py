"""Annealed importance sampling as a user of JAX would write it: one scan over temperatures, to jit.

In whitened coordinates e, with h = m + L e, everything is a function of e: the start density
(1 − ε) N(0, I) + ε p(h; θ) and the joint density. Each leapfrog step takes one gradient, and the
gradients of both ends are carried from transition to transition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["JaxAnnealing", "JaxStart"]

type Array = Any

_LOG_2PI = math.log(2 * math.pi)
_FIRST_STEP_SIZE, _TARGET_ACCEPTANCE = 0.5, 0.75


class JaxStart(NamedTuple):
    """(1 − ε) N(h; m_u, L_u L_uᵀ) + ε N(h; 0, I), with whitening by L_u.

    Attributes:
        mean: m, shape ``(unit, dim)``.
        scale_tril: L, shape ``(unit, dim, dim)``; where it is of shape ``()``, ε must be 1, and
            e is h itself.
        prior_share: ε.
    """

    mean: Array
    scale_tril: Array
    prior_share: Array


class _State(NamedTuple):
    position: Array
    log_start: Array
    log_joint: Array
    start_gradient: Array
    joint_gradient: Array


@dataclass(frozen=True)
class JaxAnnealing:
    """Forward, backward and tuning runs for one log joint density with a N(0, I) prior.

    Attributes:
        log_joint: ``(latents, *arrays)`` → log p(v, h), shape ``(particle, unit)``.
        num_leapfrog: leapfrog steps of a transition.
        jitter: relative half-width of the random factor of the step size.
        whitened: whether the start has a Gaussian part; otherwise it is the prior.
    """

    log_joint: Callable[..., Array]
    num_leapfrog: int = 5
    jitter: float = 0.2
    whitened: bool = True

    def forward(
        self,
        key: Array,
        num_particles: int,
        start: JaxStart,
        temperatures: Array,
        step_sizes: Array,
        arrays: tuple[Array, ...],
    ) -> Array:
        """Log weights ``(particle, unit)`` of draws of the start carried to the joint density."""
        first, key = jax.random.split(key)
        state = self._draw(first, num_particles, start, arrays)
        changes = jnp.diff(temperatures, axis=0)

        def step(carry: tuple[Array, Array], xs: tuple[Array, ...]) -> Any:
            state, log_weights = carry
            own, change, temperature, step_size = xs
            log_weights += change * (state.log_joint - state.log_start)
            state, _ = self._move(own, state, temperature, step_size, start, arrays)
            return (state, log_weights), None

        xs = jax.random.split(key, len(changes)), changes, temperatures[1:], step_sizes
        (_, log_weights), _ = jax.lax.scan(step, (state, jnp.zeros_like(state.log_joint)), xs)
        return log_weights

    def backward(
        self,
        key: Array,
        latents: Array,
        start: JaxStart,
        temperatures: Array,
        step_sizes: Array,
        arrays: tuple[Array, ...],
    ) -> Array:
        """Log weights of posterior draws carried back; the start must be the prior."""
        state = self._at(latents, start, arrays)
        changes = jnp.diff(temperatures, axis=0)

        def step(carry: tuple[Array, Array], xs: tuple[Array, ...]) -> Any:
            state, log_weights = carry
            own, change, temperature, step_size = xs
            state, _ = self._move(own, state, temperature, step_size, start, arrays)
            return (state, log_weights + change * (state.log_joint - state.log_start)), None

        xs = jax.random.split(key, len(changes)), changes, temperatures[1:], step_sizes
        first = state, jnp.zeros_like(state.log_joint)
        (_, log_weights), _ = jax.lax.scan(step, first, xs, reverse=True)
        return log_weights

    def tune(
        self,
        key: Array,
        num_particles: int,
        start: JaxStart,
        temperatures: Array,
        num_sweeps: int,
        arrays: tuple[Array, ...],
    ) -> Array:
        """Step sizes per temperature and unit, by so many sweeps of a throw-away run."""
        first, key = jax.random.split(key)
        state = self._draw(first, num_particles, start, arrays)
        size = _FIRST_STEP_SIZE * state.position.shape[-1] ** -0.25

        def step(carry: tuple[Array, Array], xs: tuple[Array, Array]) -> Any:
            state, step_size = carry
            keys, temperature = xs
            for i in range(num_sweeps):
                state, accepted = self._move(keys[i], state, temperature, step_size, start, arrays)
                step_size = step_size * jnp.exp(accepted.mean(0) - _TARGET_ACCEPTANCE)
            return (state, step_size), step_size

        keys = jax.random.split(key, (len(temperatures) - 1, num_sweeps))
        carry = state, jnp.full_like(state.log_joint[0], size)
        _, step_sizes = jax.lax.scan(step, carry, (keys, temperatures[1:]))
        return step_sizes

    def _draw(
        self, key: Array, num_particles: int, start: JaxStart, arrays: tuple[Array, ...]
    ) -> _State:
        noise, choice, other = jax.random.split(key, 3)
        shape = (num_particles, *start.mean.shape)
        position = jax.random.normal(noise, shape)
        if self.whitened:
            chosen = jax.random.uniform(choice, shape[:2]) < start.prior_share
            prior = jax.random.normal(other, shape)
            solve = partial(jax.scipy.linalg.solve_triangular, lower=True)
            centred = (prior - start.mean).transpose(1, 2, 0)
            whitened = jax.vmap(solve)(start.scale_tril, centred).transpose(2, 0, 1)
            position = jnp.where(chosen[..., None], whitened, position)
        return self._at(position, start, arrays)

    def _ends(self, position: Array, start: JaxStart, arrays: tuple[Array, ...]) -> Any:
        """Log f_0 and log p(v, h) at e."""
        dim = position.shape[-1]
        constant = -0.5 * dim * _LOG_2PI
        if not self.whitened:
            log_prior = constant - 0.5 * jnp.square(position).sum(-1)
            return log_prior, self.log_joint(position, *arrays)
        latents = start.mean + jnp.einsum("uij,puj->pui", start.scale_tril, position)
        diagonal = jnp.diagonal(start.scale_tril, axis1=-2, axis2=-1)
        gaussian = constant - 0.5 * jnp.square(position).sum(-1) - jnp.log(diagonal).sum(-1)
        log_prior = constant - 0.5 * jnp.square(latents).sum(-1)
        log_start = jnp.logaddexp(
            gaussian + jnp.log1p(-start.prior_share), log_prior + jnp.log(start.prior_share)
        )
        return log_start, self.log_joint(latents, *arrays)

    def _at(self, position: Array, start: JaxStart, arrays: tuple[Array, ...]) -> _State:
        (log_start, log_joint), pull = jax.vjp(lambda e: self._ends(e, start, arrays), position)
        ones, zeros = jnp.ones_like(log_start), jnp.zeros_like(log_start)
        (start_gradient,), (joint_gradient,) = pull((ones, zeros)), pull((zeros, ones))
        return _State(position, log_start, log_joint, start_gradient, joint_gradient)

    def _move(
        self,
        key: Array,
        state: _State,
        temperature: Array,
        step_size: Array,
        start: JaxStart,
        arrays: tuple[Array, ...],
    ) -> tuple[_State, Array]:
        """One Hamiltonian transition that leaves f_β invariant, and acceptance probabilities."""

        def energy(at: _State, momentum: Array) -> Array:
            log_density = (1 - temperature) * at.log_start + temperature * at.log_joint
            return log_density - 0.5 * jnp.square(momentum).sum(-1)

        def force(at: _State) -> Array:
            share = temperature[:, None]
            return (1 - share) * at.start_gradient + share * at.joint_gradient

        def gradient(position: Array) -> Array:
            (log_start, _), pull = jax.vjp(lambda e: self._ends(e, start, arrays), position)
            share = jnp.broadcast_to(temperature, log_start.shape)
            return pull((1 - share, share))[0]

        for_momentum, for_test, for_size = jax.random.split(key, 3)
        factor = jax.random.uniform(for_size, step_size.shape, minval=-1.0, maxval=1.0)
        step = (step_size * (1 + self.jitter * factor))[:, None]
        first = jax.random.normal(for_momentum, state.position.shape)
        momentum = first + 0.5 * step * force(state)
        position = state.position + step * momentum
        for _ in range(self.num_leapfrog - 1):
            momentum = momentum + step * gradient(position)
            position = position + step * momentum
        proposed = self._at(position, start, arrays)
        momentum = momentum + 0.5 * step * force(proposed)
        change = jnp.nan_to_num(energy(proposed, momentum) - energy(state, first), nan=-jnp.inf)
        acceptance = jnp.exp(jnp.minimum(change, 0.0))
        accepted = jax.random.uniform(for_test, acceptance.shape) < acceptance

        def choose(new: Array, old: Array) -> Array:
            return jnp.where(accepted if new.ndim == 2 else accepted[..., None], new, old)

        return _State(*map(choose, proposed, state)), acceptance
