"""Quasi-Newton descent over torch leaves by scipy, with what it leaves to gain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import OptimizeResult, minimize
from torch import Tensor

__all__ = ["Descent", "descend"]

_REFUSED = 1e10  # stands for a loss that cannot be had, so that a line search turns back
_RESTARTS = 3

type Losses = Callable[[], tuple[float, Sequence[Tensor | None]]]


class Descent(NamedTuple):
    """How a descent ended.

    Attributes:
        num_iterations: of L-BFGS.
        left: ½ gᵀ B g with B its inverse Hessian: what a Newton step would still gain, in nats.
    """

    num_iterations: int
    left: float


def descend(
    losses: Losses,
    leaves: Sequence[Tensor],
    *,
    tolerance: float,
    max_iterations: int,
    note: Callable[[float], None] | None = None,
) -> Descent:
    """Minimise a function of leaves, in place, by L-BFGS, begun anew while it leaves much to gain.

    Args:
        losses: the value and its gradients at the leaves as they are; raises `ArithmeticError`
            where the value cannot be had.
        leaves: what to optimise.
        tolerance: nats that may be left to gain.
        max_iterations: the budget.
        note: called with the value after each iteration.

    Raises:
        ArithmeticError: if the value cannot be had at the start.
    """
    best = _flat(leaves)
    scale = max(abs(losses()[0]), 1.0)

    def evaluate(point: np.ndarray) -> tuple[float, np.ndarray]:
        _assign(leaves, point)
        try:
            value, gradients = losses()
        except ArithmeticError:
            return _REFUSED, np.zeros_like(point)
        pairs = zip(leaves, gradients, strict=True)
        gradient = _joined([torch.zeros_like(x) if g is None else g for x, g in pairs])
        if not (np.isfinite(value) and np.isfinite(gradient).all()):
            return _REFUSED, np.zeros_like(point)
        return value, gradient

    def callback(intermediate_result: OptimizeResult) -> None:
        if note is not None:
            _assign(leaves, intermediate_result.x)
            note(float(intermediate_result.fun))

    done, left = 0, np.inf
    for _ in range(_RESTARTS):
        options = {"maxiter": max_iterations - done, "ftol": 1e-2 * tolerance / scale, "gtol": 0.0}
        found = minimize(
            evaluate, best, jac=True, method="L-BFGS-B", callback=callback, options=options
        )
        best, done = found.x, done + int(found.nit)
        left = 0.5 * float(found.jac @ (found.hess_inv @ found.jac))
        if left <= tolerance or done >= max_iterations:
            break
    _assign(leaves, best)
    return Descent(done, left)


def _flat(leaves: Sequence[Tensor]) -> np.ndarray:
    return _joined([leaf.detach() for leaf in leaves])


def _joined(parts: Sequence[Tensor]) -> np.ndarray:
    whole: np.ndarray = torch.cat([part.reshape(-1).double().cpu() for part in parts]).numpy()
    return whole


def _assign(leaves: Sequence[Tensor], point: np.ndarray) -> None:
    parts = torch.from_numpy(point).split([leaf.numel() for leaf in leaves])
    with torch.no_grad():
        for leaf, part in zip(leaves, parts, strict=True):
            leaf.copy_(part.reshape(leaf.shape))
