"""Fitting families of q to each unit at fixed θ, from several starts, and their ELBOs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Kind, UnitEstimates, concatenate
from pyro_vharm.inference.gaussians import UnitGaussian
from pyro_vharm.inference.hamiltonian import HamiltonianKernel
from pyro_vharm.inference.refitting import refit_start
from pyro_vharm.inference.start import match_start
from pyro_vharm.learning.refit import Refit
from pyro_vharm.learning.training import minimise
from pyro_vharm.learning.unit_families import GuideFamily, UnitFit
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.minibatches import unit_blocks
from pyro_vharm.model.problem import Problem
from pyro_vharm.particles import resample

__all__ = ["check_families", "family_elbos"]

_ROWS_PER_PASS, _ROWS_PER_STEP = 2**17, 2**16
_PILOT, _SCOUTS, _POINTS, _NARROW = 32, 512, 3, 0.3
_WIDE_SHARE = 0.5
_MOST_ROUNDS, _LEAST_GAIN, _SLOWER = 8, 1e-5, 0.4


def check_families(families: Sequence[GuideFamily], problem: Problem) -> None:
    """Refuse what cannot be fitted, before any long work.

    Raises:
        InputError: for something that is no family, for equal names, and where all latents are
            discrete.
    """
    for family in families:
        if isinstance(family, type) or not callable(getattr(family, "begin", None)):
            raise InputError(
                "families must hold objects such as MeanField(), FullRank() or Flow(), not "
                f"{family!r}"
            )
    names = [family.name for family in families]
    if len(set(names)) < len(names):
        raise InputError(
            f"families must have different names, not {names}; give a flow one, as in "
            "Flow(num_layers=1, name='small flow')"
        )
    if families and problem.densities[0].dim == 0:
        raise InputError(
            "families of densities need a continuous latent, and all latents of the model are "
            "discrete; leave out families"
        )


def family_elbos(
    problem: Problem, families: Sequence[GuideFamily], refit: Refit, *, progress: bool
) -> dict[str, UnitEstimates]:
    """Max over q in each family, separately for each unit, of L(θ, q), from below.

    L(θ, q_u) = E_q[log p(v_u, h; θ) − log q_u(h)] is maximised by gradients along draws, from the
    moments of the guide's draws, from those that a tempered population finds, from single points
    of it, and from what families on lower rungs found. The best of each unit is chosen by draws of
    their own; further draws give the numbers, so these are unbiased for the q that was chosen.

    Returns:
        the ELBO of each family by name, from the lowest rung up.
    """
    ladder = sorted(families, key=lambda family: family.rung)
    if not ladder:
        return {}
    parts: list[Mapping[str, UnitEstimates]] = []
    for densities in problem.densities:
        starts = _find_starts(densities)
        widest = max(family.num_strata for family in ladder) * (len(starts.gaussians) + 2)
        size = max(_ROWS_PER_STEP // (refit.num_replicates * widest), 1)
        for units, block in unit_blocks(densities, size):
            parts.append(_climb_ladder(block, ladder, starts.select(units), refit, progress))
    return {f.name: concatenate([part[f.name] for part in parts]) for f in ladder}


class _Starts(NamedTuple):
    """Gaussians to begin at, and posterior draws ``(particle, unit, dim)`` about the first."""

    gaussians: Sequence[UnitGaussian]
    draws: Tensor

    def select(self, units: Tensor) -> _Starts:
        return _Starts([one.select(units) for one in self.gaussians], self.draws[:, units])


def _climb_ladder(
    densities: UnitDensities,
    ladder: Sequence[GuideFamily],
    starts: _Starts,
    refit: Refit,
    progress: bool,
) -> dict[str, UnitEstimates]:
    held, found = None, {}
    bar = tqdm(ladder, desc="fitting families", disable=not progress or None, delay=2, leave=False)
    for family in bar:
        fit = _fit_family(densities, family, starts, held, refit)
        held = held if fit.gaussian is None else fit.gaussian
        bounds = _bounds(densities, fit, _noise(densities, family, refit.num_particles))
        error = bounds.std(0) / len(bounds) ** 0.5
        found[family.name] = UnitEstimates(bounds.mean(0), error, Kind.ESTIMATED)
    return found


def _fit_family(
    densities: UnitDensities,
    family: GuideFamily,
    starts: _Starts,
    held: UnitGaussian | None,
    refit: Refit,
) -> UnitFit:
    """A first round from every start, then rounds from the best while the total of L rises.

    A start that the first round made worse, as by the loss of a mode, is kept as it was. What a
    lower rung found is left only where the gain is twice its standard error. Each round is
    slower than the last, as the noise of gradients keeps a fit of many parameters off its optimum.
    """
    begun = _begun(family, starts, held)
    best = _best(densities, _optimised(densities, begun, refit).joined(begun), refit)
    if held is not None:
        least = UnitFit(family, family.begin(held))
        gains = _gains(densities, best, least, refit)
        best = best.where(gains.values > 2 * gains.mc_errors, least)
    for again in range(1, _MOST_ROUNDS):
        slower = replace(refit, learning_rate=refit.learning_rate * _SLOWER**again)
        now = _optimised(densities, best.rebased(), slower)
        gains = _gains(densities, now, best, refit)
        total = gains.total()
        if total.value > 0:
            best = now.where(gains.values > 0, best)
        if not total.value > max(2 * total.mc_error, _LEAST_GAIN * densities.num_units):
            break
    return best


def _begun(family: GuideFamily, starts: _Starts, held: UnitGaussian | None) -> UnitFit:
    """A member for each start and unit, all units of the first start first."""
    several = family.num_strata > 1  # such a family finds modes from the draws
    gaussians = [*starts.gaussians[: 2 if several else None], *([] if held is None else [held])]
    mean = torch.cat([start.mean for start in gaussians])
    scale_tril = torch.cat([start.scale_tril for start in gaussians])
    begun = UnitFit(family, family.begin(UnitGaussian(mean, scale_tril)))
    if not several:
        return begun
    return begun.joined(UnitFit(family, family.begin(gaussians[0], starts.draws)))


def _best(densities: UnitDensities, fit: UnitFit, refit: Refit) -> UnitFit:
    """Of each unit the fit with the highest L, by draws that serve nothing else."""
    noise = _noise(densities, fit.family, refit.num_particles)
    heights = _bounds(densities, fit, noise).mean(0).reshape(-1, densities.num_units)
    which = heights.nan_to_num(nan=-torch.inf).argmax(0)
    return fit.select(which * densities.num_units + torch.arange(len(which), device=which.device))


def _gains(densities: UnitDensities, now: UnitFit, before: UnitFit, refit: Refit) -> UnitEstimates:
    """L of one fit less that of another, by draws from the same noise, which serve nothing else."""
    noise = _noise(densities, now.family, refit.num_particles)
    apart = _bounds(densities, now, noise) - _bounds(densities, before, noise)
    apart = apart.nan_to_num(nan=0.0, posinf=0.0)  # both at −∞, or one that cannot be told
    return UnitEstimates(apart.mean(0), apart.std(0) / len(apart) ** 0.5, Kind.ESTIMATED)


def _optimised(densities: UnitDensities, fit: UnitFit, refit: Refit) -> UnitFit:
    freed, leaves = fit.freed()
    num_starts = len(freed.tensors["mean"]) // densities.num_units

    def loss(_step: int) -> Tensor:
        noise = _noise(densities, fit.family, refit.num_replicates, num_starts)
        drawn = freed.draw(noise)
        if drawn.latents.requires_grad:  # a point where log p is not finite has no say
            drawn.latents.register_hook(lambda gradient: gradient.nan_to_num(0.0, 0.0, 0.0))
        log_joint = _log_joint(densities, drawn.latents)
        bound = (drawn.shares * (log_joint - drawn.log_density)).sum(1)
        return -bound.sum() / len(bound)

    minimise(loss, leaves, refit.schedule, description="fitting a family", progress=False)
    return freed


def _noise(
    densities: UnitDensities, family: GuideFamily, num_particles: int, num_starts: int = 1
) -> Tensor:
    """Noise for so many draws of each stratum, ``(particle, stratum, start · unit, dim)``."""
    shape = num_particles, family.num_strata, num_starts * densities.num_units, densities.dim
    return torch.randn(shape, dtype=densities.dtype, device=densities.device)


def _log_joint(densities: UnitDensities, latents: Tensor) -> Tensor:
    """Log p(v, h; θ), ``(particle, stratum, start · unit)``, at latents with a further dim."""
    rows = latents.reshape(-1, densities.num_units, densities.dim)
    return densities.log_joint(rows).reshape(latents.shape[:-1])


def _bounds(densities: UnitDensities, fit: UnitFit, noise: Tensor) -> Tensor:
    """Unbiased values of L, ``(particle, start · unit)``; of several starts by the same noise."""
    num_starts = len(fit.tensors["mean"]) // densities.num_units
    rows = num_starts * densities.num_units * fit.family.num_strata
    found = []
    with torch.no_grad():
        for part in noise.split(max(_ROWS_PER_PASS // rows, 1)):
            drawn = fit.draw(part.repeat(1, 1, num_starts, 1))
            log_joint = _log_joint(densities, drawn.latents)
            found.append((drawn.shares * (log_joint - drawn.log_density)).sum(1))
    return torch.cat(found)


def _find_starts(densities: UnitDensities) -> _Starts:
    """Gaussians to begin at: of the posterior, of the guide's draws, and about single points.

    The posterior's moments are those of a population tempered from guide and prior. Points are
    drawn from a wide density in proportion to p/q, so that each mode of mass has its chance.
    """
    guided = match_start(densities, 0.0)
    refitted = refit_start(densities, guided, HamiltonianKernel(), _PILOT)
    tempered = refitted.moments
    wide = replace(refitted, prior_share=_WIDE_SHARE)
    with torch.no_grad():
        scouts = wide.sample(densities, _SCOUTS)
        terms = densities.terms(scouts)
        log_weights = terms.log_joint - wide.log_prob(scouts, terms.log_prior)
    draws = resample(scouts, log_weights)
    narrow = [UnitGaussian(point, _NARROW * tempered.scale_tril) for point in draws[:_POINTS]]
    return _Starts([tempered, guided.gaussian, *narrow], draws)
