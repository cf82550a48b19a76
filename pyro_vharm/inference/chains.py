"""Posterior draws of every unit by Hamiltonian chains, with R̂ and effective numbers of draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Kind
from pyro_vharm.inference.gaussians import UnitGaussian, match_gaussian
from pyro_vharm.inference.hamiltonian import HamiltonianKernel, HamiltonianMoves
from pyro_vharm.inference.path import PathState
from pyro_vharm.inference.start import Blocks, StartDensity, block_starts
from pyro_vharm.inference.tempering import first_step_sizes
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.particles import Particles, join_units

__all__ = [
    "ChainDraws",
    "Convergence",
    "HamiltonianMonteCarlo",
    "TunedChains",
    "convergence",
    "mean_draws",
    "refine_gaussian",
]

_ROWS_AT_ONCE = 2**13
_VALUES_PER_PASS = 2**21
_TAIL = 0.05
_WINDOWS = (0.15, 0.1, 0.15, 0.2, 0.25)  # shares of the warm-up; the rest tunes the last step size
_QUARTER_ORBIT = math.pi / 2


class Convergence(NamedTuple):
    """What draws of chains say of themselves.

    Attributes:
        rhat: R̂; 1 where chains agree with each other and with their own halves.
        sizes: effective number of draws.
    """

    rhat: Tensor
    sizes: Tensor


class TunedChains(NamedTuple):
    """Everything that the warm-up fixes before the draws that count.

    Attributes:
        moves: transitions of the units.
        state: where the chains are.
        step_size: shape ``(unit,)``.
        metric: Cholesky factors that whiten the moves, shape ``(unit, dim, dim)``.
    """

    moves: HamiltonianMoves
    state: PathState
    step_size: Tensor
    metric: Tensor


class ChainDraws(NamedTuple):
    """The draws that count.

    Attributes:
        latents: shape ``(chain, draw, unit, dim)``, unconstrained.
        log_joint: log p(v, h; θ) there, shape ``(chain, draw, unit)``.
        acceptance: mean acceptance probability, shape ``(unit,)``.
        metric: what whitened the moves, shape ``(unit, dim, dim)``.
        num_divergent: proposals whose energy was not finite, or so high that they could not be
            accepted.
    """

    latents: Tensor
    log_joint: Tensor
    acceptance: Tensor
    metric: Tensor
    num_divergent: int

    def as_particles(self) -> Particles:
        """One particle for each draw, chain by chain, with R̂ and effective number of draws."""
        flat = self.latents.flatten(0, 1)
        rhat, sizes = self._diagnose()
        return Particles(
            unconstrained=flat,
            log_weights=torch.zeros_like(flat[..., 0]),
            kind=Kind.CONDITIONAL,
            group_size=self.latents.shape[1],
            acceptance=self.acceptance,
            rhat=rhat,
            chain_sizes=sizes,
            num_nonfinite=self.num_divergent,
        )

    def _diagnose(self) -> Convergence:
        """Those of the worst latent of each unit; its log joint density counts as a latent."""
        series = torch.cat([self.latents, self.log_joint[..., None]], -1)
        num_units, num_series = series.shape[2:]
        found = convergence(series.permute(2, 3, 0, 1).flatten(0, 1))
        rhat, sizes = (one.unflatten(0, (num_units, num_series)) for one in found)
        return Convergence(rhat.amax(1).to(series), sizes.amin(1).to(series))


@dataclass(frozen=True)
class HamiltonianMonteCarlo:
    """Posterior draws by Hamiltonian chains, for all units at once.

    Chains leave p(h | v_u; θ) invariant, so their draws are the posterior's if, and only if, they
    reached it: every number from them is *conditional*. So that chains of a unit disagree where
    there is more than one mode, most start from the prior, far apart, and the others from the
    guide. The warm-up learns a covariance matrix per unit from growing windows of all its chains,
    and a step size; then both are frozen for the draws that count. In the coordinates of that
    matrix a Gaussian posterior is round, and a quarter of an orbit gives independent draws: no
    trajectory is longer than that, and the acceptance is above what is aimed at where the posterior
    is near Gaussian.

    A particle is a draw on the unconstrained scale, all of one chain before those of the next.
    R̂ and the effective number of draws of a unit are those of its worst latent, its log joint
    density counted as one; chains that stand still have R̂ = ∞ and none. `num_nonfinite` counts
    divergent proposals. There is no evidence from draws alone: see `BridgeSampling`.

    Args:
        num_chains: chains of each unit, at least 2. Chains are cheap, as they move together, and
            they are what finds that there are several modes: of two equal modes 8 chains find one
            only in one case of a hundred.
        num_draws: of each chain, that count.
        num_warmup: transitions of each chain before, at least 20.
        prior_share: share of the chains that start from the prior, in [0, 1].
        kernel: the transitions.

    Source: "MCMC using Hamiltonian dynamics", Neal (2011); "Rank-normalization, folding, and
    localization: an improved R̂ for assessing convergence of MCMC", Vehtari, Gelman, Simpson,
    Carpenter, Bürkner (2021).

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_vharm.model.problem import prepare
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         h = pyro.sample("h", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(h, 1.0), obs=x)
    >>> (densities,) = prepare(model, None, (torch.tensor([4.0, -1.0]),)).densities
    >>> draws = HamiltonianMonteCarlo(num_draws=100, num_warmup=100).run(densities)
    >>> bool((draws.unconstrained.mean(0).squeeze() - torch.tensor([2.0, -0.5])).abs().max() < 0.2)
    True
    """

    num_chains: int = 8
    num_draws: int = 250
    num_warmup: int = 400
    prior_share: float = 0.75
    kernel: HamiltonianKernel = field(
        default_factory=lambda: HamiltonianKernel(num_leapfrog=8, target_acceptance=0.8)
    )

    def __post_init__(self) -> None:
        for name, least in (("num_chains", 2), ("num_draws", 8), ("num_warmup", 20)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not 0 <= self.prior_share <= 1:
            raise InputError(f"prior_share must lie in [0, 1], not {self.prior_share}")

    def run(
        self,
        densities: UnitDensities,
        *,
        start: StartDensity | None = None,
        progress: bool = False,
    ) -> Particles:
        """Draw from p(h | v_u; θ) for every unit.

        Args:
            densities: the units.
            start: what the chains start from; by default matched to guide draws.
            progress: show a bar.

        Raises:
            InputError: if all latents are discrete.
        """
        blocks = self.block_starts(densities, start)
        with tqdm(
            total=densities.num_units,
            desc="chains",
            unit="unit",
            disable=not progress or None,
            delay=2,
            leave=False,
        ) as bar:
            return join_units(self._parts(blocks, bar.update), densities.num_units)

    def _parts(
        self, blocks: Blocks, report: Callable[[int], object]
    ) -> Iterator[tuple[Tensor, Particles]]:
        for units, block, start in blocks:
            yield units, self.draw(block, start).as_particles()
            report(len(units))

    def block_starts(self, densities: UnitDensities, start: StartDensity | None = None) -> Blocks:
        """The units that are moved together, and what their chains start from.

        Args:
            densities: all units.
            start: what chains start from; by default matched to guide draws.

        Raises:
            InputError: if all latents are discrete.
        """
        if densities.dim == 0:
            raise InputError(
                "all latents are discrete and are summed out, so there is nothing to draw; "
                "use log_evidence"
            )
        size = max(_ROWS_AT_ONCE // self.num_chains, 1)
        return block_starts(densities, size, self.prior_share, start)

    def draw(self, densities: UnitDensities, start: StartDensity) -> ChainDraws:
        """Warm up, freeze, and draw, for all these units together."""
        moves, state, step_size, metric = self.warm_up(densities, start)
        one, acceptance = torch.ones_like(step_size), torch.zeros_like(step_size)
        own = moves.path.metric(metric)
        latents, log_joint, num_divergent = [], [], 0
        for _ in range(self.num_draws):
            state, accepted = moves(state, one, step_size, own)
            latents.append(moves.latents(state))
            log_joint.append(state.log_joint)
            acceptance = acceptance + accepted.mean(0) / self.num_draws
            num_divergent += int((accepted == 0).sum())
        draws = torch.stack(latents, 1), torch.stack(log_joint, 1)
        return ChainDraws(*draws, acceptance, metric, num_divergent)

    def warm_up(self, densities: UnitDensities, start: StartDensity) -> TunedChains:
        """Carry chains from far apart to the posterior, and tune their moves on the way."""
        ahead = self.num_warmup + self.num_draws
        plain = replace(start, prior_share=0.0)  # the other end of a path that is not walked
        moves = self.kernel.moves(densities, plain, self.num_chains, ahead, own_metric=True)
        state = moves.at(self._first(densities, start)).where_defined()
        step_size, metric = first_step_sizes(state), start.gaussian.scale_tril
        lengths = [max(int(share * self.num_warmup), 2) for share in _WINDOWS]
        for i, length in enumerate(lengths):
            draws, own = [], moves.path.metric(metric)
            for _ in range(length):
                state, accepted = moves(state, torch.ones_like(step_size), step_size, own)
                # the chain that lags sets the pace at first, so that none is left behind
                pace = accepted.amin(0) if i == 0 else accepted.mean(0)
                step_size = step_size * (pace - self.kernel.target_acceptance).exp()
                draws.append(moves.latents(state))
            metric = refine_gaussian(metric, draws).scale_tril
        return self._settle(moves, state, step_size, metric, self.num_warmup - sum(lengths))

    def _first(self, densities: UnitDensities, start: StartDensity) -> Tensor:
        """Where the chains start: as near as can be the share of prior, not one at random."""
        if start.prior_share in (0.0, 1.0):
            return start.sample(densities, self.num_chains)
        wanted = round(start.prior_share * self.num_chains)
        num_prior = min(max(wanted, 1), self.num_chains - 1)
        with torch.no_grad():
            prior = densities.draw_prior(num_prior)
        return torch.cat([prior, start.gaussian.sample(self.num_chains - num_prior)])

    def _settle(
        self,
        moves: HamiltonianMoves,
        state: PathState,
        step_size: Tensor,
        metric: Tensor,
        num_steps: int,
    ) -> TunedChains:
        """Tune the step size for the last metric by stochastic approximation, averaged."""
        one, longest = torch.ones_like(step_size), _QUARTER_ORBIT / self.kernel.num_leapfrog
        logs, own = [], moves.path.metric(metric)
        for i in range(num_steps):
            state, accepted = moves(state, one, step_size, own)
            pull = accepted.mean(0) - self.kernel.target_acceptance
            step_size = (step_size * (pull * (1 + i / 5) ** -0.5).exp()).clamp(max=longest)
            logs.append(step_size.log())
        return TunedChains(moves, state, torch.stack(logs[num_steps // 2 :]).mean(0).exp(), metric)


def refine_gaussian(metric: Tensor, draws: Sequence[Tensor]) -> UnitGaussian:
    """Match a Gaussian to draws, its covariance shrunk toward the metric they were made with.

    In that metric's coordinates correlations are shrunk toward 0, so that window by window narrow
    directions are found that would be shrunk away in the latents' own coordinates.

    Args:
        metric: Cholesky factors, shape ``(unit, dim, dim)``.
        draws: tensors of shape ``(particle, unit, dim)``.
    """
    outer = UnitGaussian(draws[-1].mean(0), metric)
    inner = match_gaussian(*(outer.whiten(part) for part in draws))
    return UnitGaussian(outer.unwhiten(inner.mean[None])[0], metric @ inner.scale_tril)


def convergence(series: Tensor) -> Convergence:
    """Rank-normalised split R̂ and effective number of draws of many series at once.

    R̂ is that of the bulk or of the distance from the median, whichever is larger; the number of
    draws that of the bulk or of the tails beyond 5 %, whichever is less. A series that does not
    move has R̂ = ∞ and no draws. These are ArviZ's numbers, to rounding, all series at once
    instead of one by one, in an eighth of the time.

    Args:
        series: shape ``(series, chain, draw)``.

    Source: "Rank-normalization, folding, and localization: an improved R̂ for assessing
    convergence of MCMC", Vehtari, Gelman, Simpson, Carpenter, Bürkner (2021).

    >>> stuck = torch.tensor([1.0, 2.0])[:, None].expand(2, 50)
    >>> float(convergence(torch.stack([torch.randn(2, 50), stuck])).sizes[1])
    0.0
    """
    per_pass = max(_VALUES_PER_PASS // series[0].numel(), 1)
    parts = [_convergence(part.double()) for part in series.split(per_pass)]
    return Convergence(*(torch.cat(found) for found in zip(*parts, strict=True)))


def mean_draws(series: Tensor) -> Tensor:
    """Effective number of draws for the mean of a series, shape ``(series,)``.

    N / τ with τ = 1 + 2 Σ_t ρ_t over Geyer's initial monotone sequence, where ρ_t counts the
    variance between chains, and each half of a chain is a chain. N for a constant series.

    Args:
        series: shape ``(series, chain, draw)``.

    Source: "Practical Markov chain Monte Carlo", Geyer (1992).

    >>> int(mean_draws(torch.zeros(1, 2, 50)))
    100
    """
    return _mean_draws(_split(series))


def _convergence(series: Tensor) -> Convergence:
    split = _split(series)
    flat = split.flatten(1)
    ordered, order = flat.sort(1)
    scores = _normal_scores(ordered, order).view_as(split)
    middle = flat.shape[1] // 2
    median = (ordered[:, middle - 1] + ordered[:, middle]) / 2
    distance = (flat - median[:, None]).abs()
    folded = _normal_scores(*distance.sort(1)).view_as(split)
    rhat = torch.maximum(_potential_reduction(scores), _potential_reduction(folded))
    sizes = [_mean_draws(scores)]
    quantiles = series.flatten(1).quantile(series.new_tensor([_TAIL, 1 - _TAIL]), 1)
    sizes += [_mean_draws(_split((series <= q[:, None, None]).double())) for q in quantiles]
    size = torch.stack(sizes).amin(0)
    stuck = (ordered[:, 0] == ordered[:, -1]) | ~torch.isfinite(rhat)
    return Convergence(rhat.masked_fill(stuck, math.inf), size.masked_fill(stuck, 0.0))


def _potential_reduction(split: Tensor) -> Tensor:
    """√((B/W + n − 1) / n), where B is n times the variance of the chains' means."""
    count = split.shape[-1]
    between = count * split.mean(-1).var(-1)
    return ((between / split.var(-1).mean(-1) + count - 1) / count).sqrt()


