"""The shape of the true posterior of each unit: how far from a Gaussian, a product, one mode."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from arviz_stats.base import array_stats
from torch import Tensor

from pyro_vharm.diagnostics.discrete_shape import DiscreteShape
from pyro_vharm.diagnostics.modes import Modes
from pyro_vharm.diagnostics.weighted_moments import Measured
from pyro_vharm.estimates import UnitEstimates, concatenate
from pyro_vharm.tables import html_table, nats, text_table

__all__ = [
    "IN_NATS",
    "OF_COORDINATES",
    "ContinuousShape",
    "PosteriorShape",
    "join_shapes",
]

IN_NATS = ("entropy", "non_gaussianity", "gaussian_dependence", "total_correlation")
OF_COORDINATES = ("mean", "sd", "skewness", "excess_kurtosis")
_SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class ContinuousShape:
    """The posterior of the continuous latents h of each unit, on the unconstrained scale.

    Discrete latents are summed out. Numbers in nats are the guide's possible losses: a Gaussian
    family cannot come nearer in KL(p ‖ q) than `non_gaussianity`, nor a factorised one than the
    total correlation.

    Attributes:
        entropy: H = −E[log p(h | v)], in nats.
        non_gaussianity: KL(p ‖ N(m, S)) to the Gaussian of the same mean and covariance, in nats.
        gaussian_dependence: ½ (Σ log S_ii − log det S), the total correlation of that Gaussian, in
            nats.
        total_correlation: KL(p ‖ Π p_i), to the best product of densities of one coordinate each,
            in nats: ``gaussian_dependence + non_gaussianity − Σ J_i``, with J_i ≥ 0 how far
            marginal i is from its Gaussian. Of random particles an upper bound, as J_i is then
            that of a smoothed marginal, which is no larger.
        coordinates: ``mean``, ``sd``, ``skewness`` and ``excess_kurtosis`` (tail weight, 0 for a
            Gaussian) of each coordinate, shape ``(unit, dim)`` each, with errors.
        effective_rank: number of directions that hold the covariance, with errors, ``(unit,)``.
        dips: Hartigan's dip along coordinates, then principal axes, shape ``(unit, axis)``.
        dip_p_values: of these, for as many draws without weights as the particles are worth.
        modes: found by climbs from independent draws.
        draws: unweighted, shape ``(draw, unit, dim)``.
        quantiles: of each coordinate, at as many levels as there are effective draws, NaN beyond;
            shape ``(level, unit, dim)``.
        labels: of the coordinates, like ``h[0]``.
        effective_sizes: how many independent draws the particles are worth, shape ``(unit,)``.
        method: how the particles were made.
    """

    entropy: UnitEstimates
    non_gaussianity: UnitEstimates
    gaussian_dependence: UnitEstimates
    total_correlation: UnitEstimates
    coordinates: Mapping[str, Measured]
    effective_rank: Measured
    dips: Tensor
    dip_p_values: Tensor
    modes: Modes
    draws: Tensor
    quantiles: Tensor
    labels: tuple[str, ...]
    effective_sizes: Tensor
    method: str

    @property
    def dip_p_value(self) -> Tensor:
        """The least p-value of each unit times the number of axes looked at, ``(unit,)``."""
        return (self.dip_p_values.amin(-1) * self.dip_p_values.shape[-1]).clamp(max=1.0)

    def hdi(self, prob: float = 0.9) -> Tensor:
        """Highest density intervals of each coordinate: several where it has several modes.

        By ArviZ, from `quantiles`; shape ``(unit, dim, interval, 2)``, NaN where there are fewer.
        """
        points = self.quantiles.movedim(0, -1).cpu().numpy()
        found = array_stats.hdi(points, prob, axis=-1, method="multimodal", skipna=True)
        return torch.from_numpy(found).to(self.quantiles.device)

    def __str__(self) -> str:
        rows = []
        for name in IN_NATS:
            units: UnitEstimates = getattr(self, name)
            mean = units.total().per_unit
            cells = nats(mean.value), nats(mean.mc_error), nats(float(units.values.max()))
            rows.append([name.replace("_", " "), *cells])
        rank = self.effective_rank
        error = float(rank.errors.square().sum().sqrt()) / len(rank.values)
        ranks = float(rank.values.mean()), error, float(rank.values.max())
        rows.append(["effective rank", *map(nats, ranks)])
        share, again = self.modes.share_with_several
        unsettled = 1 - float(self.modes.num_settled.double().mean()) / self.modes.num_climbs
        dipped = float((self.dip_p_value < _SIGNIFICANCE).double().mean())
        unseen = float(self.modes.unseen_mass().max())
        return "\n".join(
            [
                text_table(["continuous latents, nats", "per unit", "± mc", "largest"], rows),
                f"more than one mode: {share:.1%} ± {again:.1%} of {len(rank.values)} units; modes "
                f"of less than {unseen:.0%} of a unit's mass may be missed",
                *([f"{unsettled:.1%} of the climbs did not come to rest"] if unsettled else []),
                f"dip test, p < {_SIGNIFICANCE} over {self.dips.shape[1]} axes: {dipped:.1%}",
                f"by {self.method}; effective draws: least {float(self.effective_sizes.min()):.0f}",
            ]
        )


@dataclass(frozen=True)
class PosteriorShape:
    """The shape of the true posterior of each unit.

    Attributes:
        continuous: of the continuous latents; ``None`` where there are none.
        discrete: of the discrete latents; ``None`` where there are none, or more than 4096
            configurations of one unit.
    """

    continuous: ContinuousShape | None
    discrete: DiscreteShape | None

    def __str__(self) -> str:
        return "\n\n".join(str(part) for part in (self.continuous, self.discrete) if part)

    def _repr_html_(self) -> str:
        return html_table(str(self))


def join_shapes(parts: Sequence[ContinuousShape]) -> ContinuousShape:
    """The units of several parts, one after the other."""

    def measured(found: Sequence[Measured]) -> Measured:
        return Measured(*(torch.cat(fields) for fields in zip(*found, strict=True)))

    most = max(part.modes.masses.shape[1] for part in parts)
    fewest = min(len(part.draws) for part in parts)
    modes = [_padded(part.modes, most) for part in parts]
    return replace(
        parts[0],
        entropy=concatenate([part.entropy for part in parts]),
        non_gaussianity=concatenate([part.non_gaussianity for part in parts]),
        gaussian_dependence=concatenate([part.gaussian_dependence for part in parts]),
        total_correlation=concatenate([part.total_correlation for part in parts]),
        coordinates={
            name: measured([part.coordinates[name] for part in parts]) for name in OF_COORDINATES
        },
        effective_rank=measured([part.effective_rank for part in parts]),
        dips=torch.cat([part.dips for part in parts]),
        dip_p_values=torch.cat([part.dip_p_values for part in parts]),
        modes=Modes(
            torch.cat([one.masses for one in modes]),
            torch.cat([one.locations for one in modes], 1),
            torch.cat([one.num_settled for one in modes]),
            modes[0].num_climbs,
        ),
        draws=torch.cat([part.draws[:fewest] for part in parts], 1),
        quantiles=_stacked([part.quantiles for part in parts]),
        effective_sizes=torch.cat([part.effective_sizes for part in parts]),
    )


def _stacked(points: Sequence[Tensor]) -> Tensor:
    """Along units, filled up with NaN to the most levels."""
    most = max(len(part) for part in points)
    padded = [
        torch.nn.functional.pad(part, (0, 0, 0, 0, 0, most - len(part)), value=math.nan)
        for part in points
    ]
    return torch.cat(padded, 1)


def _padded(modes: Modes, most: int) -> Modes:
    missing = most - modes.masses.shape[1]
    masses = torch.nn.functional.pad(modes.masses, (0, missing))
    locations = torch.nn.functional.pad(modes.locations, (0, 0, 0, 0, 0, missing), value=math.nan)
    return modes._replace(masses=masses, locations=locations)
