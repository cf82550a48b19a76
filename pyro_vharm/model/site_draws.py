"""Draws site by site, as a user sees them: for ArviZ, which takes each variable by its name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import infer_discrete
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.model.data import Batch
from pyro_vharm.model.inspection import run_plainly
from pyro_vharm.model.sites import (
    Site,
    is_discrete,
    latent_sites,
    observed_sites,
    own_log_prob,
    sample_sites,
    subsample_sites,
)
from pyro_vharm.model.tracing import (
    FixedSites,
    FreedSites,
    ParallelSites,
    PyroFunction,
    trace_call,
)

__all__ = ["NamedSite", "SiteDraws", "SiteReader", "read_sites"]


@dataclass(frozen=True)
class NamedSite:
    """One site of a model, with names for the dims of its value.

    Attributes:
        plates: of each batch dim: the plate's name, or ``None`` where no plate has it.
        batch_shape: sizes of the batch dims.
        event_dim: how many dims come after these.
        event_dims: names for event dims, from ``infer={"event_dims": [...]}``.
    """

    plates: tuple[str | None, ...]
    batch_shape: tuple[int, ...]
    event_dim: int
    event_dims: tuple[str, ...]

    @property
    def _kept(self) -> list[tuple[int, str | None]]:
        pairs = zip(self.batch_shape, self.plates, strict=True)
        return [(size, plate) for size, plate in pairs if size > 1 or plate]

    @property
    def dims(self) -> list[str | None]:
        """Names of the batch dims, without those of size one that belong to no plate."""
        return [plate for _, plate in self._kept]

    def over_dims(self, value: Tensor, event_shape: tuple[int, ...]) -> Tensor:
        """A value, or density, over these dims and then those of its events."""
        sizes = tuple(size for size, _ in self._kept)
        return value.detach().expand(self.batch_shape + event_shape).reshape(sizes + event_shape)

    def value(self, site: Site) -> Tensor:
        """The value at the site in some run."""
        value = site["value"]
        return self.over_dims(value, tuple(value.shape[value.dim() - self.event_dim :]))


@dataclass(frozen=True)
class SiteDraws:
    """Draws by site, each of shape ``(draw, *plates, *event)``.

    Attributes:
        latents: latents, and what the model names by `pyro.deterministic`.
        predictive: new observations given these.
        log_likelihood: log density of each observation given these, without event dims, in nats.
    """

    latents: dict[str, Tensor]
    predictive: dict[str, Tensor]
    log_likelihood: dict[str, Tensor]


@dataclass(frozen=True)
class SiteReader:
    """Runs a model at given values of its latents and keeps what each site gives.

    Attributes:
        model: the model.
        batch: what to call it with.
        sites: latents, deterministic and observed sites, by name.
        observed: observed sites with their values.
        deterministic: names of deterministic sites.
        discrete: discrete latents.
    """

    model: PyroFunction
    batch: Batch
    sites: Mapping[str, NamedSite]
    observed: Mapping[str, Tensor]
    deterministic: frozenset[str]
    discrete: frozenset[str]

    @property
    def latents(self) -> frozenset[str]:
        """Names of the latents."""
        return frozenset(self.sites) - self.observed.keys() - self.deterministic

    @property
    def unobserved(self) -> list[str]:
        """Names of latents, then of deterministic sites, in the order they were met."""
        return [name for name in self.sites if name not in self.observed]

    def at(self, draws: Iterable[Mapping[str, Tensor]]) -> SiteDraws:
        """What the model gives at each of some draws of its latents.

        Discrete latents that are not among them are drawn from their exact posterior given those.

        Raises:
            InputError: if a continuous latent is missing.
        """
        kept = _Kept()
        for values in draws:
            trace = trace_call(self.model, self.batch, FixedSites(self._complete(values)))
            kept.add("latents", self._values(trace, self.unobserved))
            kept.add("log_likelihood", self._log_likelihood(trace))
            given = {site["name"]: site["value"] for site in latent_sites(trace)}
            again = trace_call(self.model, self.batch, FixedSites(given), FreedSites(self.observed))
            kept.add("predictive", self._values(again, self.observed))
        return kept.stacked()

    def prior(self, num_draws: int) -> SiteDraws:
        """Draws from the prior, and observations given these."""
        kept = _Kept()
        for _ in range(num_draws):
            trace = trace_call(self.model, self.batch, FreedSites(self.observed))
            kept.add("latents", self._values(trace, self.unobserved))
            kept.add("predictive", self._values(trace, self.observed))
        return kept.stacked()

    def from_guide(self, guide: PyroFunction) -> dict[str, Tensor]:
        """One draw of the model's latents from a guide."""
        trace = trace_call(guide, self.batch)
        return {s["name"]: s["value"] for s in latent_sites(trace) if s["name"] in self.latents}

    def _complete(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        missing = self.latents - values.keys()
        if missing - self.discrete:
            raise InputError(
                f"draws must have every continuous latent of the model; they lack "
                f"{sorted(missing - self.discrete)}"
            )
        if not missing:
            return values

        def enumerated(*args: Any, **kwargs: Any) -> Any:
            with ParallelSites(missing):
                return poutine.condition(self.model, data=dict(values))(*args, **kwargs)

        nesting = max((len(site.batch_shape) for site in self.sites.values()), default=0)
        sampled = infer_discrete(enumerated, first_available_dim=-1 - nesting, temperature=1)
        trace = trace_call(sampled, self.batch)
        return {**values, **{name: trace.nodes[name]["value"] for name in missing}}

    def _values(self, trace: Trace, names: Collection[str]) -> dict[str, Tensor]:
        return {name: self.sites[name].value(trace.nodes[name]) for name in names}

    def _log_likelihood(self, trace: Trace) -> dict[str, Tensor]:
        return {
            name: self.sites[name].over_dims(own_log_prob(trace.nodes[name]), ())
            for name in self.observed
        }


class _Kept:
    """Values by group and site, one after the other."""

    def __init__(self) -> None:
        self.groups: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))

    def add(self, group: str, values: Mapping[str, Tensor]) -> None:
        """Take in one draw."""
        for name, value in values.items():
            self.groups[group][name].append(value)

    def stacked(self) -> SiteDraws:
        """All of them."""
        stacked = {
            group: {name: torch.stack(values) for name, values in sites.items()}
            for group, sites in self.groups.items()
        }
        groups = ("latents", "predictive", "log_likelihood")
        return SiteDraws(*(stacked.get(group, {}) for group in groups))


