"""Log evidence by bridge sampling from draws of Hamiltonian chains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Kind, UnitEstimates
from pyro_vharm.inference.chains import (
    ChainDraws,
    HamiltonianMonteCarlo,
    mean_draws,
    refine_gaussian,
)
from pyro_vharm.inference.start import Blocks, StartDensity
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.particles import (
    Particles,
    drop_nonfinite,
    join_units,
    log_mean_exp,
    log_mean_exp_error,
)

__all__ = ["Bridge", "BridgeSampling", "build_bridge"]

_ROWS_PER_PASS = 2**16
_PROPOSALS_PER_DRAW = 8
_SIGNIFICANT = 3.0  # standard errors by which the proposal may find more mass than the chains
_FAILURE_RATE = 3e-3  # of calling chance a mass that posterior draws do not see
_BEYOND = 100.0  # nats below the least log ratio where a root is still looked for


class Bridge(NamedTuple):
    """Estimates of log p(v_u; θ), each of shape ``(unit,)``.

    Attributes:
        log_evidence: the optimal bridge estimate.
        error: its standard error.
        effective_draws: effective number of posterior draws, as the bridge sees them.
        missed: nats by which the proposal's own draws find more mass than the chains, where that
            is no chance; else 0.
    """

    log_evidence: Tensor
    error: Tensor
    effective_draws: Tensor
    missed: Tensor


@dataclass(frozen=True)
class BridgeSampling:
    """Log evidence from posterior draws and draws of a normalised proposal, by an optimal bridge.

    The first half of each chain fits the proposal q, a Gaussian per unit with a share of prior.
    With l = p(v, h; θ)/q(h), n₁ effective draws of the second halves and n₂ draws of q, the
    estimate Ẑ solves

        n₁ mean_{p(h|v)} [n₂ Ẑ / (n₁ l + n₂ Ẑ)] = n₂ mean_q [n₁ l / (n₁ l + n₂ Ẑ)],

    the fixed point of Meng and Wong's iteration, here by bisection, which always gets there. Its
    standard error is the relative mean squared error of Frühwirth-Schnatter, where the variance
    of the posterior's series is divided by its effective number of draws: it counts how far
    chains disagree.

    The number is *conditional* on chains that reached the posterior. A mode that all chains miss
    is in neither half. So the plain mean of l over draws of q, which needs no chain, is looked at
    as well: where it is above Ẑ by no chance, the proposal found mass that the chains have not, and
    the whole difference is added to the unit's error, as `systematic`. That sees modes that
    the prior reaches with some draws, in few dimensions; in many, only R̂ may tell.

    Args:
        draws: the chains.
        num_proposals: draws of the proposal, at least 2; by default eight times the posterior draws
            that enter: they cost no gradients, and those from the prior look for other modes.
        prior_share: share of prior in the proposal, in [0, 1).
        tolerance: nats within which Ẑ is found.
        max_iterations: halvings of the bracket of log Ẑ; a unit that needs more has an infinite
            error.

    Source: "Simulating ratios of normalizing constants via a simple identity", Meng, Wong (1996);
    "Estimating mixture and Markov switching models by bridge sampling techniques",
    Frühwirth-Schnatter (2004); "Bayesian variable selection for logistic mixed model with
    bridge sampling", Overstall, Forster (2010); "A tutorial on bridge sampling", Gronau et al.
    (2017).

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_vharm import log_evidence
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
    ...         pyro.sample("x", dist.Normal(h.sum(-1), 1.0), obs=x)
    >>> x = torch.tensor([0.5, -3.0])
    >>> method = BridgeSampling(HamiltonianMonteCarlo(num_draws=100, num_warmup=100))
    >>> evidence = log_evidence(model, (x,), method=method, confirmation=None, progress=False)
    >>> exact = dist.Normal(0.0, 6**0.5).log_prob(x)
    >>> bool(((evidence.per_unit.values - exact).abs() < 0.2).all())
    True
    """

    draws: HamiltonianMonteCarlo = field(default_factory=HamiltonianMonteCarlo)
    num_proposals: int | None = None
    prior_share: float = 0.1
    tolerance: float = 1e-10
    max_iterations: int = 100

    def __post_init__(self) -> None:
        if not isinstance(self.draws, HamiltonianMonteCarlo):
            raise InputError(f"draws must be a HamiltonianMonteCarlo, not {self.draws!r}")
        if self.draws.num_draws < 16:
            raise InputError(
                f"draws must have at least 16 draws of each chain, not {self.draws.num_draws}: "
                "half of them fit the proposal"
            )
        if self.num_proposals is not None and self.num_proposals < 2:
            raise InputError(f"num_proposals must be at least 2, not {self.num_proposals}")
        if not 0 <= self.prior_share < 1:
            raise InputError(f"prior_share must lie in [0, 1), not {self.prior_share}")
        if not self.tolerance > 0:
            raise InputError(f"tolerance must be positive, not {self.tolerance}")
        if self.max_iterations < 1:
            raise InputError(f"max_iterations must be at least 1, not {self.max_iterations}")

    def run(
        self,
        densities: UnitDensities,
        *,
        start: StartDensity | None = None,
        progress: bool = False,
    ) -> Particles:
        """Estimate log p(v_u; θ) of every unit.

        Args:
            densities: the units.
            start: a proposal of one's own, in place of the one fitted to the first halves.
            progress: show a bar.

        Raises:
            InputError: if all latents are discrete.
        """
        blocks = self.draws.block_starts(densities)
        with tqdm(
            total=densities.num_units,
            desc="bridge",
            unit="unit",
            disable=not progress or None,
            delay=2,
            leave=False,
        ) as bar:
            return join_units(self._parts(blocks, start, bar.update), densities.num_units)

    def _parts(
        self, blocks: Blocks, proposal: StartDensity | None, report: Callable[[int], object]
    ) -> Iterator[tuple[Tensor, Particles]]:
        for units, block, first in blocks:
            own = None if proposal is None else proposal.select(units)
            yield units, self._bridge(block, self.draws.draw(block, first), own)
            report(len(units))

    def _bridge(
        self, densities: UnitDensities, chains: ChainDraws, proposal: StartDensity | None
    ) -> Particles:
        half = chains.latents.shape[1] // 2
        kept = chains.latents[:, half:]
        if proposal is None:
            gaussian = refine_gaussian(chains.metric, list(chains.latents[:, :half]))
            proposal = StartDensity(gaussian, self.prior_share)
        given = _log_ratios(densities, proposal, kept.flatten(0, 1))
        posterior = given.unflatten(0, kept.shape[:2])
        count = self.num_proposals or _PROPOSALS_PER_DRAW * len(given)
        drawn, dropped = drop_nonfinite(_drawn_log_ratios(densities, proposal, count))
        found = build_bridge(posterior, drawn, self.tolerance, self.max_iterations)
        evidence = UnitEstimates(
            values=found.log_evidence.to(given),
            mc_errors=found.error.to(given),
            kind=Kind.CONDITIONAL,
            systematic=found.missed.to(given),
        )
        run = chains.as_particles()
        return replace(run, log_evidence=evidence, num_nonfinite=run.num_nonfinite + dropped)


def _log_ratios(densities: UnitDensities, proposal: StartDensity, latents: Tensor) -> Tensor:
    """Log p(v, h; θ) − log q(h) at latents, shape ``(particle, unit)``."""
    parts = latents.split(_draws_per_pass(densities))
    return torch.cat([_log_ratio(densities, proposal, part) for part in parts])


def _drawn_log_ratios(densities: UnitDensities, proposal: StartDensity, count: int) -> Tensor:
    """The same at draws of the proposal, which are not kept."""
    most = _draws_per_pass(densities)
    sizes = [min(most, count - done) for done in range(0, count, most)]
    drawn = (proposal.sample(densities, size) for size in sizes)
    return torch.cat([_log_ratio(densities, proposal, part) for part in drawn])


def _draws_per_pass(densities: UnitDensities) -> int:
    return max(_ROWS_PER_PASS // densities.num_units, 2)


def _log_ratio(densities: UnitDensities, proposal: StartDensity, latents: Tensor) -> Tensor:
    with torch.no_grad():
        terms = densities.terms(latents)
        return terms.log_joint - proposal.log_prob(latents, terms.log_prior)


def build_bridge(
    posterior: Tensor, proposal: Tensor, tolerance: float = 1e-10, max_iterations: int = 100
) -> Bridge:
    """The optimal bridge between posterior draws and proposal draws, for many units at once.

    A first pass takes posterior draws for independent; the effective number of draws of its own
    series is that of the second.

    Args:
        posterior: log p(v, h; θ) − log q(h) at posterior draws, ``(chain, draw, unit)``.
        proposal: the same at draws of q, ``(particle, unit)``; −∞ where a draw has no density.
        tolerance: nats within which log Ẑ is found.
        max_iterations: most halvings.

    >>> noise = torch.randn(4, 250, 1, dtype=torch.float64)
    >>> ratios = torch.full_like(noise, -1.5)  # the proposal is the posterior itself
    >>> float(build_bridge(ratios, ratios.flatten(0, 1)).log_evidence)
    -1.5
    """
    posterior, proposal = posterior.double(), proposal.double()
    flat, shape = posterior.flatten(0, 1), posterior.shape[:2]
    counts = torch.full_like(flat[0], len(flat))
    for _ in range(2):
        offset = (counts / len(proposal)).log()
        value, resolved = _root(flat, proposal, offset, tolerance, max_iterations)
        series = torch.sigmoid(value - offset - flat)
        counts = mean_draws(series.unflatten(0, shape).permute(2, 0, 1)).clamp(1, len(flat))
    error = _relative_error(series, counts, torch.sigmoid(offset + proposal - value))
    error = torch.where(resolved, error, math.inf)
    found = Bridge(value, error, counts, torch.zeros_like(value))
    return found._replace(missed=_missed(flat, proposal, found))


def _root(
    posterior: Tensor, proposal: Tensor, offset: Tensor, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor]:
    """Where the two sums of the bridge equation meet, and whether within the tolerance.

    Their difference rises in log Ẑ; log Ẑ lies within the range of the log ratios, or below it
    where some are −∞.
    """
    share = len(proposal)
    finite = torch.isfinite(proposal)
    every = torch.cat([posterior, torch.where(finite, proposal, posterior[:1])])
    low = every.amin(0) - torch.where(finite.all(0), 0.0, _BEYOND)
    high = every.amax(0)
    for _ in range(max_iterations):
        if bool((high - low <= tolerance).all()):
            break
        middle = 0.5 * (low + high)
        of_posterior = torch.sigmoid(middle - offset - posterior).mean(0) * offset.exp() * share
        of_proposal = torch.sigmoid(offset + proposal - middle).sum(0)
        above = of_posterior > of_proposal
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    # rounding leaves no room between neighbouring numbers
    close = high - low <= torch.clamp(4e-16 * high.abs(), min=tolerance)
    return 0.5 * (low + high), close


def _relative_error(series: Tensor, counts: Tensor, proposed: Tensor) -> Tensor:
    """√(var(f₁) / (n₂ mean(f₁)²) + var(f₂) / (n₁ mean(f₂)²)); infinite where a mean is zero."""
    of_proposal = proposed.var(0) / (len(proposed) * proposed.mean(0).square())
    of_posterior = series.var(0) / (counts * series.mean(0).square())
    return (of_proposal + of_posterior).sqrt().nan_to_num(nan=math.inf, posinf=math.inf)


def _missed(posterior: Tensor, proposal: Tensor, found: Bridge) -> Tensor:
    """By how much importance sampling from q is above the bridge, where that is no chance.

    Either by standard errors, or because of ratios above all that posterior draws have: those of n
    draws leave 1/n of the posterior above them on average, so that by Markov's inequality q's
    draws put more than 1/(n α) there with probability α at most, however few they are.
    """
    apart = log_mean_exp(proposal) - found.log_evidence
    noise, _ = log_mean_exp_error(proposal)
    significant = apart > _SIGNIFICANT * torch.hypot(noise, found.error)
    highest = posterior.amax(0)
    rounding = 1e-9 * (1 + highest.abs())
    above = proposal.masked_fill(proposal <= highest + rounding, -math.inf)
    unseen = (log_mean_exp(above) - found.log_evidence).exp()
    significant = significant | (unseen * found.effective_draws * _FAILURE_RATE > 1)
    return torch.where(significant, torch.maximum(apart, unseen.log1p()), 0.0)
