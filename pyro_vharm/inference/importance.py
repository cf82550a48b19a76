"""Importance sampling from the start density."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Kind
from pyro_vharm.inference.start import StartDensity, match_start
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.particles import Particles, drop_nonfinite, relative_variance

__all__ = ["ImportanceSampling"]

_ROWS_PER_PASS = 2**18


@dataclass(frozen=True)
class ImportanceSampling:
    """Importance sampling from a Gaussian per unit with a share of prior.

    The log of the mean weight is a stochastic lower bound on log p(v_u; θ); there is no upper one.
    A pilot of a tenth of the particles foresees the spread of the weights.

    Args:
        num_particles: weights per unit.
        prior_share: share of prior in the start density, in [0, 1).
    """

    num_particles: int = 1000
    prior_share: float = 0.05

    def __post_init__(self) -> None:
        if self.num_particles < 2:
            raise InputError(f"num_particles must be at least 2, not {self.num_particles}")
        if not 0 <= self.prior_share < 1:
            raise InputError(f"prior_share must lie in [0, 1), not {self.prior_share}")

    def run(
        self,
        densities: UnitDensities,
        *,
        start: StartDensity | None = None,
        progress: bool = False,
    ) -> Particles:
        """Weigh draws of the start density.

        Args:
            densities: the units.
            start: a start density of one's own; by default matched to guide draws.
            progress: show a bar.
        """
        start = match_start(densities, self.prior_share) if start is None else start
        pilot = self._draw(densities, start, max(self.num_particles // 10, 2), progress=False)
        drawn = self._draw(densities, start, self.num_particles, progress)
        log_weights, dropped = drop_nonfinite(drawn.log_weights)
        return Particles(
            unconstrained=drawn.unconstrained,
            log_weights=log_weights,
            kind=Kind.ESTIMATED,
            pilot_variance=relative_variance(drop_nonfinite(pilot.log_weights)[0]),
            num_nonfinite=dropped,
        )

    def _draw(
        self, densities: UnitDensities, start: StartDensity, count: int, progress: bool
    ) -> Particles:
        per_pass = max(_ROWS_PER_PASS // densities.num_units, 1)
        sizes = [min(per_pass, count - done) for done in range(0, count, per_pass)]
        latents, log_weights = [], []
        with torch.no_grad():
            for size in tqdm(
                sizes, desc="importance", disable=not progress or None, delay=2, leave=False
            ):
                draws = start.sample(densities, size)
                terms = densities.terms(draws)
                latents.append(draws)
                log_weights.append(terms.log_joint - start.log_prob(draws, terms.log_prior))
        return Particles(torch.cat(latents), torch.cat(log_weights), Kind.ESTIMATED)
