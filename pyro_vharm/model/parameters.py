"""Parameters as values: what a model or guide learns, named, captured, set and restored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_vharm.errors import InputError
from pyro_vharm.model.data import Batch

__all__ = ["Parameters", "capture_parameters", "check_disjoint"]


@dataclass(frozen=True)
class Parameters:
    """A live handle on the learnable parameters that a callable reads.

    Attributes:
        leaves: name → the unconstrained leaf tensor itself, as an optimiser sees it.
        constraints: name → the constraint of the user-facing value.
    """

    leaves: Mapping[str, Tensor]
    constraints: Mapping[str, Any]

    def values(self) -> dict[str, Tensor]:
        """Detached copies of the unconstrained values."""
        return {name: leaf.detach().clone() for name, leaf in self.leaves.items()}

    def constrained(self) -> dict[str, Tensor]:
        """Detached copies of the user-facing values."""
        return {
            name: transform_to(self.constraints[name])(value)
            for name, value in self.values().items()
        }

    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Copy unconstrained values into the leaves, in place."""
        with torch.no_grad():
            for name, value in values.items():
                self.leaves[name].copy_(value)

    @contextmanager
    def at(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Hold the parameters at unconstrained values; afterwards they are as before."""
        before = self.values()
        try:
            self.assign(values)
            yield
        finally:
            self.assign(before)

    def trainable(self) -> list[Tensor]:
        """The leaves that require a gradient."""
        return [leaf for leaf in self.leaves.values() if leaf.requires_grad]

    def unconstrain(self, values: Mapping[str, Any], argument: str) -> dict[str, Tensor]:
        """Turn user-facing values into unconstrained ones.

        Raises:
            InputError: if a name is missing or unknown, a shape differs, or a constraint fails.
        """
        missing, unknown = self.leaves.keys() - values.keys(), values.keys() - self.leaves.keys()
        if missing or unknown:
            raise InputError(
                f"{argument} must name exactly the model's parameters {sorted(self.leaves)}; "
                f"missing {sorted(missing)}, unknown {sorted(unknown)}"
            )
        return {name: self._unconstrain_one(name, values[name], argument) for name in self.leaves}

    def _unconstrain_one(self, name: str, value: Any, argument: str) -> Tensor:
        leaf, constraint = self.leaves[name], self.constraints[name]
        value = torch.as_tensor(value, dtype=leaf.dtype, device=leaf.device)
        if not bool(constraint.check(value).all()):
            raise InputError(f"{argument}[{name!r}] = {value} breaks the constraint {constraint}")
        unconstrained: Tensor = transform_to(constraint).inv(value)
        if unconstrained.shape != leaf.shape:
            raise InputError(
                f"{argument}[{name!r}] has unconstrained shape {tuple(unconstrained.shape)}, "
                f"the model's parameter has {tuple(leaf.shape)}"
            )
        return unconstrained


def capture_parameters(function: Callable[..., Any], batch: Batch) -> Parameters:
    """Run a model or guide once and collect the parameters it reads, as SVI does.

    Args:
        function: a model (replayed against a guide trace, if it needs one) or a guide.
        batch: the arguments to run it with.
    """
    with poutine.block(), poutine.trace(param_only=True) as capture:
        function(*batch.args, **batch.kwargs)
    stored = pyro.get_param_store().get_state()["constraints"]
    leaves, found = {}, {}
    for name, site in capture.trace.nodes.items():
        if site["type"] != "param":
            continue
        value = site["value"]
        leaves[name] = value.unconstrained() if hasattr(value, "unconstrained") else value
        found[name] = stored.get(name, constraints.real)
    return Parameters(leaves, found)


def check_disjoint(model: Parameters, guide: Parameters) -> None:
    """Refuse a parameter that model and guide share: ∇_θ and ∇_φ could not be told apart.

    Raises:
        InputError: naming the shared parameters.
    """
    guide_leaves = {id(leaf): name for name, leaf in guide.leaves.items()}
    shared = [name for name, leaf in model.leaves.items() if id(leaf) in guide_leaves]
    if shared:
        raise InputError(
            f"the guide shares the parameters {shared} with the model; give the guide its own "
            "(under other names), so that learning the model and fitting the guide are two things"
        )
