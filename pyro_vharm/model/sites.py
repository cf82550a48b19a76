"""Reading one sample site of a trace: what kind it is, and its log density."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to

from pyro_vharm.errors import InputError

__all__ = [
    "Site",
    "fixed_sites",
    "is_discrete",
    "is_improper",
    "is_in_plate",
    "is_masked_in_part",
    "is_periodic",
    "is_point_mass",
    "latent_sites",
    "log_prob_at",
    "masked_where",
    "observed_sites",
    "own_log_prob",
    "sample_sites",
    "subsample_sites",
    "unconstrained_shape",
]

type Site = dict[str, Any]
type Mask = Tensor | bool | None


def sample_sites(trace: Trace) -> list[Site]:
    """Sample sites, without the indices of subsampled plates."""
    return [
        site
        for site in trace.nodes.values()
        if site["type"] == "sample" and not isinstance(site["fn"], _Subsample)
    ]


def latent_sites(trace: Trace) -> list[Site]:
    """Sample sites without an observation, in the order they were met."""
    return [site for site in sample_sites(trace) if not site["is_observed"]]


def observed_sites(trace: Trace) -> list[Site]:
    """Observed sites and factors, without deterministic ones."""
    return [
        site
        for site in sample_sites(trace)
        if site["is_observed"] and not site["infer"].get("_deterministic", False)
    ]


def subsample_sites(trace: Trace) -> dict[str, Site]:
    """The indices of plates that subsample at random, by plate; not those that the user gives."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and isinstance(site["fn"], _Subsample)
        and (site["fn"].subsample_size or site["fn"].size) < site["fn"].size
    }


def own_log_prob(site: Site) -> Tensor:
    """The site's log density under its own masks, without the scale of subsampling."""
    return _masked(site["fn"].log_prob(site["value"]), site["mask"])


def log_prob_at(site: Site, mask: Mask) -> Tensor:
    """The site's log density under another mask in place of its own ones."""
    return _masked(_split(site["fn"])[0].log_prob(site["value"]), mask)


def _masked(log_prob: Tensor, mask: Mask) -> Tensor:
    masked: Tensor = scale_and_mask(log_prob, 1.0, mask)
    return masked


def masked_where(site: Site) -> Mask:
    """The mask around a site and on its distribution, over batch dims; ``None`` without one."""
    own, around = _split(site["fn"])[1], site["mask"]
    if own is None or around is None:
        return around if own is None else own
    both: Mask = own & around
    return both


def is_masked_in_part(site: Site) -> bool:
    """Whether a mask on the distribution keeps some elements of an event and drops others."""
    return _splits_events(site["fn"])


def _split(fn: Any) -> tuple[Any, Mask]:
    """A distribution without the mask on it, and that mask over its batch dims."""
    if isinstance(fn, dist.MaskedDistribution):
        inner, mask = _split(fn.base_dist)
        return inner, fn._mask if mask is None else fn._mask & mask
    if isinstance(fn, torch.distributions.Independent):
        inner, mask = _split(fn.base_dist)
        if inner is fn.base_dist:
            return fn, None
        count = fn.reinterpreted_batch_ndims
        if isinstance(mask, Tensor):
            mask = mask.expand(inner.batch_shape).flatten(-count)[..., 0]
        return dist.Independent(inner, count), mask
    return fn, None


def _splits_events(fn: Any) -> bool:
    if isinstance(fn, dist.MaskedDistribution):
        return _splits_events(fn.base_dist)
    if not isinstance(fn, torch.distributions.Independent):
        return False
    inner, mask = _split(fn.base_dist)
    if not isinstance(mask, Tensor):
        return _splits_events(fn.base_dist)
    whole = mask.expand(inner.batch_shape).flatten(-fn.reinterpreted_batch_ndims)
    return bool((whole.any(-1) != whole.all(-1)).any())


def is_in_plate(site: Site, plate: str | None) -> bool:
    """Whether the site stands inside a plate."""
    return any(frame.name == plate for frame in site["cond_indep_stack"])


def is_discrete(site: Site) -> bool:
    """Whether the site's support is a discrete set."""
    try:
        return bool(site["fn"].support.is_discrete)
    except NotImplementedError:  # a flow from outside Pyro states no support
        return False


def is_point_mass(site: Site) -> bool:
    """Whether the site's distribution is a Delta, perhaps wrapped."""
    return _wraps(site["fn"], dist.Delta)


def is_improper(site: Site) -> bool:
    """Whether the site's distribution has no total mass of one."""
    return _wraps(site["fn"], dist.ImproperUniform)


def is_periodic(site: Site) -> bool:
    """Whether the site's density repeats itself, so that it has no total mass of one."""
    return _wraps(site["fn"], (dist.VonMises, dist.SineBivariateVonMises))


def _wraps(fn: Any, kind: type | tuple[type, ...]) -> bool:
    while not isinstance(fn, kind) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, kind)


def fixed_sites(first: Trace, second: Trace) -> list[str]:
    """Continuous latent sites of a guide that are the same point in two runs."""
    return [
        site["name"]
        for site in latent_sites(first)
        if is_point_mass(site)
        and site["value"].is_floating_point()
        and torch.equal(site["value"], second.nodes[site["name"]]["value"])
    ]


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
