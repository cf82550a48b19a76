"""Matching a mixture of Gaussians to each unit's posterior, one at each peak that climbs find."""

from __future__ import annotations

import math
from itertools import islice

import torch
from torch import Tensor

from pyro_vharm.inference.coverage import FAR, Weighed, finds_no_new_mass
from pyro_vharm.inference.gaussians import UnitGaussian, UnitMixture
from pyro_vharm.inference.peaks import SETTLED, Ascent, ascend, peaks_of
from pyro_vharm.inference.score_matching import (
    MOST_COST,
    Matched,
    largest_spread,
    match_in_rounds,
)
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.particles import log_mean_exp

__all__ = ["affordable_units", "match_mixture"]

_SCOUTS, _FROM_PRIOR, _FROM_MATCHED = 48, 32, 4
_NUM_STEPS, _NUM_ROUNDS, _NUM_UPDATES = 100, 5, 30
_MOST_PEAKS = 8
_LEAST_DRAWS, _DRAWS_PER_DIM = 64, 4
_HIGH = 3.0  # standard deviations of log weights, of a weight at a peak above the mean weight
_NARROW = 0.3
_ELEMENTS = 2**22


def affordable_units(dim: int) -> int:
    """How many units at a time: climbs keep a matrix each."""
    return max(_ELEMENTS // ((_FROM_PRIOR + _FROM_MATCHED) * dim**2), 1)


def match_mixture(densities: UnitDensities, gaussian: UnitGaussian) -> tuple[UnitMixture, Tensor]:
    """A mixture of Gaussians for each unit, and for which units that is good enough.

    Climbs from the prior and from a Gaussian that is already there lead to peaks. At each a
    narrow Gaussian begins, shaped as the climbs learned, and is matched by scores at its own draws;
    one that strays from its peak is left out. Shares are those that make the mixture nearest to the
    posterior as draws of all components, weighed, stand for it. It is good enough if the log
    weights of fresh draws are even, all climbs came to rest near a component and no higher than it
    foresees, and draws of the prior find no further mass. A single peak is no mixture: what spoke
    against one Gaussian before does not fall silent as these climbs miss it.

    An annealing path from one wide Gaussian over modes far apart loses some of them: as it cools
    all particles stay where the path's density first had its mass, and nothing crosses later. A
    start with a Gaussian at each peak leaves nothing to cross.

    Args:
        densities: the units.
        gaussian: for each; climbs go in its coordinates.

    Source: "Adaptive importance sampling in general mixture classes", Cappé, Douc, Guillin, Marin,
    Robert (2008), for the shares.
    """
    prior = densities.draw_prior(_SCOUTS)
    first = [gaussian.whiten(prior[:_FROM_PRIOR]), gaussian.whiten(gaussian.sample(_FROM_MATCHED))]
    ascent = ascend(densities, gaussian, torch.cat(first), _NUM_STEPS, SETTLED)
    begun, present = _at_peaks(densities, gaussian, ascent)
    matched = match_in_rounds(densities, begun, _NUM_ROUNDS)
    strayed = matched.gaussian.whiten(begun.mean[None])[0].norm(dim=-1) > FAR
    present[1:] &= ~strayed.unflatten(0, present.shape)[1:]
    shares = _match_shares(densities, matched, present)
    mixture = UnitMixture(shares, matched.gaussian)
    own = _draw(densities, mixture)
    spread = own.log_weights.var(0).nan_to_num(nan=math.inf)
    scouts = Weighed.at(densities, prior, mixture.log_prob(prior))
    ends = gaussian.unwhiten(ascent.at)
    limit = largest_spread(densities.dim)
    excess = ascent.height - mixture.log_prob(ends) - log_mean_exp(own.log_weights)
    covered = (mixture.distance(ends) < FAR) & (excess < _HIGH * limit**0.5)
    good = (ascent.settled & covered).all(0)
    good &= (spread <= limit) & finds_no_new_mass(own, scouts)
    good &= torch.isfinite(shares).sum(0) > 1
    cost = spread.clamp(max=MOST_COST).repeat(len(shares))
    return UnitMixture(shares, matched.gaussian.widened(cost)), good


def _at_peaks(
    densities: UnitDensities, gaussian: UnitGaussian, ascent: Ascent
) -> tuple[UnitGaussian, Tensor]:
    """A narrow Gaussian at each peak, and which units have it, ``(component, unit)``.

    Narrow, so that its first draws do not lie about other peaks as well.
    """
    peaks = list(islice(peaks_of(densities, gaussian, ascent), _MOST_PEAKS))
    if not peaks:
        return gaussian, torch.ones_like(ascent.settled[:1])
    present = torch.stack([peak.same.any(0) for peak in peaks])
    present[0] = True  # a unit without any is no good whatever stands in its place
    means = torch.cat([gaussian.unwhiten(peak.at[None])[0] for peak in peaks])
    curvature = torch.cat([peak.curvature for peak in peaks])
    root, failed = torch.linalg.cholesky_ex(0.5 * (curvature + curvature.mT))
    eye = torch.eye(densities.dim, dtype=root.dtype, device=root.device)
    root = _NARROW * torch.where((failed > 0)[:, None, None], eye, root)
    return UnitGaussian(means, gaussian.scale_tril.repeat(len(peaks), 1, 1) @ root), present


def _match_shares(densities: UnitDensities, matched: Matched, present: Tensor) -> Tensor:
    """Log shares of the components that are there, ``(component, unit)``."""
    shape, draws = present.shape, matched.draws
    drawn = matched.gaussian.unwhiten(draws.whitened).reshape(-1, shape[1], densities.dim)
    each = matched.gaussian.log_prob(drawn.repeat(1, shape[0], 1)).unflatten(1, shape)
    each = each.masked_fill(~present, -math.inf)
    even = present.double().log().to(each) - present.sum(0).log().to(each)
    log_weights = draws.log_joint.reshape(-1, shape[1]) - (each + even).logsumexp(1)
    origin = present.repeat(len(draws.whitened), 1)
    log_weights = log_weights.masked_fill(~origin, -math.inf).nan_to_num(nan=-math.inf)
    log_shares = even
    for _ in range(_NUM_UPDATES):
        members = torch.log_softmax(each + log_shares[None], 1)
        total = torch.logsumexp(log_weights[:, None] + members, 0)
        log_shares = torch.where(torch.isfinite(total).any(0), torch.log_softmax(total, 0), even)
    return log_shares


def _draw(densities: UnitDensities, mixture: UnitMixture) -> Weighed:
    drawn = mixture.sample(_LEAST_DRAWS + _DRAWS_PER_DIM * densities.dim)
    return Weighed.at(densities, drawn, mixture.log_prob(drawn))
