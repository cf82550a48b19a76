"""Tracing one call of a model or guide, with sites substituted, recorded or enumerated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to

from pyro_vharm.model.data import Batch
from pyro_vharm.model.sites import Site

__all__ = [
    "CALL_FAILURES",
    "PARTICLES",
    "FixedSites",
    "FreedSites",
    "ParallelSites",
    "PyroFunction",
    "UnconstrainedSites",
    "trace_call",
]

# of a user's model or guide that is called in a way that it does not take
CALL_FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AssertionError,
    NotImplementedError,
)
PARTICLES = "_particles"  # the name of the plate of particles

type PyroFunction = Callable[..., Any]


class UnconstrainedSites(Messenger):  # type: ignore[misc]
    """Substitute unconstrained values at latent sites, or record them where the site was sampled.

    The transform is looked up from the support at run time, so supports that depend on parents
    work. Afterwards `values` holds every site's unconstrained value and `log_abs_det` the log
    |det dz/du| of its transform to the support, per batch element.

    Args:
        names: the latent sites.
        values: unconstrained values to substitute; sites that are not in it are recorded.
    """

    def __init__(self, names: Collection[str], values: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.names = names
        self.given = values or {}
        self.values: dict[str, Tensor] = {}
        self.log_abs_det: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Site) -> None:
        name = msg["name"]
        if name in self.given:
            transform = biject_to(msg["fn"].support)
            given = _over_batch(self.given[name], msg["fn"], transform)
            value = transform(given)
            self._record(name, transform, given, value)
            msg["value"], msg["done"] = value, True

    def _pyro_post_sample(self, msg: Site) -> None:
        name = msg["name"]
        if name in self.names and name not in self.given:
            transform = biject_to(msg["fn"].support)
            self._record(name, transform, transform.inv(msg["value"]), msg["value"])

    def _record(self, name: str, transform: Any, unconstrained: Tensor, value: Tensor) -> None:
        self.values[name] = unconstrained
        self.log_abs_det[name] = transform.log_abs_det_jacobian(unconstrained, value)


def _over_batch(given: Tensor, fn: Any, transform: Any) -> Tensor:
    """Expand over the distribution's batch dims: a support may depend on an enumerated parent."""
    event_dim = fn.event_dim + transform.domain.event_dim - transform.codomain.event_dim
    batch_shape = given.shape[: given.dim() - event_dim]
    full = torch.broadcast_shapes(batch_shape, fn.batch_shape)
    return given.expand(full + given.shape[given.dim() - event_dim :])


class FixedSites(Messenger):  # type: ignore[misc]
    """Give latent sites fixed values, plates that subsample fixed indices; they stay latent."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Site) -> None:
        value = self.values.get(msg["name"])
        if value is not None and not msg["is_observed"]:
            msg["value"], msg["done"] = value, True


class FreedSites(Messenger):  # type: ignore[misc]
    """Draw observed sites anew; deterministic ones and factors stay as they are."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self.names:
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


class ParallelSites(Messenger):  # type: ignore[misc]
    """Mark some latent sites for parallel enumeration, and no others."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Site) -> None:
        msg["infer"] = {k: v for k, v in msg["infer"].items() if k != "enumerate"}
        if msg["name"] in self.names:
            msg["infer"]["enumerate"] = "parallel"


class _Enumeration(EnumMessenger):  # type: ignore[misc]
    """Pyro's own, which looks at shapes in a way that `torch.vmap` forbids."""

    def _pyro_post_sample(self, msg: Site) -> None:
        value = msg["value"]
        if value is not None:
            msg["value"] = torch.empty(value.shape, device="meta")
        super()._pyro_post_sample(msg)
        msg["value"] = value


class _UnvalidatedSites(Messenger):  # type: ignore[misc]
    """Take validation off distributions that were made while it was on, as priors of modules are.

    A value at the edge of a support then has density 0 and raises nothing, and no control flow
    depends on values.
    """

    def _pyro_sample(self, msg: Site) -> None:
        msg["fn"] = _unvalidated(msg["fn"])


def _unvalidated(fn: Any) -> Any:
    if not getattr(fn, "_validate_args", False):
        return fn
    fn = copy.copy(fn)
    fn._validate_args = False
    for name in ("base_dist", "_component_distribution", "_mixture_distribution"):
        if name in fn.__dict__:
            fn.__dict__[name] = _unvalidated(fn.__dict__[name])
    return fn


def trace_call(
    function: PyroFunction,
    batch: Batch,
    *messengers: Messenger,
    particles: tuple[int, int] | None = None,
    summed: Collection[str] = (),
    first_free_dim: int | None = None,
) -> Trace:
    """Trace one call, without validation and without a message to what is outside.

    Args:
        function: a model or guide.
        batch: what to call it with; its subsampled indices are fixed.
        messengers: from the outermost to the innermost.
        particles: number and batch dim of an outermost plate of particles.
        summed: discrete sites to enumerate in parallel; others are sampled, however marked.
        first_free_dim: the first batch dim that is free for enumeration.
    """
    tracer = poutine.trace()
    with (
        pyro.validation_enabled(False),
        poutine.block(hide_types=["sample"]),
        tracer,
        ExitStack() as stack,
    ):
        if batch.subsample:
            stack.enter_context(FixedSites(batch.subsample))
        for messenger in messengers:
            stack.enter_context(messenger)
        if summed:  # inside of what fixes values, so that it keeps track of their dims
            stack.enter_context(_Enumeration(first_free_dim))
            stack.enter_context(ParallelSites(summed))
        stack.enter_context(_UnvalidatedSites())
        if particles is not None:
            stack.enter_context(pyro.plate(PARTICLES, particles[0], dim=particles[1]))
        function(*batch.args, **batch.kwargs)
    return tracer.trace
