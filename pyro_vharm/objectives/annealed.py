"""Annealed importance sampling with uncorrected Hamiltonian steps, as a Pyro ELBO."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Kind, UnitEstimates
from pyro_vharm.inference.gaussians import UnitGaussian, match_gaussian
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.guide_at_latents import GuideReading, PairAtLatents, read_guide
from pyro_vharm.model.guide_runs import run_guide
from pyro_vharm.model.structure import Structure
from pyro_vharm.objectives.objective import UnitObjective, UnitTerms
from pyro_vharm.particles import log_mean_exp, log_mean_exp_error

__all__ = ["AnnealedELBO"]

_DRAWS, _DRAWS_PER_DIM = 100, 10
_METRIC_DRAWS, _METRIC_DRAWS_PER_DIM = 50, 2
_ELEMENTS_PER_PASS = 2**22
_MOST_READINGS = 64


class AnnealedELBO(UnitObjective):
    """Lower bound by annealing from the guide to p(v, h; θ), for `SVI` or as a loss module.

    Each particle starts at h_0 ~ f_0, with f_0 the guide, and a momentum r_0 ~ N(0, I). Step
    t = 1 … T moves it along log f_β = (1 − β) log f_0 + β log p(v, h; θ) at β = β_t, whitened by
    L, the Cholesky factor of the guide's covariance in each unit:

        h ← h_{t−1} + ½ε_t L r_{t−1},  r̂_t = r_{t−1} + ε_t Lᵀ ∇log f_{β_t}(h),
        h_t = h + ½ε_t L r̂_t,         r_t = η r̂_t + √(1 − η²) ξ_t  with  ξ_t ~ N(0, I).

    There is no accept-reject test, so all of it is differentiable. The weight is

        w = p(v, h_T; θ) / f_0(h_0) · Π_t N(r̂_t; 0, I) / N(r_{t−1}; 0, I),

    and the loss is minus the sum over units of E[log (1/K) Σ_k w_k] ≤ log p(v; θ), in nats.

    E[w] = p(v; θ) for any β_t, ε_t, η and L. Each step is made of shears, so it is a bijection
    that keeps volume, and a forward run has the density f_0(h_0) N(r_0) Π_t N(r_t; ηr̂_t,
    (1 − η²)I). A backward run begins at a posterior draw h_T with r̂_T ~ N(0, I), takes the steps
    back, and draws r̂_t ~ N(ηr_t, (1 − η²)I). Refreshment is reversible, N(r̂) N(r; ηr̂, ·) =
    N(r) N(r̂; ηr, ·), so that its density over that of the forward run is w / p(v; θ), and a
    ratio of densities has mean 1. It is less where f_0 leaves out a part of the posterior, which
    keeps the bound's side.

    The guide is the start density itself where its density can be had at latents that it did not
    draw. Otherwise (AutoStructured, guides with masks) f_0 is a Gaussian for each
    unit with the mean and covariance of guide draws, and its own noise. These draws, and those that
    L comes from, are made anew at each evaluation, independently of the particles: given them, f_0
    and L are fixed, so E[w] = p(v; θ) holds conditionally on them, and the bound with it. The
    gradient is pathwise through all of it, moments included: that of the value itself.

    The β_t, ε_t and η are learned with θ and φ. They are in Pyro's param store, as
    ``"<name>.increments"`` (T + 1 that sum to 1, of which the first t sum to β_t),
    ``"<name>.step_sizes"`` (T) and ``"<name>.damping"``. `SVI` steps them like any other. For a
    torch optimizer, evaluate the loss once and add `parameters`::

        loss = objective(model, guide)
        loss(x)
        torch.optim.Adam([*loss.parameters(), *objective.parameters()])

    Each unit has K weights of its own, multiplied by the plate's scale outside the logarithm; where
    log q can be had in total only (AutoMultivariateNormal), all units are one joint unit. A weight
    that is not finite counts as zero, which keeps the bound's side. Masked-out latents count with
    their prior, so the guide is trained to put them there.

    Args:
        num_particles: K, annealed particles inside the logarithm.
        num_steps: T, one gradient of the model each, kept for the backward pass. Without any, the
            weights are importance weights.
        step_size: ε_t to begin with, in the guide's standard deviations; less than 2 where the
            posterior is as wide as the guide, and less in proportion where it is narrower.
        damping: η to begin with, the part of the momentum that lasts from step to step, in (0, 1).
        name: of its parameters. Objectives of the same name share them.
        unit_plate: name of the plate of independent units. Left out, it is the outermost plate
            that holds every site; without one, the weights are those of the whole data set.

    Raises:
        InputError: on the first call, if the guide has no density, draws a site that cannot be
            reparameterised, or there are no continuous latents.

    Source: "Differentiable Annealed Importance Sampling and the Perils of Gradient Noise", Zhang,
    Hsu, Li, Finn, Grosse (2021); "MCMC Variational Inference via Uncorrected Hamiltonian
    Annealing", Geffner, Domke (2021).

    >>> import pyro.distributions as dist
    >>> from pyro.infer import SVI
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x):
    ...     scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    ...     with pyro.plate("data", len(x)):
    ...         h = pyro.sample("h", dist.Normal(0.0, scale))
    ...         pyro.sample("x", dist.Normal(h, 1.0), obs=x)
    >>> objective = AnnealedELBO(4, num_steps=3)
    >>> svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), objective)
    >>> isinstance(svi.step(torch.tensor([1.0, -2.0])), float)
    True
    >>> [tuple(leaf.shape) for leaf in objective.parameters()]
    [(4,), (3,), ()]
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        num_steps: int = 10,
        step_size: float = 0.3,
        damping: float = 0.9,
        name: str = "annealed_elbo",
        unit_plate: str | None = None,
    ) -> None:
        self._readings: dict[int, tuple[Structure, GuideReading | None]]
        super().__init__(num_particles=num_particles, unit_plate=unit_plate)
        if num_steps < 0:
            raise InputError(f"num_steps must not be negative, got {num_steps}")
        if not 0 < step_size < math.inf:
            raise InputError(f"step_size must be positive, not {step_size}")
        if not 0 < damping < 1:
            raise InputError(f"damping must lie in (0, 1), not {damping}")
        self.num_steps = num_steps
        self.step_size = step_size
        self.damping = damping
        self.name = name

    @property
    def title(self) -> str:
        """What it is, for tables."""
        return f"annealed bound, {self.num_particles} × {self.num_steps}"

    def forget(self) -> None:
        """Drop what is known of guides as well; the path stays in Pyro's param store."""
        super().forget()
        self._readings = {}

    def check(self, densities: UnitDensities) -> None:
        """Refuse latents that cannot be moved, and guides whose draws have no gradient."""
        super().check(densities)
        if densities.dim == 0:
            raise InputError(
                "AnnealedELBO moves continuous latents, and all of these are discrete: use "
                "ExactEvidence, which sums them out"
            )
        assert densities.guide is not None, "it has a density"
        with torch.no_grad(), _random_numbers_put_back():
            run = run_guide(densities.guide, densities.batch, densities.structure, 2)
        if run.irreproducible:
            raise InputError(
                f"the guide draws {list(run.irreproducible)}, which cannot be reparameterised, so "
                "the way from their draws to the weights has no gradient; leave discrete latents "
                "out of the guide, so that they are summed out, or use ImportanceWeightedELBO"
            )

    def evaluate(self, densities: UnitDensities) -> UnitTerms:
        """The bound of each unit, from fresh runs along the path."""
        path, run = self._path(densities), self._launch(densities)
        log_weights, scale = _anneal(densities, run, path)
        lost = _is_lost(log_weights.detach())
        if bool(lost.any()):
            log_weights, _ = _anneal(densities, run.without(lost), path)
            log_weights = log_weights.masked_fill(lost, -math.inf)
        values = log_mean_exp(log_weights)
        per_unit = UnitEstimates(
            values=values.detach(),
            mc_errors=log_mean_exp_error(log_weights.detach())[0],
            kind=Kind.ESTIMATED,
            units_each=densities.num_units // len(values),
        )
        return UnitTerms(per_unit, -values.sum(), scale)

    def parameters(self) -> list[Tensor]:
        """The unconstrained increments of β, step sizes and damping, for a torch optimizer.

        Raises:
            InputError: before the first evaluation, which creates them.
        """
        if not all(name in pyro.get_param_store() for name in self._names):
            raise InputError(
                f"the parameters of {self.name!r} are created when the loss is first evaluated; "
                "call it once before objective.parameters()"
            )
        return [pyro.param(name).unconstrained() for name in self._names]

    def leaves(self, densities: UnitDensities) -> list[Tensor]:
        """The same, created if they are not there yet."""
        self._path(densities)
        return self.parameters()

    def carried(self) -> dict[str, Any]:
        """Their values."""
        return {"path": [leaf.detach().clone() for leaf in self.parameters()]}

    def carry(self, carried: Mapping[str, Any]) -> None:
        """Set them to such values, in place."""
        with torch.no_grad():
            for leaf, value in zip(self.parameters(), carried["path"], strict=True):
                leaf.copy_(value)

    @property
    def _names(self) -> list[str]:
        return [f"{self.name}.{part}" for part in ("increments", "step_sizes", "damping")]

    def _path(self, densities: UnitDensities) -> _Path:
        like = torch.empty((), dtype=densities.dtype, device=densities.device)
        count = self.num_steps

        def learned(part: str, init: Tensor, constraint: constraints.Constraint) -> Tensor:
            value: Tensor = pyro.param(f"{self.name}.{part}", init, constraint=constraint)
            if value.shape != init.shape:
                raise InputError(
                    f"the param store holds {self.name}.{part} of shape {tuple(value.shape)}, and "
                    f"num_steps={count} needs {tuple(init.shape)}; give objectives with different "
                    "num_steps different names (name=...)"
                )
            return value.to(like)

        increments = like.new_full((count + 1,), 1 / (count + 1))
        step_sizes = like.new_full((count,), self.step_size)
        damping = like.new_tensor(self.damping)
        return _Path(
            temperatures=learned("increments", increments, constraints.simplex).cumsum(0)[:-1],
            step_sizes=learned("step_sizes", step_sizes, constraints.positive),
            damping=learned("damping", damping, constraints.unit_interval),
        )

    def _launch(self, densities: UnitDensities) -> _Launch:
        reading = self._reading(densities)
        if reading is None:
            gaussian = _match(densities, _DRAWS + _DRAWS_PER_DIM * densities.dim)
            ends = functools.partial(_gaussian_ends, densities, gaussian)
            latents = gaussian.sample(self.num_particles)
            log_start, metric = gaussian.log_prob(latents), gaussian.scale_tril
        else:
            drawn = densities.draw_guide(self.num_particles)
            ends = functools.partial(reading, densities)
            latents, log_start = drawn.latents, drawn.log_proposal
            own = _METRIC_DRAWS + _METRIC_DRAWS_PER_DIM * densities.dim
            metric = _match(densities, own).scale_tril
        noise = torch.randn(
            self.num_steps, *latents.shape, dtype=latents.dtype, device=latents.device
        )
        return _Launch(ends, metric, latents, log_start, noise)

    def _reading(self, densities: UnitDensities) -> GuideReading | None:
        """How to read the guide at moved latents, found once for a model and guide."""
        key = id(densities.structure)  # which stays its own as long as it is kept here
        if key not in self._readings:
            if len(self._readings) == _MOST_READINGS:
                del self._readings[next(iter(self._readings))]
            with _random_numbers_put_back():
                self._readings[key] = densities.structure, read_guide(densities)
        return self._readings[key][1]


