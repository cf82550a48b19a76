"""The importance-weighted bound per unit, as a Pyro ELBO."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Kind, UnitEstimates
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.guide_runs import run_guide
from pyro_vharm.objectives.gradients import BoundGradient, DoublyReparameterized
from pyro_vharm.objectives.objective import UnitObjective, UnitTerms
from pyro_vharm.particles import log_mean_exp, log_mean_exp_error

__all__ = ["ImportanceWeightedELBO", "importance_weighted_bound"]

_DEFAULT_GRADIENT = DoublyReparameterized()


def importance_weighted_bound(
    densities: UnitDensities,
    num_particles: int,
    num_replicates: int = 1,
    gradient: BoundGradient = _DEFAULT_GRADIENT,
) -> UnitTerms:
    """The K-particle bound of each unit, averaged over independent replicates, with gradients.

    L_K = E[log (1/K) Σ_k w_k] ≤ log p(v; θ), with w = p(v, h; θ) / q(h). Where log q can be had in
    total only, all units are one joint unit.
    """
    found = gradient(densities, num_particles, num_replicates)
    values = log_mean_exp(found.log_weights, 1)
    per_unit = UnitEstimates(
        values=values.mean(0),
        mc_errors=_errors(found.log_weights, values),
        kind=Kind.ESTIMATED,
        units_each=densities.num_units // values.shape[1],
    )
    value, surrogate = per_unit.values.sum(), found.surrogate
    return UnitTerms(per_unit, surrogate.detach() - surrogate - value, found.scale)


def _errors(log_weights: Tensor, values: Tensor) -> Tensor:
    """Standard errors by replicates; of one, by the delta method; ∞ for a single weight."""
    num_replicates = len(values)
    if num_replicates > 1:
        error: Tensor = values.std(0) / num_replicates**0.5
        return error
    return log_mean_exp_error(log_weights[0])[0]


class ImportanceWeightedELBO(UnitObjective):
    """Importance-weighted lower bound Σ_u E[log (1/K) Σ_k w_uk], for `SVI` or as a loss module.

    Each unit has its own K weights, so the bound tightens toward Σ_u log p(v_u; θ) as K grows.
    Under subsampling each unit's bound is multiplied by the plate's scale, outside the
    logarithm, so that minibatches give unbiased gradients. The loss is its negative, in nats.
    After each evaluation `latest` holds the bound of each unit with its error.

    Args:
        num_particles: K, importance samples inside the logarithm.
        num_replicates: independent bounds to average; lowers the gradient's variance only.
        gradient: its estimator: `DoublyReparameterized`, `Pathwise`, or `StickingTheLanding` (for
            K = 1).
        unit_plate: name of the plate of independent units. Left out, it is the outermost plate
            that holds every site; without one, the weights are those of the whole data set.

    Raises:
        InputError: on the first call, if the guide has no density, or if it holds all latents as
            point masses, so that K weights are one.

    Source: "Importance Weighted Autoencoders", Burda, Grosse, Salakhutdinov (2016).

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
    >>> objective = ImportanceWeightedELBO(8)
    >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), objective)
    >>> isinstance(svi.step(torch.tensor([1.0, -2.0])), float)
    True
    >>> objective.latest.per_unit.values.shape, objective.latest.side
    (torch.Size([2]), 'lower')
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        num_replicates: int = 1,
        gradient: BoundGradient = _DEFAULT_GRADIENT,
        unit_plate: str | None = None,
    ) -> None:
        if num_replicates < 1:
            raise InputError(f"num_replicates must be at least 1, not {num_replicates}")
        super().__init__(num_particles=num_particles, unit_plate=unit_plate)
        gradient.check(num_particles)
        self.num_replicates = num_replicates
        self.gradient = gradient

    @property
    def title(self) -> str:
        """What it is, for tables."""
        return f"importance weights, K = {self.num_particles}"

    def check(self, densities: UnitDensities) -> None:
        """Refuse several particles for a guide that draws nothing, as well."""
        super().check(densities)
        if self.num_particles == 1:
            return
        assert densities.guide is not None, "it has a density"
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
            run = run_guide(densities.guide, densities.batch, densities.structure, 2)
        if run.values and not run.random:
            raise InputError(
                f"the guide holds {list(run.values)} as point masses (Delta) and draws nothing, so "
                f"the {self.num_particles} weights of a unit are all the same and give the ELBO "
                "again: use ExactEvidence, which sums discrete latents out (or the learner "
                "ExpectationMaximization), or a guide that draws them"
            )

    def evaluate(self, densities: UnitDensities) -> UnitTerms:
        """The bound of each unit, from fresh draws of the guide."""
        return importance_weighted_bound(
            densities, self.num_particles, self.num_replicates, self.gradient
        )