def _split(series: Tensor) -> Tensor:
    """Each chain's halves as two chains."""
    half = series.shape[-1] // 2
    return torch.cat([series[..., :half], series[..., -half:]], -2)


def _normal_scores(ordered: Tensor, order: Tensor) -> Tensor:
    """Φ⁻¹((r − ⅜) / (N + ¼)) of ranks r among all N values of a row, ties averaged."""
    count = ordered.shape[1]
    place = torch.arange(count, device=order.device).expand_as(order)
    rises = ordered[:, 1:] != ordered[:, :-1]
    edge = torch.ones_like(rises[:, :1])
    first = torch.where(torch.cat([edge, rises], 1), place, 0).cummax(1).values
    final = torch.where(torch.cat([rises, edge], 1), place, count).flip(1).cummin(1).values.flip(1)
    ranks = torch.arange(2 * count, dtype=ordered.dtype, device=order.device) / 2 + 1
    scores = torch.special.ndtri((ranks - 3 / 8) / (count + 1 / 4))
    placed: Tensor = torch.empty_like(ordered).scatter_(1, order, scores[first + final])
    return placed


def _mean_draws(split: Tensor) -> Tensor:
    num_chains, count = split.shape[1:]
    covariance = _autocovariance(split)
    within = covariance[:, 0] * count / (count - 1)
    total = covariance[:, 0] + split.mean(-1).var(-1)
    correlation = 1 - (within[:, None] - covariance) / total[:, None]
    correlation[:, 0] = 1.0
    last = (count - 3) // 2  # the last pair of lags that is looked at
    pairs = correlation[:, : 2 * last + 2].unflatten(1, (-1, 2)).sum(-1)
    positive = (pairs > 0).long().cumprod(1)
    positive[:, last] = 0
    kept = (pairs.cummin(1).values * positive).sum(1)
    next_one = correlation.gather(1, 2 * positive.sum(1, keepdim=True))[:, 0]
    time = -1 + 2 * kept + next_one.clamp(min=0.0)
    size = num_chains * count
    found: Tensor = size / time.clamp(min=1 / math.log10(size))
    constant = split.flatten(1).amax(1) == split.flatten(1).amin(1)
    return found.masked_fill(constant, size)


def _autocovariance(split: Tensor) -> Tensor:
    """Mean over chains of Σ_s x_s x_{s+t} / n, centred in each chain, for every lag t."""
    count = split.shape[-1]
    spectrum = torch.fft.rfft(split - split.mean(-1, keepdim=True), 2 * count)
    power = (spectrum.real.square() + spectrum.imag.square()).mean(1)
    covariance: Tensor = torch.fft.irfft(power, 2 * count)
    return covariance[:, :count] / count
