"""Parameters as values: what a model or guide learns, named, captured, set and restored."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_vharm.errors import InputError
from pyro_vharm.model.data import Batch, Data, as_batches

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
        """The leaves that require a gradient, each once however many names it has."""
        return list(self.named_trainable().values())

    def named_trainable(self) -> dict[str, Tensor]:
        """The same by name, each under the first name that it has."""
        first = {id(leaf): name for name, leaf in reversed(list(self.leaves.items()))}
        return {
            name: leaf
            for name, leaf in self.leaves.items()
            if leaf.requires_grad and first[id(leaf)] == name
        }

    def select(self, names: Collection[str]) -> Parameters:
        """Some of the parameters."""
        return Parameters(
            {name: leaf for name, leaf in self.leaves.items() if name in names},
            {name: found for name, found in self.constraints.items() if name in names},
        )

    def joined(self, other: Parameters) -> Parameters:
        """These and others."""
        return Parameters(
            {**self.leaves, **other.leaves}, {**self.constraints, **other.constraints}
        )

    def change(self, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By how much the unconstrained values moved from earlier ones."""
        return {name: value - before[name] for name, value in self.values().items()}

    def gradient(self, value: Tensor) -> dict[str, Tensor]:
        """∇ of a scalar with respect to every unconstrained value, by name; 0 where it has none.

        Raises:
            InputError: if the scalar depends on no parameter that requires a gradient.
        """
        learned = {name: leaf for name, leaf in self.leaves.items() if leaf.requires_grad}
        if not value.requires_grad or not learned:
            raise InputError("the value depends on no parameter that requires a gradient")
        found = torch.autograd.grad(value, list(learned.values()), allow_unused=True)
        gradients = dict(zip(learned, found, strict=True))
        return {
            name: torch.zeros_like(leaf) if (g := gradients.get(name)) is None else g
            for name, leaf in self.leaves.items()
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Write the unconstrained values to a file of plain tensors, without code."""
        torch.save(self.values(), path)

    def load(self, path: str | PathLike[str]) -> None:
        """Set the parameters, in place, to values that `save` wrote; no code is unpickled.

        Raises:
            InputError: if names or shapes are not those of these parameters.
        """
        values = torch.load(path, map_location="cpu", weights_only=True)
        self._check_names(values, str(path))
        for name, leaf in self.leaves.items():
            if values[name].shape != leaf.shape:
                raise InputError(
                    f"{path} holds {name!r} with shape {tuple(values[name].shape)}, the parameter "
                    f"has {tuple(leaf.shape)}"
                )
        self.assign(values)

    def _check_names(self, values: Mapping[str, Any], where: str) -> None:
        missing, unknown = self.leaves.keys() - values.keys(), values.keys() - self.leaves.keys()
        if missing or unknown:
            raise InputError(
                f"{where} must name exactly the parameters {sorted(self.leaves)}; missing "
                f"{sorted(missing)}, unknown {sorted(unknown)}"
            )

    def unconstrain(self, values: Mapping[str, Any], argument: str) -> dict[str, Tensor]:
        """Turn user-facing values into unconstrained ones.

        Raises:
            InputError: if a name is missing or unknown, a shape differs, or a constraint fails.
        """
        self._check_names(values, argument)
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


def capture_parameters(function: Callable[..., Any], data: Data | Batch) -> Parameters:
    """Run a model or guide once and collect the parameters it reads, as SVI does.

    Args:
        function: a model or a guide.
        data: the arguments to run it with; of several batches, the first.

    Raises:
        InputError: if the data are not of a form that is understood.

    >>> import torch, pyro
    >>> def model(x):
    ...     pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
    >>> theta = capture_parameters(model, (torch.ones(3),))
    >>> float(theta.constrained()["scale"])
    2.0
    """
    batch = data if isinstance(data, Batch) else as_batches(data)[0]
    random_state = torch.random.fork_rng(devices=range(torch.cuda.device_count()))
    with random_state, poutine.block(), poutine.trace(param_only=True) as capture:
        function(*batch.args, **batch.kwargs)
    store = pyro.get_param_store()
    stored = store.get_state()["constraints"]
    for name in stored:  # `get_state` takes away what SVI looks for; reading puts it back
        store[name]
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
