"""Learning by Markov chain EM: θ by Fisher's identity, the guide by the inclusive KL."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Kind, UnitEstimates
from pyro_vharm.inference.gaussians import match_gaussian
from pyro_vharm.inference.hamiltonian import HamiltonianKernel, HamiltonianMoves
from pyro_vharm.inference.path import PathState
from pyro_vharm.inference.start import StartDensity
from pyro_vharm.inference.tempering import first_step_sizes, tune_step
from pyro_vharm.model.compilation import batch_signature
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.guide_at_latents import GuideReading, read_guide
from pyro_vharm.model.parameters import capture_parameters
from pyro_vharm.objectives.chain_starts import GuideChains, KeptChains, PersistentChains
from pyro_vharm.objectives.importance_weighted import importance_weighted_bound
from pyro_vharm.objectives.objective import Side, UnitObjective, UnitTerms

__all__ = ["MarkovChainEM"]

_DRAWS, _DRAWS_PER_DIM = 32, 2  # of the guide, for the metric
_TUNING_MOVES, _ELBO_DRAWS = 20, 8
_MOST_SHAPES = 16
_GAIN = 0.5  # of the step size, from call to call
_DEFAULT_KERNEL = HamiltonianKernel()
_DEFAULT_CHAINS = GuideChains()


class _Particles(NamedTuple):
    """Where the chains of one call ended.

    Attributes:
        latents: shape ``(particle, unit, dim)``.
        log_joint: log p(v, h; θ) there as the transitions saw it, ``(particle, unit)``.
        acceptance: mean acceptance probabilities, shape ``(unit,)``.
    """

    latents: Tensor
    log_joint: Tensor
    acceptance: Tensor


@dataclass
class _Carried:
    """What goes on from call to call for one model and guide."""

    reading: GuideReading | None
    step_size: float = math.nan
    moves: dict[Hashable, HamiltonianMoves] = field(default_factory=dict)
    kept: KeptChains | None = None


class MarkovChainEM(UnitObjective):
    """EM with a Markov chain for its E-step, for `SVI` or as a loss module.

    Each unit's particles are carried by Hamiltonian transitions that leave p(h | v; θ) invariant,
    from draws of the guide or from where its own persistent chains were. At the particles,

    - ∇_θ is the mean of ∇_θ log p(v_u, h; θ), the score by Fisher's identity if they are posterior
      draws;
    - ∇_φ is the mean of ∇_φ log q(h), which lowers the inclusive KL(p(h | v; θ) ‖ q).

    The loss is the negative sum of log p(v, h; θ) + log q(h) over units, averaged over particles:
    no bound on anything, so it may rise while the model gets better. `latest` holds
    E_{p(h|v)}[log p(v, h; θ) − log q(h)] = log p(v; θ) + KL(p(h | v; θ) ‖ q) per unit, an upper
    bound on log p(v; θ) *conditional* on the chains having reached the posterior, with the
    acceptance of the transitions. With more transitions the gradient for θ comes as near the exact
    score as one likes, whatever the guide.

    The metric of the transitions is the covariance of the guide's draws; their step size is tuned
    at the first call, and adjusted from call to call. Where the guide's draws cannot be read off
    latents (AutoStructured, discrete sites in the guide), so that log q cannot be had at the
    particles, φ ascends the ELBO instead, which then stands in the loss and in `latest`, as a
    lower bound.

    Args:
        num_particles: chains per unit.
        num_transitions: of each chain at each step.
        chains: where they start: `GuideChains` or `PersistentChains`.
        kernel: the transitions.
        steps_ahead: training steps for which it decides whether compiling a transition pays.
        unit_plate: name of the plate of independent units; found if left out.

    Raises:
        InputError: on the first call, if all latents are discrete (use `ExactEvidence`), the guide
            has no density, or shares parameters with the model: ∇_θ would not be the score.

    Source: "Ascent-based Monte Carlo expectation-maximization", Caffo, Jank, Jones (2005);
    "Markovian Score Climbing: Variational Inference with KL(p||q)", Naesseth, Lindsten, Blei
    (2020).

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro.infer import SVI
    >>> def model(x):
    ...     scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    ...     with pyro.plate("data", len(x)):
    ...         h = pyro.sample("h", dist.Normal(0.0, scale))
    ...         pyro.sample("x", dist.Normal(h, 1.0), obs=x)
    >>> def guide(x):
    ...     slope = pyro.param("slope", torch.tensor(0.5))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("h", dist.Normal(slope * x, 0.7))
    >>> objective = MarkovChainEM(4)
    >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), objective)
    >>> isinstance(svi.step(torch.tensor([1.0, -2.0])), float)
    True
    >>> objective.latest.side, bool((objective.latest.acceptance > 0.3).all())
    ('upper', True)
    """

    side = "upper"
    shares_parameters = False

    def __init__(
        self,
        num_particles: int = 8,
        *,
        num_transitions: int = 5,
        chains: GuideChains | PersistentChains = _DEFAULT_CHAINS,
        kernel: HamiltonianKernel = _DEFAULT_KERNEL,
        steps_ahead: int = 1000,
        unit_plate: str | None = None,
    ) -> None:
        for name, value in (("num_transitions", num_transitions), ("steps_ahead", steps_ahead)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        self._carried: dict[Hashable, _Carried]
        super().__init__(num_particles=num_particles, unit_plate=unit_plate)
        self.num_transitions = num_transitions
        self.chains = chains
        self.kernel = kernel
        self.steps_ahead = steps_ahead

    @property
    def title(self) -> str:
        """What it is, for tables."""
        return f"Markov chain EM, {self.num_particles} × {self.num_transitions}"

    def forget(self) -> None:
        """Drop chains, step sizes and graphs as well."""
        super().forget()
        self._carried = {}
        self._resumed: Mapping[str, Any] = {}

    def carried(self) -> dict[str, Any]:
        """Step size and chains of the one model and guide that are trained."""
        if not self._carried:
            return dict(self._resumed)
        (only,) = self._carried.values()
        return {"step_size": only.step_size, "kept": None if only.kept is None else [*only.kept]}

    def carry(self, carried: Mapping[str, Any]) -> None:
        """Start the next model and guide with that step size, and those chains."""
        self._resumed = carried

    def check(self, densities: UnitDensities) -> None:
        """Refuse a model without continuous latents, as well."""
        super().check(densities)
        if densities.dim == 0:
            raise InputError(
                "all latents are discrete, so there is nothing for Hamiltonian chains to move; use "
                "ExactEvidence(), which sums them out"
            )

    def evaluate(self, densities: UnitDensities) -> UnitTerms:
        """Move the particles of a batch of units, and weigh model and guide there."""
        key = (densities.model, densities.guide)
        if key not in self._carried:
            self._carried[key] = self._begin(densities)
        carried = self._carried[key]
        particles = self._move(densities, carried)
        fitted = _fit(densities, particles.latents, carried.reading)
        if not _agree(particles.log_joint, fitted.log_joint):
            carried.moves.clear()  # the model closes over something that changed since the trace
            carried.step_size = math.nan
            particles = self._move(densities, carried)
            fitted = _fit(densities, particles.latents, carried.reading)
        carried.kept = self.chains.keep(densities, particles.latents, carried.kept)
        loss = -(fitted.log_joint.mean(0).sum() + fitted.guide_score)
        return UnitTerms(fitted.per_unit, loss, fitted.scale, particles.acceptance, fitted.side)

    def _begin(self, densities: UnitDensities) -> _Carried:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            carried = _Carried(read_guide(densities))
        if self._resumed:
            carried.step_size = self._resumed["step_size"]
            kept = self._resumed["kept"]
            carried.kept = None if kept is None else KeptChains(*kept)
        return carried

    def _move(self, densities: UnitDensities, carried: _Carried) -> _Particles:
        count = max(_DRAWS + _DRAWS_PER_DIM * densities.dim, self.num_particles)
        with torch.no_grad():
            draws = densities.draw_latents(count)
            start = StartDensity(match_gaussian(draws), 0.0)
            moves = self._moves(densities, start, carried)
            first = self.chains.begin(densities, draws[: self.num_particles], carried.kept)
            state = moves.at(first)
            if math.isnan(carried.step_size):
                carried.step_size = _tune(moves, state)
            one = torch.ones_like(state.log_joint[0])
            acceptance = torch.zeros_like(one)
            for _ in range(self.num_transitions):
                state, accepted = moves(state, one, carried.step_size * one)
                acceptance = acceptance + accepted.mean(0) / self.num_transitions
            latents = moves.latents(state)
        pull = float(acceptance.mean()) - self.kernel.target_acceptance
        carried.step_size *= math.exp(_GAIN * pull)
        return _Particles(latents, state.log_joint, acceptance)

    def _moves(
        self, densities: UnitDensities, start: StartDensity, carried: _Carried
    ) -> HamiltonianMoves:
        key = (batch_signature(densities.batch), densities.num_units)
        if key not in carried.moves:
            if len(carried.moves) == _MOST_SHAPES:
                carried.moves.clear()
            ahead = self.num_transitions * self.steps_ahead
            carried.moves[key] = self.kernel.moves(densities, start, self.num_particles, ahead)
        return carried.moves[key].on(densities, start)


def _tune(moves: HamiltonianMoves, state: PathState) -> float:
    """A step size for all units, from moves that are thrown away."""
    step_size, one = first_step_sizes(state), torch.ones_like(state.log_joint[0])
    for _ in range(_TUNING_MOVES):
        state, step_size = tune_step(moves, state, one, step_size)
    return float(step_size.median())


class _Fitted(NamedTuple):
    """Model and guide at the particles.

    Attributes:
        per_unit: E_{p(h|v)}[log p − log q], or the ELBO.
        side: which side of log p(v; θ) that is on.
        log_joint: log p(v, h; θ), differentiable in θ, ``(particle, unit)``.
        guide_score: a scalar that φ ascends: Σ_u E_{p(h|v)}[log q], or the ELBO.
        scale: the factor from subsampling.
    """

    per_unit: UnitEstimates
    side: Side
    log_joint: Tensor
    guide_score: Tensor
    scale: float


def _fit(densities: UnitDensities, latents: Tensor, reading: GuideReading | None) -> _Fitted:
    if reading is None:
        return _fit_apart(densities, latents)
    at = reading(densities, latents)
    log_joint = at.log_joint.detach()
    if at.log_guide.shape[1] == 1:
        log_joint = log_joint.sum(1, keepdim=True)
    log_weights = log_joint - at.log_guide.detach()
    per_unit = UnitEstimates(
        values=log_weights.mean(0),
        mc_errors=_mean_error(log_weights),
        kind=Kind.CONDITIONAL,
        units_each=densities.num_units // log_weights.shape[1],
    )
    return _Fitted(per_unit, "upper", at.log_joint, at.log_guide.mean(0).sum(), at.scale)


def _fit_apart(densities: UnitDensities, latents: Tensor) -> _Fitted:
    """θ at the particles, φ by the ELBO: for a guide whose draws cannot be read off latents."""
    at = densities.run_at(latents)
    bound = importance_weighted_bound(densities, 1, _ELBO_DRAWS)
    score = -bound.loss.detach()
    if torch.is_grad_enabled():
        assert densities.guide is not None, "it has a density"
        leaves = capture_parameters(densities.guide, densities.batch).trainable()
        found = torch.autograd.grad(bound.loss, leaves, allow_unused=True)
        pairs = [(leaf, g) for leaf, g in zip(leaves, found, strict=True) if g is not None]
        slope = sum(((leaf * g).sum() for leaf, g in pairs), start=torch.zeros_like(score))
        score = score + slope.detach() - slope
    log_joint = densities.counted(at.log_joint)
    return _Fitted(bound.per_unit, "lower", log_joint, score, at.scale)


def _mean_error(values: Tensor) -> Tensor:
    """Standard error of the mean over particles; ∞ for one."""
    if len(values) == 1:
        return torch.full_like(values[0], math.inf)
    error: Tensor = values.std(0) / len(values) ** 0.5
    return error


def _agree(first: Tensor, second: Tensor) -> bool:
    tolerance = 1e4 * torch.finfo(first.dtype).eps
    return torch.allclose(first, second.detach(), rtol=tolerance, atol=tolerance, equal_nan=True)
