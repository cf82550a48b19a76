"""The user's optimiser begun afresh: the same settings, none of its state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.learning.training import Schedule

__all__ = ["GuardedSteps", "OwnOptimizer", "check_optimizer", "fresh_optimizer", "title_optimizer"]

type OwnOptimizer = PyroOptim | Callable[[list[Tensor]], torch.optim.Optimizer]

_MOST_BAD = 10


def check_optimizer(optimizer: OwnOptimizer | None) -> None:
    """Refuse what is no optimiser that can be begun afresh.

    Raises:
        InputError: saying what to pass.
    """
    if optimizer is None or isinstance(optimizer, PyroOptim):
        return
    bound = isinstance(optimizer, torch.optim.Optimizer)
    if bound or isinstance(optimizer, type) or not callable(optimizer):
        raise InputError(
            "optimizer must be one of pyro.optim, such as pyro.optim.Adam({'lr': 0.01}), or a "
            "callable from a list of leaves to a torch optimiser, such as "
            f"lambda leaves: torch.optim.Adam(leaves, lr=0.01), not {optimizer!r}"
        )


def title_optimizer(optimizer: OwnOptimizer | None, schedule: Schedule) -> str:
    """What it is, for tables."""
    if optimizer is None:
        return f"Adam, step size falling from {schedule.learning_rate:g}"
    if not isinstance(optimizer, PyroOptim):
        return getattr(optimizer, "__name__", type(optimizer).__name__)
    made: Any = optimizer.pt_optim_constructor
    settings = optimizer.pt_optim_args
    shown = f" {settings}" if isinstance(settings, dict) else ""
    return f"{getattr(made, '__name__', made)}{shown}"


def fresh_optimizer(optimizer: OwnOptimizer | None, schedule: Schedule) -> PyroOptim:
    """An optimiser with the settings of the user's, which has seen no parameter yet.

    Args:
        optimizer: the user's; ``None`` for Adam with a falling step size.
        schedule: of that Adam.
    """
    if optimizer is None:
        return _JointOptimizer(lambda leaves: torch.optim.Adam(leaves), schedule)
    if not isinstance(optimizer, PyroOptim):
        return _JointOptimizer(optimizer, None)
    again = copy.copy(optimizer)
    again.optim_objs, again.grad_clip = {}, {}
    again._state_waiting_to_be_consumed = {}
    return again


class _JointOptimizer(PyroOptim):  # type: ignore[misc]
    """One torch optimiser for all parameters that come at once."""

    def __init__(
        self,
        make: Callable[[list[Tensor]], torch.optim.Optimizer],
        schedule: Schedule | None,
    ) -> None:
        super().__init__(make, {})
        self.schedule = schedule
        self.made: list[tuple[torch.optim.Optimizer, Any]] = []
        self.known: set[int] = set()

    def __call__(self, params: Iterable[Tensor], *_: Any, **__: Any) -> None:
        new = [leaf for leaf in params if id(leaf) not in self.known]
        if new:
            self.known |= {id(leaf) for leaf in new}
            self.made.append(self._make(new))
        for optimizer, rates in self.made:
            optimizer.step()
            if rates is not None:
                rates.step()

    def _make(self, leaves: list[Tensor]) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = self.pt_optim_constructor(leaves)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise InputError(
                f"optimizer(leaves) must return a torch optimiser; it returned {optimizer!r}"
            )
        if self.schedule is None:
            return optimizer, None
        for group in optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, self.schedule.num_steps, eta_min=0.01 * self.schedule.learning_rate
        )
        return optimizer, rates


class GuardedSteps(PyroOptim):  # type: ignore[misc]
    """Steps an optimiser on parameters that are free, where their gradients are finite.

    Args:
        inner: the optimiser.
        frozen: parameters that stay as they are.
    """

    def __init__(self, inner: PyroOptim, frozen: Collection[Tensor] = ()) -> None:
        super().__init__(inner.pt_optim_constructor, {})
        self.inner = inner
        self.frozen = {id(leaf) for leaf in frozen}
        self.bad = 0

    def __call__(self, params: Iterable[Tensor], *_: Any, **__: Any) -> None:
        """Take a step.

        Raises:
            FloatingPointError: if no gradient is finite in ten steps in a row.
        """
        free = [p for p in params if p.grad is not None and id(p) not in self.frozen]
        if not all(bool(torch.isfinite(p.grad).all()) for p in free if p.grad is not None):
            self.bad += 1
            if self.bad == _MOST_BAD:
                raise FloatingPointError(
                    "training: no finite gradient in ten steps; try an optimizer with smaller steps"
                )
            return
        self.bad = 0
        name_of = pyro.get_param_store().param_name
        self.inner(sorted(free, key=lambda leaf: str(name_of(leaf))))

    def end_pass(self, loss: float) -> None:
        """All batches have been seen once more: time for a scheduler of Pyro to step."""
        if not isinstance(self.inner, PyroLRScheduler) or not self.inner.optim_objs:
            return
        plateau = self.inner.pt_scheduler_constructor is torch.optim.lr_scheduler.ReduceLROnPlateau
        self.inner.step(*([loss] if plateau else []))