class _Path(NamedTuple):
    """What is learned about the path.

    Attributes:
        temperatures: 0 < β_1 < … < β_T < 1, shape ``(step,)``.
        step_sizes: ε_t, shape ``(step,)``.
        damping: η, a scalar.
    """

    temperatures: Tensor
    step_sizes: Tensor
    damping: Tensor


class _Launch(NamedTuple):
    """Everything random about a run, drawn before it.

    Attributes:
        ends: log f_0 and log p(v, h; θ) at given latents.
        metric: L, shape ``(unit, dim, dim)``; independent of what follows.
        latents: h_0, shape ``(particle, unit, dim)``.
        log_start: log f_0(h_0), shape ``(particle, unit)``, or ``(particle, 1)`` for a joint unit.
        noise: r_0 and ξ_1 … ξ_{T−1}, shape ``(step, particle, unit, dim)``.
    """

    ends: Callable[[Tensor], PairAtLatents]
    metric: Tensor
    latents: Tensor
    log_start: Tensor
    noise: Tensor

    def without(self, lost: Tensor) -> _Launch:
        """The same with lost particles, a mask like `log_start`, in the place of another one."""
        every = torch.arange(len(lost), device=lost.device)[:, None]
        index = torch.where(lost, (~lost).int().argmax(0), every)
        at = index[..., None].expand_as(self.latents)
        return self._replace(
            latents=self.latents.gather(0, at),
            log_start=self.log_start.gather(0, index),
            noise=self.noise.gather(1, at.expand_as(self.noise)),
        )

    def pooled(self, per_unit: Tensor) -> Tensor:
        """``(particle, unit)`` as one value for all units, where `log_start` is one."""
        return per_unit if per_unit.shape == self.log_start.shape else per_unit.sum(1, keepdim=True)


