"""Three ways to run one function of one particle for many: a plate, ``vmap``, a Python loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

__all__ = ["Run", "Vectorisation", "by_loop", "by_plate", "by_vmap"]

type Run = Callable[[Any, int | None], Any]
type Vectorisation = Callable[[Run, Any, int], Any]


def by_plate(run: Run, inputs: Any, num_particles: int) -> Any:
    """Run once for all particles, under an outermost plate: every operation must broadcast.

    Args:
        run: takes inputs and the number of particles, ``None`` for one without a plate; returns
            nested dicts and tuples of tensors.
        inputs: nested dicts and tuples of tensors with the particles as first dim.
        num_particles: how many.
    """
    return run(inputs, num_particles)


def by_vmap(run: Run, inputs: Any, num_particles: int) -> Any:
    """Run for one particle, vectorised by `torch.vmap`: for models that reshape or convolve."""

    def one(inputs: Any, _particle: torch.Tensor) -> Any:
        return run(inputs, None)

    particles = torch.arange(num_particles)
    return torch.vmap(one, randomness="different")(inputs, particles)


def by_loop(run: Run, inputs: Any, num_particles: int) -> Any:
    """Run particle by particle, as the user would: slow, and right by itself."""
    leaves, spec = pytree.tree_flatten(inputs)
    runs = []
    for i in range(num_particles):
        particle = pytree.tree_unflatten([leaf[i] for leaf in leaves], spec)
        runs.append(run(particle, None))
    flat = [pytree.tree_flatten(result) for result in runs]
    stacked = [torch.stack(parts) for parts in zip(*(leaves for leaves, _ in flat), strict=True)]
    return pytree.tree_unflatten(stacked, flat[0][1])
