"""Parameters at a boundary of what they may be: which they are, and values away from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vharm.model.parameters import Parameters

__all__ = ["inside_boundary", "parameters_at_boundaries"]

_NEAR = 0.01  # of a probability to its boundary
_NEGLIGIBLE = 1e-3  # of a positive element beside the others of its tensor


def parameters_at_boundaries(parameters: Parameters) -> tuple[str, ...]:
    """Names of those with an element at a boundary of its constraint.

    A probability within a hundredth of 0 or 1, or a positive element that is next to nothing
    beside the others of its tensor. Of a single positive number it cannot be told so.
    """
    found = []
    for name, value in parameters.constrained().items():
        moved = inside_boundary(parameters.constraints[name], value)
        if moved is not None and not torch.equal(moved, value):
            found.append(name)
    return tuple(found)


def inside_boundary(constraint: Any, value: Tensor) -> Tensor | None:
    """A value away from the boundary, the same value if it is not near; ``None`` without one.

    Probabilities go halfway to even, positive elements that are next to nothing beside the others
    of their tensor to the median of those.
    """
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    if isinstance(constraint, type(constraints.simplex)):
        return _halfway(value, torch.full_like(value, 1 / value.shape[-1]))
    if isinstance(constraint, type(constraints.unit_interval)):
        low, high = (torch.as_tensor(x) for x in (constraint.lower_bound, constraint.upper_bound))
        share = (value - low) / (high - low)
        return low + (high - low) * _halfway(share, torch.full_like(share, 0.5))
    if isinstance(constraint, type(constraints.positive)) and value.numel() > 1:
        above = value - torch.as_tensor(constraint.lower_bound)
        return value + torch.where(above < _NEGLIGIBLE * above.median(), above.median(), 0.0)
    return None


def _halfway(share: Tensor, even: Tensor) -> Tensor:
    near = bool((torch.minimum(share, 1 - share) < _NEAR).any())
    return (share + even) / 2 if near else share
