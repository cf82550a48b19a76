"""Data simulated from the model itself, with the latents that made them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vharm.errors import InputError
from pyro_vharm.model.data import Batch, Data, as_batches
from pyro_vharm.model.declared import DeclaredModel
from pyro_vharm.model.inspection import run_plainly
from pyro_vharm.model.sites import (
    Site,
    is_improper,
    latent_sites,
    observed_sites,
    own_log_prob,
    sample_sites,
)
from pyro_vharm.model.state import untouched
from pyro_vharm.model.tracing import FixedSites, PyroFunction, trace_call
from pyro_vharm.model.units import site_scale

__all__ = ["Simulation", "simulate", "simulate_batch"]

type Rebuild = Callable[..., tuple[Any, ...] | Mapping[str, Any]]


@dataclass(frozen=True)
class Simulation:
    """One draw of latents and data from p(v, h; θ).

    Attributes:
        data: the call's arguments with the simulated values in place of the observed ones, as
            model and guide take them: a tuple, or a Mapping where keywords were given.
        observed: the simulated values by site.
        latents: the latents that made them, by site, on their supports: an exact draw from the
            posterior of the simulated data.
    """

    data: tuple[Any, ...] | Mapping[str, Any]
    observed: Mapping[str, Tensor]
    latents: Mapping[str, Tensor]


def simulate(
    model: PyroFunction, data: Data, *, rebuild: Rebuild | None = None, seed: int = 0
) -> Simulation:
    """Draw latents and data from the model at its present parameters.

    Observed sites are matched to the call's arguments by tensor identity, so that the guide, which
    takes the same arguments, sees the simulated values too.

    Args:
        model: a Pyro model.
        data: one call's arguments, as a tuple or a Mapping: they say how many units to draw.
        rebuild: where a site observes something computed from an argument, a callable that takes
            the simulated values by site, then the original arguments, and returns the new ones.
        seed: of the random numbers.

    Raises:
        InputError: if the model cannot simulate its data: it has factors, is scaled, observes
            what cannot be drawn, or observes what is no argument and `rebuild` is missing.

    >>> import torch, pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         h = pyro.sample("h", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(h, 0.1), obs=x)
    >>> drawn = simulate(model, (torch.zeros(1000),))
    >>> float((drawn.data[0] - drawn.latents["h"]).std()) < 0.12
    True
    """
    batches = as_batches(data)
    if len(batches) != 1:
        raise InputError(f"simulate takes one call's arguments, not {len(batches)} batches")
    with untouched(seed, model):
        return simulate_batch(model, batches[0], rebuild)[1]


def simulate_batch(
    model: PyroFunction, batch: Batch, rebuild: Rebuild | None = None
) -> tuple[Batch, Simulation]:
    """`simulate` for one batch, with the random numbers as they come."""
    for site in observed_sites(run_plainly(model, None, batch).model):
        _check_can_be_drawn(site)
    function, points = model, dict[str, Tensor]()
    if isinstance(model, DeclaredModel):  # what is declared a parameter stays where it is
        function, points = model.model, model.points(*batch.args, **batch.kwargs)
    try:
        trace = trace_call(poutine.uncondition(function), batch, FixedSites(points))
    except NotImplementedError as error:
        raise InputError(
            f"the model cannot simulate its data: a distribution has no draws ({error})"
        ) from error
    drawn = [site for site in sample_sites(trace) if site["infer"].get("was_observed", False)]
    drawn = [site for site in drawn if not site["infer"].get("_deterministic", False)]
    if not drawn:
        raise InputError("the model has no observed site, so there are no data to simulate")
    observed = {site["name"]: site["value"] for site in drawn}
    latents = {
        site["name"]: site["value"]
        for site in latent_sites(trace)
        if not site["infer"].get("was_observed", False) and site["name"] not in points
    }
    content = batch.args, dict(batch.kwargs)
    args, kwargs = (
        _replaced(content, drawn) if rebuild is None else _rebuilt(rebuild, batch, observed)
    )
    simulation = Simulation(kwargs if kwargs and not args else args, observed, latents)
    simulated = replace(batch, args=tuple(args), kwargs=kwargs)
    _check_same_densities(model, simulated, trace, latents)
    return simulated, simulation


def _check_same_densities(
    model: PyroFunction, simulated: Batch, drawn: Trace, latents: Mapping[str, Tensor]
) -> None:
    """Refuse a model that looks at its data elsewhere than where it observes them."""
    again = trace_call(model, simulated, FixedSites(latents))
    changed = [
        site["name"]
        for site in [*latent_sites(again), *observed_sites(again)]
        if not torch.allclose(
            own_log_prob(site), own_log_prob(drawn.nodes[site["name"]]), equal_nan=True
        )
    ]
    if changed:
        raise InputError(
            f"the densities of {changed} change with the data that are put into the call, so the "
            "model looks at its data elsewhere than where it observes them (a lag, a mean, a "
            "covariate): draw from it step by step yourself, or pass what it looks at as an "
            "argument of its own"
        )


def _check_can_be_drawn(site: Site) -> None:
    name, fn = site["name"], site["fn"]
    if isinstance(fn, Unit):
        reason = f"the factor {name!r} gives a density and no draws; write it as an observed site"
    elif site_scale(site) != 1.0:
        reason = (
            f"the site {name!r} is scaled by {site_scale(site):g}, so the model is no density of "
            "these data; take the scale off, or pass all the data"
        )
    elif is_improper(site):
        reason = f"the site {name!r} is improper; give it a distribution"
    else:
        return
    raise InputError(f"the model cannot simulate its data: {reason}")


def _replaced(content: Any, drawn: list[Site]) -> Any:
    """The arguments, with each that a site observes replaced by what the site drew."""
    original, spec = pytree.tree_flatten(content)
    leaves, taken = list(original), set[int]()
    for site in drawn:
        name, given, value = site["name"], site["infer"]["obs"], site["value"]
        places = {i for i, leaf in enumerate(original) if leaf is given}
        if not places or places & taken:
            reason = "is observed twice" if places else "is no argument of the call"
            raise InputError(
                f"what the site {name!r} observes {reason}, so the simulated values cannot be put "
                "into the guide's arguments; pass rebuild=, a callable that takes the simulated "
                "values by site and the original arguments, and returns the new ones"
            )
        if value.shape != given.shape:
            raise InputError(
                f"the site {name!r} draws values of shape {tuple(value.shape)} where the argument "
                f"has {tuple(given.shape)}; pass rebuild= to make one from the other"
            )
        taken |= places
        for i in places:
            leaves[i] = value.to(given.dtype)
    return pytree.tree_unflatten(leaves, spec)


def _rebuilt(rebuild: Rebuild, batch: Batch, observed: Mapping[str, Tensor]) -> Any:
    content = rebuild(observed, *batch.args, **batch.kwargs)
    if isinstance(content, Mapping):
        return (), dict(content)
    if isinstance(content, tuple):
        return content, {}
    raise InputError(f"rebuild must return a tuple or a Mapping of arguments, not {type(content)}")
