"""A harmed model whose optima are known exactly: what is known of it, and how it is found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyro
import torch
from pyro import poutine
from scipy.optimize import minimize
from torch import Tensor
from torch.distributions import constraints, transform_to
from torch.distributions.constraints import Constraint

__all__ = [
    "HarmedModel",
    "Values",
    "generator",
    "highest",
    "maximise",
    "rand",
    "randn",
    "split_values",
    "tensor",
]

type Values = dict[str, Tensor]


@dataclass(frozen=True)
class HarmedModel:
    """A model, its guide and data, with θ̂ and θ*.

    Attributes:
        name: for tables.
        model: the Pyro model.
        guide: its guide.
        data: their arguments.
        log_evidence: ℓ(θ) in total, in nats, from parameters on the user-facing scale.
        learned: θ̂, where L is highest.
        guide_values: q̂ there.
        best: θ*.
        bound: L(θ̂, q̂) in total, in nats.
        bound_at: L in total from θ, and from q where its best is not in closed form.
    """

    name: str
    model: Callable[..., None]
    guide: Callable[..., None]
    data: tuple[Tensor, ...]
    log_evidence: Callable[[Mapping[str, Tensor]], Tensor] = field(repr=False)
    learned: Values = field(repr=False)
    guide_values: Values = field(repr=False)
    best: Values = field(repr=False)
    bound: float
    bound_at: Callable[[Values], Tensor] = field(repr=False)

    @property
    def harm(self) -> float:
        """ℓ(θ*) − ℓ(θ̂), in nats."""
        return self.lost_at(self.learned)

    @property
    def gap(self) -> float:
        """ℓ(θ̂) − L(θ̂, q̂), in nats."""
        return float(self.log_evidence(self.learned)) - self.bound

    def install(self) -> None:
        """Set Pyro's param store to θ̂ and q̂, and to nothing else."""
        pyro.clear_param_store()
        for function in (self.model, self.guide):
            poutine.trace(function).get_trace(*self.data)
        store = pyro.get_param_store()
        for name, value in (self.learned | self.guide_values).items():
            store[name] = value.clone()  # which the store would train in place

    def lost_at(self, values: Mapping[str, Tensor]) -> float:
        """ℓ(θ*) − ℓ(θ), in nats."""
        with torch.no_grad():
            return float(self.log_evidence(self.best) - self.log_evidence(values))


def maximise(
    function: Callable[[Values], Tensor],
    start: Values,
    constrained: Mapping[str, Constraint] | None = None,
) -> Values:
    """The maximum that scipy's L-BFGS finds over unconstrained values, from a start."""
    known = constrained or {}
    transforms = {name: transform_to(known.get(name, constraints.real)) for name in start}
    begun = {name: transforms[name].inv(value).double() for name, value in start.items()}

    def split(point: np.ndarray) -> tuple[Tensor, Values]:
        flat = torch.tensor(point, requires_grad=True)
        parts = flat.split([value.numel() for value in begun.values()])
        pairs = zip(begun.items(), parts, strict=True)
        return flat, {name: transforms[name](part.view_as(old)) for (name, old), part in pairs}

    def loss(point: np.ndarray) -> tuple[float, np.ndarray]:
        flat, values = split(point)
        value = -function(values)
        (gradient,) = torch.autograd.grad(value, flat)
        return float(value.detach()), gradient.numpy()

    first = torch.cat([value.reshape(-1) for value in begun.values()]).numpy()
    options = {"maxiter": 20_000, "maxfun": 50_000, "ftol": 1e-14, "gtol": 1e-7}
    found = minimize(loss, first, jac=True, method="L-BFGS-B", options=options)
    return {name: value.detach() for name, value in split(found.x)[1].items()}


def highest(
    function: Callable[[Values], Tensor],
    starts: Iterable[Values],
    constrained: Mapping[str, Constraint] | None = None,
) -> Values:
    """The highest of the maxima found from several starts."""
    found = [maximise(function, start, constrained) for start in starts]
    return max(found, key=lambda values: float(function(values)))


def generator(seed: int = 0) -> torch.Generator:
    """Random numbers of a model's data."""
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, generator: torch.Generator) -> Tensor:
    """Standard normal, in double precision whatever the default."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rand(*shape: int, generator: torch.Generator) -> Tensor:
    """Uniform, in double precision whatever the default."""
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def tensor(*values: float) -> Tensor:
    """A vector, or a scalar of one value, in double precision."""
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


def split_values(found: Values, best: Values) -> tuple[Values, Values]:
    """θ̂ and q̂ from one set of values, by the names in θ*."""
    learned = {name: value for name, value in found.items() if name in best}
    return learned, {name: value for name, value in found.items() if name not in best}