def _anneal(densities: UnitDensities, run: _Launch, path: _Path) -> tuple[Tensor, float]:
    """Log w of every particle, shaped like log f_0, and the factor from subsampling."""
    position, momentum, log_weights = run.latents, None, -run.log_start
    kept, fresh = path.damping, (1 - path.damping.square()).sqrt()
    for noise, temperature, step_size in zip(
        run.noise, path.temperatures, path.step_sizes, strict=True
    ):
        momentum = noise if momentum is None else kept * momentum + fresh * noise
        log_weights = log_weights + run.pooled(_kinetic(momentum))
        position = position + 0.5 * step_size * _velocity(run.metric, momentum)
        force = _gradient(run.ends, position, temperature)
        momentum = momentum + step_size * torch.einsum("uij,pui->puj", run.metric, force)
        position = position + 0.5 * step_size * _velocity(run.metric, momentum)
        log_weights = log_weights - run.pooled(_kinetic(momentum))
    at = densities.run_at(position)
    return log_weights + run.pooled(densities.counted(at.log_joint)), at.scale


def _is_lost(log_weights: Tensor) -> Tensor:
    """Which particles flew off: their share of the gradient is 0, and 0 · ∞ would spoil the rest.

    Their log weight is not finite, or so far below that of the unit's best that e to the
    difference is 0 in its dtype.
    """
    kind = torch.finfo(log_weights.dtype)
    finite = torch.isfinite(log_weights)
    best = log_weights.masked_fill(~finite, -math.inf).amax(0)
    return ~finite | (log_weights - best < math.log(kind.tiny) + math.log(kind.eps))


