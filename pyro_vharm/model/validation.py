"""Checks of one plain run, made before any long work: what model, guide and data must satisfy."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_vharm.errors import InputError
from pyro_vharm.model.sites import (
    Mask,
    Site,
    is_discrete,
    is_improper,
    is_masked_in_part,
    is_periodic,
    is_point_mass,
    masked_where,
    unconstrained_shape,
)

__all__ = [
    "check_density",
    "check_latents",
    "check_masks",
    "check_same_kind",
    "check_sites_match",
    "refuse_training_modes",
    "reporting",
]

_FIRST_RUN = (
    "Check that the data are what it takes, that plate sizes equal the number of units in the "
    "call, and that data and parameters have one dtype and one device."
)


@contextmanager
def reporting(what: str) -> Iterator[None]:
    """Turn what Pyro or torch raise when first run on the data into an error that says so."""
    try:
        yield
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        raise InputError(
            f"the {what} raised when first run on the data ({type(error).__name__}: {error}). "
            f"{_FIRST_RUN}"
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


def check_latents(latents: Sequence[Site], guided: Collection[str]) -> None:
    """Refuse models without latents, and latents without a density or an enumeration."""
    if not latents:
        raise InputError("the model has no latent sample site, so there is nothing to infer")
    for site in latents:
        name, kind = site["name"], type(site["fn"]).__name__
        if is_discrete(site) and not _can_be_enumerated(site):
            raise InputError(
                f"the latent {name!r} ({kind}) is discrete and cannot be enumerated, so it cannot "
                "be summed out: its support is unbounded (Poisson, Geometric), differs between "
                "elements (Binomial with several counts), or has several elements in one event "
                "(put them in a plate in place of to_event)"
            )
        if is_periodic(site):
            raise InputError(
                f"the latent {name!r} ({kind}) is an angle whose density repeats itself along the "
                "real line, so its integral there is not one; use a distribution on an interval or "
                "on the line, such as a Beta scaled to it"
            )
        if is_improper(site):
            raise InputError(
                f"the latent {name!r} has an improper prior ({kind}), so the evidence is not "
                "defined; give it a prior that integrates to one"
            )
        if is_point_mass(site) and name in guided:
            raise InputError(
                f"the latent {name!r} is a point mass (Delta) in the model, so it has no density; "
                "write it as pyro.deterministic, and leave it out of the guide"
            )
        if is_point_mass(site):
            raise InputError(
                f"the latent {name!r} is a point mass (Delta) in the model, so it has no density; "
                "write it as pyro.deterministic"
            )


def _can_be_enumerated(site: Site) -> bool:
    if not site["fn"].has_enumerate_support:
        return False
    try:
        site["fn"].enumerate_support(expand=False)
    except NotImplementedError:  # a binomial whose counts differ between elements
        return False
    return True


def check_sites_match(latents: Sequence[Site], guide_latents: Sequence[Site]) -> None:
    """Refuse a guide that misses a continuous latent or has one too many."""
    names = {site["name"] for site in latents}
    needed = {site["name"] for site in latents if not is_discrete(site)}
    guide = {site["name"]: site for site in guide_latents}
    missing = sorted(needed - guide.keys())
    extra = sorted(
        name
        for name, s in guide.items()
        if name not in names and not s["infer"].get("is_auxiliary", False)
    )
    if missing or extra:
        raise InputError(
            f"the guide must sample exactly the model's latents {sorted(names)}; it misses "
            f"{missing} and has {extra} too many (discrete latents may be left out; sites that a "
            'latent is computed from take infer={"is_auxiliary": True})'
        )


def check_masks(latents: Sequence[Site], guide_latents: Sequence[Site]) -> None:
    """Refuse masks on parts of events, and a guide that masks out what the model keeps."""
    for site in (*latents, *guide_latents):
        if is_masked_in_part(site):
            raise InputError(
                f"the mask on the distribution of {site['name']!r} keeps some elements of an event "
                "and drops others, so what is left is no site of its own; put these elements in a "
                "plate in place of to_event, or mask whole events"
            )
    model = {site["name"]: masked_where(site) for site in latents}
    for site in guide_latents:
        mask, name = masked_where(site), site["name"]
        if mask is None or name not in model:
            continue
        if bool((~_as_tensor(mask) & _as_tensor(model[name])).any()):
            raise InputError(
                f"the guide masks out elements of {name!r} that the model does not, so log q is "
                "not a density of the latents; put the same mask on both"
            )


def _as_tensor(mask: Mask) -> Tensor:
    return torch.as_tensor(True if mask is None else mask)


def check_density(
    latents: Sequence[Site],
    proposed: Sequence[Site],
    fixed: Collection[str],
    observed: Sequence[Site],
) -> None:
    """Refuse a guide whose sites do not make up a density of the latents.

    Args:
        latents: the model's latent sites.
        proposed: the guide's sample sites.
        fixed: those that are point masses.
        observed: the guide's observed sites and factors.
    """
    if observed:
        extra = [site["name"] for site in observed]
        raise InputError(
            f"the guide has observed sites or factors {extra}, so log q is not a density of the "
            "latents alone; remove them"
        )
    names = {site["name"] for site in latents}
    extra = [s["name"] for s in proposed if is_discrete(s) and s["name"] not in names]
    if extra:
        raise InputError(
            f"the guide draws the discrete auxiliary variables {extra}, so log q is not a density "
            "of the latents alone and log p − log q has no bound on the evidence as its mean; use "
            "a mixture distribution (MixtureSameFamily) in their place"
        )
    wanted = {site["name"]: _num_dims(site) for site in latents if not is_discrete(site)}
    drawn = sum(
        wanted.get(site["name"], site["value"].numel())
        for site in proposed
        if not is_point_mass(site) and not is_discrete(site)
    )
    if not fixed and drawn != sum(wanted.values()):
        raise InputError(
            f"the guide draws {drawn} numbers for {sum(wanted.values())} latent dimensions; with "
            "auxiliary variables beside the latents, log p − log q has no bound on the evidence "
            "as its mean"
        )


def _num_dims(site: Site) -> int:
    return torch.Size((*site["fn"].batch_shape, *unconstrained_shape(site))).numel()


def check_same_kind(latents: Sequence[Site]) -> None:
    """Refuse continuous latents of several dtypes or on several devices."""
    found = {
        s["name"]: (s["value"].dtype, s["value"].device) for s in latents if not is_discrete(s)
    }
    if len(set(found.values())) > 1:
        raise InputError(
            f"the latents differ in dtype or device, {found}; bring them to one of each"
        )
