"""The guide's own family with its arguments freed for each unit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_vharm.model.data import Batch
from pyro_vharm.model.sites import is_point_mass, latent_sites
from pyro_vharm.model.tracing import PyroFunction, trace_call

__all__ = ["FreedGuide", "free_arguments"]

type Site = dict[str, Any]


_NARROW = 0.3
_REAL = (constraints.real, constraints.real_vector)
_SCALES = (constraints.positive, constraints.lower_cholesky)


@dataclass(frozen=True)
class _FreedArgument:
    """One argument of one distribution: value = transform(origin + step · leaf)."""

    origin: Tensor
    step: Tensor
    leaf: Tensor
    transform: Any
    constraint: Any

    def __call__(self) -> Tensor:
        value: Tensor = self.transform(self.origin + self.step * self.leaf)
        return value

    def narrowed(self) -> _FreedArgument:
        """A location elsewhere within about a standard deviation; a scale that is a third."""
        origin = self.origin
        if self.constraint in _REAL:
            origin = origin + self.step * torch.randn_like(origin)
        elif self.constraint in _SCALES:
            origin = self.transform.inv(_NARROW * self.transform(origin))
        return replace(self, origin=origin, leaf=torch.zeros_like(origin, requires_grad=True))


@dataclass(frozen=True)
class _FreedDistribution:
    """A distribution rebuilt from free arguments each time it is called."""

    arguments: Mapping[str, _FreedArgument]
    rebuild: Callable[[Mapping[str, Tensor]], Any]

    @property
    def leaves(self) -> list[Tensor]:
        return [argument.leaf for argument in self.arguments.values()]

    def build(self) -> Any:
        return self.rebuild({name: argument() for name, argument in self.arguments.items()})

    def narrowed(self) -> _FreedDistribution:
        arguments = {name: argument.narrowed() for name, argument in self.arguments.items()}
        return replace(self, arguments=arguments)


class _ReplacedDistributions(Messenger):  # type: ignore[misc]
    def __init__(self, freed: Mapping[str, _FreedDistribution]) -> None:
        super().__init__()
        self.freed = freed

    def _pyro_sample(self, msg: Site) -> None:
        freed = self.freed.get(msg["name"])
        if freed is not None:
            msg["fn"] = freed.build().expand(msg["fn"].batch_shape)


@dataclass(frozen=True)
class FreedGuide:
    """A guide whose distributions keep their form but have arguments of their own per unit.

    Call it as the guide itself. At first its arguments equal the guide's.

    Attributes:
        guide: the original guide.
        freed: its random sites' distributions.
    """

    guide: PyroFunction
    freed: Mapping[str, _FreedDistribution]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the guide with its distributions replaced."""
        with _ReplacedDistributions(self.freed):
            return self.guide(*args, **kwargs)

    def narrowed(self) -> FreedGuide:
        """The same from elsewhere: narrow, and moved at random by about a standard deviation."""
        return replace(self, freed={name: freed.narrowed() for name, freed in self.freed.items()})

    def leaves(self) -> list[Tensor]:
        """The free arguments, to be optimised; all start at 0."""
        return [leaf for freed in self.freed.values() for leaf in freed.leaves]


def free_arguments(guide: PyroFunction, batch: Batch) -> FreedGuide | None:
    """Free the arguments of each of the guide's distributions, element by element.

    Real-valued arguments move in steps of the distribution's standard deviation, so that one
    step size of an optimiser suits latents of any scale.

    Returns:
        the freed guide, or ``None`` where its family cannot be freed so: arguments that depend on
        other latents, or a distribution whose arguments cannot be read (a flow, a masked one).
    """
    first, second = (
        {
            site["name"]: site
            for site in latent_sites(_trace(guide, batch))
            if not is_point_mass(site)
        }
        for _ in range(2)
    )
    freed = {}
    for name, site in first.items():
        free = _free(site["fn"])
        if (
            free is None
            or name not in second
            or not _same_arguments(site["fn"], second[name]["fn"])
        ):
            return None
        freed[name] = free
    return FreedGuide(guide, freed)


def _trace(guide: PyroFunction, batch: Batch) -> Any:
    with torch.no_grad(), poutine.block():
        return trace_call(guide, batch)


def _free(fn: Any) -> _FreedDistribution | None:
    if isinstance(fn, torch.distributions.Independent):
        base = _free(fn.base_dist)
        if base is None:
            return None
        ndims = fn.reinterpreted_batch_ndims
        return _FreedDistribution(
            base.arguments, lambda values: dist.Independent(base.rebuild(values), ndims)
        )
    names = _argument_names(fn)
    if names is None:
        return None
    try:
        arguments = {name: _free_argument(fn, name) for name in names}
    except NotImplementedError:  # a constraint without a transform, as of a uniform's ends
        return None
    cls = type(fn)
    return _FreedDistribution(arguments, lambda values: cls(**values))


def _argument_names(fn: Any) -> list[str] | None:
    """The arguments that determine the distribution, or None where they cannot be told."""
    if isinstance(fn, torch.distributions.MultivariateNormal):
        return ["loc", "scale_tril"]
    known = getattr(fn, "arg_constraints", {})
    parameters = [
        name
        for name in inspect.signature(type(fn).__init__).parameters
        if name not in ("self", "validate_args")
    ]
    if not known or any(name not in known for name in parameters):
        return None
    return parameters


def _free_argument(fn: Any, name: str) -> _FreedArgument:
    value = getattr(fn, name).detach()
    constraint = fn.arg_constraints[name]
    transform = transform_to(constraint)
    origin = transform.inv(value).clone()
    step = torch.ones_like(origin)
    if constraint in _REAL:
        step = _standard_deviation(fn, origin)
    return _FreedArgument(
        origin, step, torch.zeros_like(origin, requires_grad=True), transform, constraint
    )


def _standard_deviation(fn: Any, like: Tensor) -> Tensor:
    base = getattr(fn, "base_dist", fn)  # a log-normal's location lives on the scale of its base
    try:
        deviation: Tensor = base.stddev.detach()
    except NotImplementedError:
        return torch.ones_like(like)
    usable = torch.isfinite(deviation) & (deviation > 0)
    return torch.where(usable, deviation, torch.ones_like(deviation)).expand_as(like)


def _same_arguments(first: Any, second: Any) -> bool:
    while isinstance(first, torch.distributions.Independent):
        first, second = first.base_dist, second.base_dist
    names = _argument_names(first) or []
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)
