"""Running a model or guide for many particles at once, on the unconstrained scale."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to

from pyro_vharm.errors import InputError
from pyro_vharm.model.data import Batch
from pyro_vharm.model.units import UnitLayout

__all__ = [
    "FixedSites",
    "UnconstrainedSites",
    "is_masked",
    "is_point_mass",
    "latent_sites",
    "observed_sites",
    "site_log_prob",
    "trace_particles",
    "trace_plain",
    "unconstrained_shape",
]

type Site = dict[str, Any]
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
            value = transform(self.given[name])
            self._record(name, transform, self.given[name], value)
            msg["value"], msg["done"] = value, True

    def _pyro_post_sample(self, msg: Site) -> None:
        name = msg["name"]
        if name in self.names and name not in self.given:
            transform = biject_to(msg["fn"].support)
            self._record(name, transform, transform.inv(msg["value"]), msg["value"])

    def _record(self, name: str, transform: Any, unconstrained: Tensor, value: Tensor) -> None:
        self.values[name] = unconstrained
        self.log_abs_det[name] = transform.log_abs_det_jacobian(unconstrained, value)


class FixedSites(Messenger):  # type: ignore[misc]
    """Give latent sites fixed values; they stay latent."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Site) -> None:
        value = self.values.get(msg["name"])
        if value is not None:
            msg["value"], msg["done"] = value, True


def trace_plain(function: PyroFunction, batch: Batch, *messengers: Messenger) -> Trace:
    """Trace one call as the user would run it: one particle, no plate of particles."""
    return _trace(function, batch, messengers, nullcontext())


def trace_particles(
    function: PyroFunction,
    batch: Batch,
    layout: UnitLayout,
    num_particles: int,
    *messengers: Messenger,
) -> Trace:
    """Trace one call under an outermost plate of particles, without validation."""
    plate = pyro.plate("_particles", num_particles, dim=layout.particle_dim)
    return _trace(function, batch, messengers, plate)


def _trace(
    function: PyroFunction,
    batch: Batch,
    messengers: Sequence[Messenger],
    innermost: AbstractContextManager[Any],
) -> Trace:
    tracer = poutine.trace()
    with (
        pyro.validation_enabled(False),
        poutine.block(hide_types=["sample"]),
        tracer,
        ExitStack() as stack,
    ):
        for messenger in messengers:
            stack.enter_context(messenger)
        with innermost:
            function(*batch.args, **batch.kwargs)
    return tracer.trace


def site_log_prob(site: Site) -> Tensor:
    """The site's log density: masked, without the scale of subsampling or ``poutine.scale``."""
    log_prob: Tensor = site["fn"].log_prob(site["value"])
    masked: Tensor = scale_and_mask(log_prob, 1.0, site["mask"])
    return masked


def latent_sites(trace: Trace) -> list[Site]:
    """Sample sites without an observation, in the order they were met."""
    return [site for site in _sample_sites(trace) if not site["is_observed"]]


def observed_sites(trace: Trace) -> list[Site]:
    """Observed sites and factors, without deterministic ones."""
    return [
        site
        for site in _sample_sites(trace)
        if site["is_observed"] and not site["infer"].get("_deterministic", False)
    ]


def _sample_sites(trace: Trace) -> list[Site]:
    return [
        site
        for site in trace.nodes.values()
        if site["type"] == "sample" and not isinstance(site["fn"], _Subsample)
    ]


def is_point_mass(site: Site) -> bool:
    """Whether the site's distribution is a Delta, perhaps wrapped."""
    return _wraps(site["fn"], dist.Delta)


def is_masked(site: Site) -> bool:
    """Whether the site's distribution itself carries a mask."""
    return _wraps(site["fn"], dist.MaskedDistribution)


def _wraps(fn: Any, kind: type) -> bool:
    while not isinstance(fn, kind) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, kind)


def unconstrained_shape(site: Site) -> tuple[int, ...]:
    """Event shape of the site's value on the unconstrained scale.

    Raises:
        InputError: if torch has no bijection onto the support.
    """
    fn = site["fn"]
    try:
        transform = biject_to(fn.support)
    except NotImplementedError as error:
        raise InputError(
            f"the latent {site['name']!r} has the support {fn.support} of {type(fn).__name__}, to "
            "which torch knows no bijection; reparameterise it, or use a distribution over a "
            "standard support"
        ) from error
    shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)
    return tuple(shape[len(fn.batch_shape) :])
