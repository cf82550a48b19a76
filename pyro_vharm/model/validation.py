"""Checks made once, before any long work: what model, guide and data must satisfy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_vharm.errors import InputError
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.tracing import (
    FixedSites,
    is_masked,
    is_point_mass,
    latent_sites,
    observed_sites,
    site_log_prob,
    trace_particles,
    trace_plain,
    unconstrained_shape,
)

__all__ = [
    "check_density",
    "check_deterministic",
    "check_deterministic_guide",
    "check_finite",
    "check_independent",
    "check_latents",
    "check_particles",
    "check_sites_match",
    "refuse_training_modes",
    "reporting",
]

type Site = dict[str, Any]


_FIRST_RUN = (
    "Check that the data are what it takes, that plate sizes equal the number of units in the "
    "call, and that data and parameters have one dtype and one device."
)
_FIRST_PARTICLES = (
    "It ran for one particle: many are drawn at once under an outermost plate, so every operation "
    "must broadcast over an extra batch dim on the left (no reshape, expand or squeeze to fixed "
    "shapes; index event dims from the right)."
)


@contextmanager
def reporting(what: str, *, particles: bool = False) -> Iterator[None]:
    """Turn what Pyro or torch raise when first run on the data into an error that says so."""
    try:
        yield
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        where = "with many particles" if particles else "on the data"
        raise InputError(
            f"the {what} raised when first run {where} ({type(error).__name__}: {error}). "
            f"{_FIRST_PARTICLES if particles else _FIRST_RUN}"
        ) from error


@contextmanager
def refuse_training_modes(what: str) -> Iterator[None]:
    """Refuse batch norm and dropout in train mode before they run, since running changes them."""

    def hook(module: nn.Module, _inputs: object) -> None:
        if module.training and isinstance(module, _BatchNorm):
            raise InputError(
                f"the {what} uses {type(module).__name__} in train mode, which couples units and "
                "updates its buffers; call .eval() on the network first"
            )
        if module.training and isinstance(module, _DropoutNd) and module.p > 0:
            raise InputError(
                f"the {what} uses {type(module).__name__} in train mode, so its density is random; "
                "call .eval() on the network first"
            )

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def check_latents(latents: Sequence[Site]) -> None:
    """Refuse models without latents, and latents that are discrete or masked."""
    if not latents:
        raise InputError("the model has no latent sample site, so there is nothing to infer")
    for site in latents:
        name = site["name"]
        if site["fn"].support.is_discrete:
            raise InputError(
                f"the latent {name!r} ({type(site['fn']).__name__}) is discrete; only continuous "
                "latents are supported: sum it out in the model first"
            )
        if site["mask"] is not None or is_masked(site):
            raise InputError(
                f"the latent {name!r} is masked, so its prior is improper where the mask is False; "
                "mask observed sites only"
            )


def check_sites_match(latents: Sequence[Site], guide_latents: Sequence[Site]) -> None:
    """Refuse a guide that misses a latent or has one too many."""
    names = {site["name"] for site in latents}
    guide = {site["name"]: site for site in guide_latents}
    missing = sorted(names - guide.keys())
    extra = sorted(
        name
        for name, s in guide.items()
        if name not in names and not s["infer"].get("is_auxiliary", False)
    )
    if missing or extra:
        raise InputError(
            f"the guide must sample exactly the model's latents {sorted(names)}; it misses "
            f"{missing} and has {extra} too many (sites that a latent is computed from take "
            'infer={"is_auxiliary": True})'
        )


def check_density(
    latents: Sequence[Site], first: Sequence[Site], second: Sequence[Site], observed: Sequence[Site]
) -> None:
    """Refuse a guide whose sites do not make up a density of the latents.

    Args:
        latents: the model's latent sites.
        first: the guide's sample sites in one run.
        second: the same in another run.
        observed: the guide's observed sites and factors.
    """
    if observed:
        extra = [site["name"] for site in observed]
        raise InputError(
            f"the guide has observed sites or factors {extra}, so log q is not a density of the "
            "latents alone; remove them"
        )
    names = {site["name"] for site in latents}
    again = {site["name"]: site["value"] for site in second}
    fixed = [
        s["name"]
        for s in first
        if s["name"] in names and is_point_mass(s) and torch.equal(s["value"], again[s["name"]])
    ]
    if fixed:
        raise InputError(
            f"the guide holds the continuous latents {fixed} as point masses (Delta): "
            "E_q[log p − log q] is then a joint log density and no bound on the evidence; use a "
            "guide with a density, such as AutoNormal"
        )
    drawn = sum(_num_dims(site) for site in first if not is_point_mass(site))
    wanted = sum(_num_dims(site) for site in latents)
    if drawn != wanted:
        raise InputError(
            f"the guide draws {drawn} numbers for {wanted} latent dimensions; with auxiliary "
            "variables beside the latents, log p − log q has no bound on the evidence as its mean"
        )


def _num_dims(site: Site) -> int:
    return torch.Size((*site["fn"].batch_shape, *unconstrained_shape(site))).numel()


def check_finite(densities: UnitDensities, latents: Tensor) -> None:
    """Refuse a model whose log density is finite at no draw from guide or prior, for some unit."""
    if bool(torch.isfinite(densities.log_joint(latents)).any(0).all()):
        return
    trace, _ = densities.trace_at(latents)
    sites = [*latent_sites(trace), *observed_sites(trace)]
    bad = [s["name"] for s in sites if not bool(torch.isfinite(site_log_prob(s)).all())]
    raise InputError(
        f"the log density is not finite at any of {len(latents)} draws for some units; the sites "
        f"to look at are {bad}. Check the data for NaN and values outside the support, and the "
        "parameters for NaN."
    )


def check_deterministic(densities: UnitDensities, latents: Tensor) -> None:
    """Refuse a model whose log density at fixed latents is random."""
    first, second = densities.log_joint(latents), densities.log_joint(latents)
    if not torch.equal(first.nan_to_num(), second.nan_to_num()):
        raise InputError(
            "the model's log density differs between two calls at the same latents: it has random "
            f"operations outside pyro.sample ({_subsampling(densities.trace_at(latents)[0])}); "
            "make it deterministic given its latents and parameters"
        )


def check_deterministic_guide(densities: UnitDensities) -> None:
    """Refuse a guide whose density at fixed latents is random."""
    if densities.guide is None:
        return
    first = trace_particles(densities.guide, densities.batch, densities.layout, 2)
    values = {site["name"]: site["value"] for site in latent_sites(first)}
    second = trace_particles(
        densities.guide, densities.batch, densities.layout, 2, FixedSites(values)
    )
    for name in values:
        before, after = site_log_prob(first.nodes[name]), site_log_prob(second.nodes[name])
        if not torch.allclose(before, after, equal_nan=True):
            raise InputError(
                f"the guide's density at {name!r} differs between two calls at the same value: it "
                f"has random operations outside pyro.sample ({_subsampling(second)}); make it "
                "deterministic given its latents and parameters"
            )


def _subsampling(trace: Trace) -> str:
    plates = [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and isinstance(site["fn"], _Subsample)
        and (site["fn"].subsample_size or site["fn"].size) < site["fn"].size
    ]
    return f"plates {plates} subsample at random" if plates else "dropout in train mode, perhaps"


def check_particles(densities: UnitDensities, latents: Tensor) -> None:
    """Refuse a model or guide that computes something else for many particles than for one."""
    some = latents[:2]
    _check_equal(densities.log_joint(latents)[:2], densities.plain_log_joint(some), "model")
    if densities.guide is None:
        return
    many = trace_particles(densities.guide, densities.batch, densities.layout, len(latents))
    plain = trace_plain(densities.guide, densities.batch)
    shapes = {site["name"]: site["value"].shape for site in latent_sites(plain)}
    values = {name: many.nodes[name]["value"][0].reshape(shape) for name, shape in shapes.items()}
    again = trace_plain(densities.guide, densities.batch, FixedSites(values))
    for name in shapes:
        log_prob = site_log_prob(many.nodes[name])
        first = log_prob.reshape(len(latents), -1)[0]
        alone = site_log_prob(again.nodes[name]).reshape(-1)
        _check_equal(first, alone.expand_as(first), f"guide, at its site {name!r},")


def _check_equal(many: Tensor, one: Tensor, what: str) -> None:
    tolerance = 1e3 * torch.finfo(many.dtype).eps
    if not torch.allclose(many, one, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise InputError(
            f"the {what} gives other densities when run for many particles than when run for one: "
            "many are drawn at once, under an outermost plate, and something in it sums, indexes, "
            "sorts or normalises over a batch dim counted from the left. Count dims from the right "
            "(cumsum(-1), softmax(-1), sum(-1), h[..., k])."
        )


def check_independent(densities: UnitDensities, latents: Tensor) -> None:
    """Refuse a unit plate whose units influence each other."""
    if densities.num_units < 2:
        return
    moved = latents[:2].clone()
    moved[:, 0] = latents[:2, 0].roll(1, 0) + 0.5
    before = densities.plain_log_joint(latents[:2])[:, 1:]
    after = densities.plain_log_joint(moved)[:, 1:]
    tolerance = 1e3 * torch.finfo(before.dtype).eps
    finite = torch.isfinite(before)
    if not torch.allclose(before[finite], after[finite], rtol=tolerance, atol=tolerance):
        raise InputError(
            f"the elements of plate {densities.layout.plate!r} are not independent units: changing "
            "the latents of the first changes the density of others (batch norm in train mode, or "
            "a computation across the plate)"
        )
