"""The guide's density at latents that it did not draw, where its draws can be read off them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.guide_runs import run_guide
from pyro_vharm.model.model_runs import ModelRun, run_model_at

__all__ = ["GuideReading", "PairAtLatents", "read_guide"]

_UNCONSTRAINED = "_unconstrained"  # how AutoNormal names the draw of a latent


class PairAtLatents(NamedTuple):
    """Model and guide at given latents, on the unconstrained scale.

    Attributes:
        log_joint: log p(v, h; θ), discrete latents summed out, ``(particle, unit)``.
        log_guide: log q(h), ``(particle, unit)``; ``(particle, 1)`` where it can be had in total
            only.
        scale: the factor from subsampling, which is in neither.
    """

    log_joint: Tensor
    log_guide: Tensor
    scale: float


@dataclass(frozen=True)
class GuideReading:
    """How a guide's draws are read off latents.

    Attributes:
        random: the guide's sites that are drawn.
    """

    random: tuple[str, ...]

    def __call__(self, densities: UnitDensities, latents: Tensor) -> PairAtLatents:
        """Model and guide at packed latents ``(particle, unit, dim)``, differentiable in both."""
        assert densities.guide is not None, "there is one to read"
        at = densities.run_at(latents, record=True)
        values = self.values(densities, at)
        run = run_guide(densities.guide, densities.batch, densities.structure, len(latents), values)
        volume = densities.counted(at.log_abs_det)
        if densities.structure.per_unit:
            log_guide = densities.counted(run.log_guide) + volume
        else:
            log_guide = run.log_guide + volume.sum(1, keepdim=True)
        return PairAtLatents(densities.counted(at.log_joint), log_guide, at.scale)

    def values(self, densities: UnitDensities, at: ModelRun) -> dict[str, Tensor]:
        """The draws that would have given the latents of a run; some may be missing."""
        known = {**at.values}
        known |= {name + _UNCONSTRAINED: value for name, value in at.unconstrained.items()}
        if len(self.random) == 1 and self.random[0] not in known:
            known[self.random[0]] = _in_one(densities, at.unconstrained)
        return {name: known[name] for name in self.random if name in known}


def read_guide(densities: UnitDensities) -> GuideReading | None:
    """Find how a guide's draws are read off latents; tried on two draws.

    They can be where each draw is a latent, a latent on the unconstrained scale (AutoNormal), or
    all latents in one vector (AutoMultivariateNormal, AutoLowRankMultivariateNormal,
    AutoIAFNormal), none is discrete or below a discrete latent that is summed out, and no part
    of the latents is masked out.

    Returns:
        ``None`` where they cannot be, or the guide has no density.
    """
    structure = densities.structure
    if not densities.has_guide_density or structure.guided or structure.learned_transforms:
        return None
    assert densities.guide is not None, "it has a density"
    with torch.no_grad():
        drawn = run_guide(densities.guide, densities.batch, structure, 2)
        reading = GuideReading(drawn.random)
        try:
            at = run_model_at(densities.model, densities.batch, structure, 2, drawn, record=True)
            again = densities.run_at(densities.pack(at.unconstrained, 2), record=True)
        except InputError:  # no one place on the unconstrained scale
            return None
        found = reading.values(densities, again)
    masked = any(mask is not None for mask in drawn.masks.values())
    return None if masked or not _same(found, drawn.values, drawn.random) else reading


def _in_one(densities: UnitDensities, unconstrained: Mapping[str, Tensor]) -> Tensor:
    """All unconstrained latents in one vector per particle, in the model's order of sites."""
    parts = [unconstrained[site.name].flatten(1) for site in densities.sites]
    joined = torch.cat(parts, 1)
    plates = (1,) * densities.layout.max_plate_nesting
    return joined.reshape(len(joined), *plates, -1)


def _same(found: Mapping[str, Tensor], drawn: Mapping[str, Tensor], names: tuple[str, ...]) -> bool:
    tolerance = 1e-4
    return all(
        name in found
        and found[name].shape == drawn[name].shape
        and torch.allclose(found[name], drawn[name], rtol=tolerance, atol=tolerance)
        for name in names
    )
