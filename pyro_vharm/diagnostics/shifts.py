"""By how much each parameter would move, in its own units and in standard errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_vharm.model.parameters import Parameters

__all__ = ["Shift", "labels", "parameter_shifts"]


class Shift(NamedTuple):
    """The predicted change of one element of a parameter, on the user-facing scale.

    Attributes:
        label: like ``scale`` or ``loadings[2, 0]``.
        value: the learned value.
        shift: predicted change, to first order.
        mc_error: its standard error from our random numbers.
        standard_error: the statistical one of the parameter, from the information; 0 where the
            information says nothing.
    """

    label: str
    value: float
    shift: float
    mc_error: float
    standard_error: float

    @property
    def in_standard_errors(self) -> float:
        """The shift over the parameter's standard error."""
        return self.shift / self.standard_error if self.standard_error else float("nan")


def parameter_shifts(
    parameters: Parameters, step: Tensor, step_noise: Tensor, covariance: Tensor
) -> tuple[Shift, ...]:
    """Shifts of every element from a step in unconstrained coordinates, to first order.

    Args:
        parameters: θ.
        step: over the elements of all trainable leaves in order, shape ``(element,)``.
        step_noise: its covariance from our random numbers, ``(element, element)``.
        covariance: the inverse of the information.
    """
    found: list[Shift] = []
    start = 0
    for name, leaf in parameters.named_trainable().items():
        part = slice(start, start + leaf.numel())
        start += leaf.numel()
        value, jacobian = _linearised(transform_to(parameters.constraints[name]), leaf)
        columns = (
            value.reshape(-1),
            jacobian @ step[part],
            _deviations(jacobian, step_noise[part, part]),
            _deviations(jacobian, covariance[part, part]),
        )
        rows = zip(*(column.tolist() for column in columns), strict=True)
        pairs = zip(labels(name, value.shape), rows, strict=True)
        found += [Shift(label, *row) for label, row in pairs]
    return tuple(found)


def _linearised(transform: Callable[[Tensor], Tensor], leaf: Tensor) -> tuple[Tensor, Tensor]:
    """The user-facing value and its Jacobian, shape ``(user-facing, unconstrained)``."""
    at = leaf.detach().double()
    value: Tensor = transform(at)
    jacobian: Tensor = torch.autograd.functional.jacobian(transform, at)
    return value, jacobian.reshape(value.numel(), at.numel())


def _deviations(jacobian: Tensor, covariance: Tensor) -> Tensor:
    return (jacobian @ covariance * jacobian).sum(1).clamp(min=0).sqrt()


def labels(name: str, shape: torch.Size) -> list[str]:
    """Of every element of a tensor, like ``loadings[2, 0]``."""
    if not shape.numel() - 1:
        return [name]
    indices = torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, len(shape)).tolist()
    return [f"{name}[{', '.join(map(str, index))}]" for index in indices]
