"""The training loop that every learner here shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vharm.errors import InputError

__all__ = ["Schedule", "minimise", "shuffled_passes"]


@dataclass(frozen=True)
class Schedule:
    """Adam with a step size that falls along a half cosine to a hundredth.

    Args:
        num_steps: gradient steps.
        learning_rate: the first step size.
    """

    num_steps: int
    learning_rate: float

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise InputError(f"num_steps must be at least 1, not {self.num_steps}")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must be positive, not {self.learning_rate}")


def minimise(
    loss: Callable[[int], Tensor],
    leaves: Sequence[Tensor],
    schedule: Schedule,
    *,
    description: str,
    progress: bool,
) -> None:
    """Minimise a stochastic loss over leaves, in place; their ``.grad`` is left as it was.

    Args:
        loss: step → a scalar with the right gradient.
        leaves: what to optimise.
        schedule: steps and step size.
        description: for the progress bar.
        progress: show the bar.

    Raises:
        FloatingPointError: if the loss is not finite in ten steps in a row; a single one is
            skipped.
    """
    before = [leaf.grad for leaf in leaves]
    optimizer = torch.optim.Adam(leaves, lr=schedule.learning_rate)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, schedule.num_steps, eta_min=0.01 * schedule.learning_rate
    )
    bad = 0
    try:
        for step in tqdm(
            range(schedule.num_steps),
            desc=description,
            disable=not progress or None,
            delay=2,
            leave=False,
        ):
            value = loss(step)
            gradients = torch.autograd.grad(value, leaves, allow_unused=True)
            usable = all(g is None or bool(torch.isfinite(g).all()) for g in gradients)
            bad = 0 if usable else bad + 1
            if bad == 10:
                raise FloatingPointError(
                    f"{description}: no finite gradient in ten steps; try a smaller learning_rate "
                    f"than {schedule.learning_rate}"
                )
            for leaf, found in zip(leaves, gradients, strict=True):
                leaf.grad = found if usable else None
            optimizer.step()
            rates.step()
    finally:
        for leaf, gradient in zip(leaves, before, strict=True):
            leaf.grad = gradient


def shuffled_passes(num_batches: int, num_steps: int) -> list[int]:
    """Batch indices for each step: every pass over the data in a new random order."""
    passes = -(-num_steps // num_batches)
    order = torch.cat([torch.randperm(num_batches) for _ in range(passes)])
    return [int(index) for index in order[:num_steps]]