def read_sites(model: PyroFunction, guide: Callable[..., Any] | None, batch: Batch) -> SiteReader:
    """Run guide and model once, and read off the model's sites and the names of their dims.

    Raises:
        InputError: if one of them raises, or a plate subsamples.
    """
    trace = run_plainly(model, guide, batch).model
    subsampled = sorted(subsample_sites(trace))
    if subsampled:
        raise InputError(
            f"the plates {subsampled} pick elements at random, so that draws would be of other "
            "elements each time; leave subsample_size out, and pass all data in one call"
        )
    observed = [site for site in observed_sites(trace) if not isinstance(site["fn"], dist.Unit)]
    latents = latent_sites(trace)
    deterministic = [
        site for site in sample_sites(trace) if site["infer"].get("_deterministic", False)
    ]
    named = {site["name"]: _named(site) for site in (*latents, *deterministic, *observed)}
    return SiteReader(
        model,
        batch,
        named,
        {site["name"]: named[site["name"]].value(site) for site in observed},
        frozenset(site["name"] for site in deterministic),
        frozenset(site["name"] for site in latents if is_discrete(site)),
    )


def _named(site: Site) -> NamedSite:
    value, event_dim = site["value"], site["fn"].event_dim
    batch_shape = tuple(site["log_prob"].shape)
    if site["infer"].get("_deterministic", False) and event_dim >= value.dim():
        # `pyro.deterministic` calls all dims event dims, unless it is told how many there are
        batch_shape, event_dim = tuple(value.shape), 0
    frames = {f.dim: f for f in site["cond_indep_stack"] if f.vectorized}
    plates = []
    for axis, size in enumerate(batch_shape):
        frame = frames.get(axis - len(batch_shape))
        plates.append(frame.name if frame is not None and frame.size == size else None)
    names = tuple(site["infer"].get("event_dims", ()))
    return NamedSite(tuple(plates), batch_shape, event_dim, names)
