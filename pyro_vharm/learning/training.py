"""The training loop that every learner by gradient steps shares, and that can be resumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vharm.errors import InputError

__all__ = ["LoopKeeper", "Schedule", "minimise", "shuffled_passes"]

_MOST_BAD = 10


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


class LoopKeeper(Protocol):
    """Looks on while a loop runs, and can put one that was cut short back where it was."""

    def begin(self, loop: Sequence[Any]) -> int:
        """Restore what has a ``load_state_dict``, and say how many steps are done."""
        ...

    def step(self, done: int, value: float, loop: Sequence[Any]) -> None:
        """Called after each step, with the number of steps done and the loss."""
        ...


def minimise(
    loss: Callable[[int], Tensor],
    leaves: Sequence[Tensor],
    schedule: Schedule,
    *,
    description: str,
    progress: bool,
    keeper: LoopKeeper | None = None,
) -> None:
    """Minimise a stochastic loss over leaves, in place; their ``.grad`` is left as it was.

    Args:
        loss: step → a scalar with the right gradient.
        leaves: what to optimise.
        schedule: steps and step size.
        description: for the progress bar.
        progress: show the bar.
        keeper: told of every step; resumes a loop that was cut short.

    Raises:
        FloatingPointError: if the loss is not finite in ten steps in a row; a single one is
            skipped.
    """
    before = [leaf.grad for leaf in leaves]
    optimizer = torch.optim.Adam(leaves, lr=schedule.learning_rate)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, schedule.num_steps, eta_min=0.01 * schedule.learning_rate
    )
    loop, bad = (optimizer, rates), 0
    first = 0 if keeper is None else keeper.begin(loop)
    bar = tqdm(
        range(first, schedule.num_steps),
        desc=description,
        initial=first,
        total=schedule.num_steps,
        disable=not progress or None,
        delay=2,
        leave=False,
    )
    try:
        for step in bar:
            value = loss(step)
            usable = _descend(value, leaves, optimizer)
            rates.step()
            bad = 0 if usable else bad + 1
            if bad == _MOST_BAD:
                raise FloatingPointError(
                    f"{description}: no finite gradient in ten steps; try a smaller learning_rate "
                    f"than {schedule.learning_rate}"
                )
            if keeper is not None:
                keeper.step(step + 1, float(value.detach()), loop)
    finally:
        for leaf, gradient in zip(leaves, before, strict=True):
            leaf.grad = gradient


def _descend(value: Tensor, leaves: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> bool:
    """One step, if the gradient is finite; whether it is."""
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    usable = all(g is None or bool(torch.isfinite(g).all()) for g in gradients)
    for leaf, found in zip(leaves, gradients, strict=True):
        leaf.grad = found if usable else None
    optimizer.step()
    return usable


def shuffled_passes(num_batches: int, num_steps: int) -> list[int]:
    """Batch indices for each step: every pass over the data in a new random order."""
    passes = -(-num_steps // num_batches)
    order = torch.cat([torch.randperm(num_batches) for _ in range(passes)])
    return [int(index) for index in order[:num_steps]]