def _kinetic(momentum: Tensor) -> Tensor:
    """−log N(r; 0, I) but for a constant that cancels, shape ``(particle, unit)``."""
    return 0.5 * momentum.square().sum(-1)


def _velocity(metric: Tensor, momentum: Tensor) -> Tensor:
    """L · r, ``(particle, unit, dim)``."""
    return torch.einsum("uij,puj->pui", metric, momentum)


def _gradient(
    ends: Callable[[Tensor], PairAtLatents], position: Tensor, temperature: Tensor
) -> Tensor:
    """∇_h log f_β, itself differentiable where gradients are on."""
    learning = torch.is_grad_enabled()
    with torch.enable_grad():
        at = position if position.requires_grad else position.detach().requires_grad_()
        pair = ends(at)
        log_density = (1 - temperature) * pair.log_guide.sum() + temperature * pair.log_joint.sum()
        (found,) = torch.autograd.grad(log_density, at, create_graph=learning)
    return found


def _gaussian_ends(
    densities: UnitDensities, gaussian: UnitGaussian, latents: Tensor
) -> PairAtLatents:
    at = densities.run_at(latents)
    return PairAtLatents(densities.counted(at.log_joint), gaussian.log_prob(latents), at.scale)


def _match(densities: UnitDensities, count: int) -> UnitGaussian:
    """A Gaussian for each unit with the moments of fresh guide draws, differentiable in φ."""
    per_pass = densities.affordable(2, count, _ELEMENTS_PER_PASS)
    sizes = [min(per_pass, count - done) for done in range(0, count, per_pass)]
    return match_gaussian(*map(densities.draw_latents, sizes))


def _random_numbers_put_back() -> AbstractContextManager[None]:
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))
