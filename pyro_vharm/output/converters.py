"""Draws of a guide or of Markov chains as DataTrees, as ArviZ's converters give them."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import arviz_base as azb
import numpy as np
import pyro
import torch
import xarray as xr
from pyro.infer import MCMC
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vharm.errors import InputError
from pyro_vharm.model.data import Batch, Data, as_batches
from pyro_vharm.model.site_draws import SiteDraws, SiteReader, read_sites
from pyro_vharm.model.state import untouched
from pyro_vharm.model.tracing import PyroFunction

__all__ = ["from_mcmc", "from_svi"]

_GROUPS = (
    "posterior",
    "posterior_predictive",
    "log_likelihood",
    "prior",
    "prior_predictive",
)


def from_svi(
    model: PyroFunction,
    guide: PyroFunction,
    data: Data,
    *,
    num_draws: int = 1000,
    groups: Collection[str] = _GROUPS,
    constant_data: Mapping[str, Any] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    extra_event_dims: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> xr.DataTree:
    """A model and its trained guide as a DataTree, for ArviZ.

    Groups: ``posterior`` (draws of the guide, with what `pyro.deterministic` names; discrete
    latents without a guide site from their exact posterior given the others),
    ``posterior_predictive``, ``log_likelihood`` (of each observation given all latents, in nats),
    ``prior``, ``prior_predictive``, ``observed_data`` and ``constant_data``. The draws are one
    chain, so that ArviZ's functions work without further arguments; they are independent, and say
    nothing about whether the guide is right.

    Dims are named by plates; event dims as in ArviZ's other converters, by
    ``infer={"event_dims": [...]}`` at a site, or `extra_event_dims`. Batch dims that belong to no
    plate and have size one are left out. A slash in a name, which a DataTree cannot have, becomes a
    dot.

    Args:
        model: a Pyro model.
        guide: its trained guide.
        data: positional arguments as a tuple, or keyword arguments as a Mapping.
        num_draws: draws in each group.
        groups: which groups of draws to make.
        constant_data: what the model was given and is no observation, by name.
        coords: dim → coordinate values.
        dims: variable → names of all of its dims after chain and draw, in place of those found.
        extra_event_dims: variable → names of its event dims.
        seed: of all random numbers used.
        progress: show a bar.

    Raises:
        InputError: if model and guide do not run on the data, a plate subsamples, there are
            several batches, or a group is unknown.

    >>> import pyro.distributions as dist
    >>> def model(x):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    >>> guide = pyro.infer.autoguide.AutoNormal(model)
    >>> tree = from_svi(model, guide, (torch.ones(3),), num_draws=50, progress=False)
    >>> tree["log_likelihood"]["x"].dims
    ('chain', 'draw', 'data')
    """
    _check_groups(groups)
    if num_draws < 1:
        raise InputError(f"num_draws must be at least 1, not {num_draws}")
    batch = _one_batch(data)
    with untouched(seed, model, guide):
        reader = read_sites(model, guide, batch)
        bar = _bar(num_draws, progress)
        with torch.no_grad():
            found = reader.at(reader.from_guide(guide) for _ in bar)
            prior = reader.prior(num_draws) if _wants_prior(groups) else None
    names = _DimNames(reader, dims, extra_event_dims)
    return _tree(reader, found, prior, (1, num_draws), names, groups, constant_data, coords)


def from_mcmc(
    mcmc: MCMC,
    *,
    data: Data | None = None,
    groups: Collection[str] = _GROUPS,
    constant_data: Mapping[str, Any] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    extra_event_dims: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> xr.DataTree:
    """The draws of Pyro's `MCMC` as a DataTree, for ArviZ.

    Groups and dims are those of `from_svi`, with ``sample_stats`` (``diverging``) beside them.
    Discrete latents, which Pyro's kernels sum out, are drawn from their exact posterior given the
    others.

    Args:
        mcmc: after its run, with a kernel that was made from a model.
        data: what it was run on; by default what it remembers.
        groups: which groups of draws to make.
        constant_data: what the model was given and is no observation, by name.
        coords: dim → coordinate values.
        dims: variable → names of all of its dims after chain and draw, in place of those found.
        extra_event_dims: variable → names of its event dims.
        seed: of all random numbers used.
        progress: show a bar.

    Raises:
        InputError: if the chains were not run, their kernel has no model, the draws lack a latent,
            a plate subsamples, or a group is unknown.
    """
    _check_groups(groups)
    model = getattr(mcmc.kernel, "model", None)
    if model is None:
        raise InputError("mcmc has a kernel without a model (a potential_fn): from_mcmc needs one")
    if mcmc._samples is None:
        raise InputError("mcmc has no draws yet; call mcmc.run(...) first")
    batch = Batch(mcmc._args, mcmc._kwargs) if data is None else _one_batch(data)
    chains = mcmc.get_samples(group_by_chain=True)
    shape = next(iter(chains.values())).shape[:2]
    with untouched(seed, model):
        reader = read_sites(model, None, batch)
        with torch.no_grad():
            found = reader.at(_draws(chains, progress))
            prior = reader.prior(shape[1]) if _wants_prior(groups) else None
    names = _DimNames(reader, dims, extra_event_dims)
    tree = _tree(reader, found, prior, shape, names, groups, constant_data, coords)
    tree["sample_stats"] = xr.DataTree(
        _dataset({"diverging": _diverging(mcmc, shape)}, None, None, sample_dims=["chain", "draw"])
    )
    return tree


def _draws(chains: Mapping[str, Tensor], progress: bool) -> Iterator[dict[str, Tensor]]:
    flat = {name: value.flatten(0, 1) for name, value in chains.items()}
    count = len(next(iter(flat.values())))
    for index in _bar(count, progress):
        yield {name: value[index] for name, value in flat.items()}


def _bar(count: int, progress: bool) -> Iterable[int]:
    bar: Iterable[int] = tqdm(
        range(count), desc="draws", disable=not progress or None, delay=2, leave=False
    )
    return bar


def _diverging(mcmc: MCMC, shape: Sequence[int]) -> np.ndarray:
    """Which draws ended a divergent transition; none for kernels that do not say."""
    diverging = np.zeros(tuple(shape), dtype=bool)
    for chain, indices in mcmc.diagnostics().get("divergences", {}).items():
        diverging[int(chain.removeprefix("chain ")), list(indices)] = True
    return diverging


def _check_groups(groups: Collection[str]) -> None:
    if isinstance(groups, str) or set(groups) - set(_GROUPS):
        raise InputError(f"groups must be some of {list(_GROUPS)}, got {groups!r}")


def _wants_prior(groups: Collection[str]) -> bool:
    return bool({"prior", "prior_predictive"} & set(groups))


def _one_batch(data: Data) -> Batch:
    batches = as_batches(data)
    if len(batches) > 1:
        raise InputError(
            f"data has {len(batches)} batches, and draws of all sites belong to one call of model "
            "and guide; pass all of it as a tuple of arguments"
        )
    return batches[0]


class _DimNames:
    """Names of the dims of each variable after chain and draw."""

    def __init__(
        self,
        reader: SiteReader,
        given: Mapping[str, Sequence[str]] | None,
        events: Mapping[str, Sequence[str]] | None,
    ) -> None:
        self.reader, self.given, self.events = reader, given or {}, events or {}

    def of(self, name: str, num_dims: int) -> list[str]:
        """Of so many dims: those given, or plates, then event dims, then default names."""
        if name in self.given:
            return list(self.given[name])[:num_dims]
        if name not in self.reader.sites:
            return [f"{name}_dim_{axis}" for axis in range(num_dims)]
        site = self.reader.sites[name]
        named = [*site.dims, *self.events.get(name, site.event_dims)]
        named += [None] * (num_dims - len(named))
        return [
            f"{name}_dim_{axis}" if dim is None else dim
            for axis, dim in enumerate(named[:num_dims])
        ]


def _tree(
    reader: SiteReader,
    found: SiteDraws,
    prior: SiteDraws | None,
    shape: Sequence[int],
    names: _DimNames,
    groups: Collection[str],
    constant_data: Mapping[str, Any] | None,
    coords: Mapping[str, Sequence[Any]] | None,
) -> xr.DataTree:
    draws = {
        "posterior": found.latents,
        "posterior_predictive": found.predictive,
        "log_likelihood": found.log_likelihood,
    }
    made = {
        group: _grouped(values, shape, names, coords)
        for group, values in draws.items()
        if group in groups and values
    }
    if prior is not None:
        for group, values in (("prior", prior.latents), ("prior_predictive", prior.predictive)):
            if group in groups and values:
                made[group] = _grouped(values, (1, shape[1]), names, coords)
    if reader.observed:
        made["observed_data"] = _dataset(_arrays(reader.observed), names, coords, sample_dims=[])
    if constant_data:
        constants = {name: _constant(value) for name, value in constant_data.items()}
        made["constant_data"] = _dataset(constants, names, coords, sample_dims=[])
    return xr.DataTree.from_dict(made)


def _grouped(
    values: Mapping[str, Tensor],
    shape: Sequence[int],
    names: _DimNames,
    coords: Mapping[str, Sequence[Any]] | None,
) -> xr.Dataset:
    """Draws of shape ``(chain · draw, …)`` over chain, draw and named dims."""
    by_chain = {name: value.unflatten(0, tuple(shape)) for name, value in values.items()}
    return _dataset(_arrays(by_chain), names, coords, sample_dims=["chain", "draw"])


def _constant(value: Any) -> np.ndarray:
    return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)


def _arrays(values: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.cpu().numpy() for name, value in values.items()}


def _dataset(
    arrays: Mapping[str, np.ndarray],
    names: _DimNames | None,
    coords: Mapping[str, Sequence[Any]] | None,
    *,
    sample_dims: Sequence[str],
) -> xr.Dataset:
    count = len(sample_dims)
    dims: dict[Hashable, Sequence[Hashable]] = {}
    if names is not None:
        for name, array in arrays.items():
            dims[_plain(name)] = [_plain(dim) for dim in names.of(name, array.ndim - count)]
    made: xr.Dataset = azb.dict_to_dataset(
        {_plain(name): array for name, array in arrays.items()},
        inference_library=pyro,
        coords=dict(coords or {}),
        dims=dims,
        sample_dims=sample_dims,
    )
    return made


def _plain(name: str) -> str:
    """A name without slashes, which are paths in a DataTree."""
    return name.replace("/", ".")
