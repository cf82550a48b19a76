"""The flow of the Nile: a small visible gap that hides twice its size in harm.

A local level model of 100 years: x₁ ~ N(1000, 10⁶), x_t | x_{t−1} ~ N(x_{t−1}, σ_level²),
v_t | x_t ~ N(x_t, σ_obs²). The guide is a mean-field Gaussian over the 100 states. To make the
states look independent given the data, learning makes the level jump about and the observations
precise. The Kalman filter gives exact log evidence, and maximum likelihood the reference.

Run with ``python examples/nile.py``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyro
import pyro.distributions as dist
import statsmodels.api as sm
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from torch.distributions import constraints

import pyro_vharm as vh


def model(flow: Tensor) -> None:
    """The path of the level is 1000 + L e with e standard normal, jointly Gaussian."""
    observation = pyro.param(
        "observation_variance", flow.new_tensor(15000.0), constraint=constraints.positive
    )
    level = pyro.param("level_variance", flow.new_tensor(1500.0), constraint=constraints.positive)
    first = torch.arange(len(flow)) == 0
    columns = torch.where(first, flow.new_tensor(1000.0), level.sqrt())
    scale_tril = torch.tril(columns.expand(len(flow), len(flow)))
    path = dist.MultivariateNormal(flow.new_full(flow.shape, 1000.0), scale_tril=scale_tril)
    states = pyro.sample("level", path)
    pyro.sample("flow", dist.Normal(states, observation.sqrt()).to_event(1), obs=flow)


def guide(flow: Tensor) -> None:
    """Mean field over the states, in units of 100."""
    loc = pyro.param("loc", torch.zeros_like(flow))
    scale = pyro.param("scale", torch.full_like(flow, 0.6), constraint=constraints.positive)
    pyro.sample("level", dist.Normal(1000.0 + 100.0 * loc, 100.0 * scale).to_event(1))


def kalman(flow: Tensor) -> sm.tsa.UnobservedComponents:
    """The same model in state-space form."""
    exact = sm.tsa.UnobservedComponents(flow.numpy(), "local level", loglikelihood_burn=0)
    exact.ssm.initialize_known([1000.0], [[1e6]])
    return exact


def main() -> None:
    """Train by SVI, audit against exact maximum likelihood, and compare with the Kalman filter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000, help="steps of SVI")
    parser.add_argument("--guide-steps", type=int, default=1500, help="of retraining the guide")
    parser.add_argument("--temperatures", type=int, default=20, help="of annealed sampling")
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()

    flow = torch.tensor(sm.datasets.nile.load_pandas().data["volume"].to_numpy())
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.01 ** (1 / options.steps)})
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=32, vectorize_particles=True))
    for _ in range(options.steps):
        svi.step(flow)

    exact = kalman(flow)
    reference = exact.fit(disp=False, method="nm", maxiter=2000).params
    names = ("observation_variance", "level_variance")
    audit = vh.audit(
        model,
        guide,
        (flow,),
        reference=dict(zip(names, reference, strict=True)),
        learner=vh.GradientLearner(
            guide_training=vh.GuideTraining(options.guide_steps, learning_rate=0.02)
        ),
        method=vh.AnnealedImportanceSampling(
            num_particles=64,
            num_steps=options.temperatures,
            kernel=vh.HamiltonianKernel(num_leapfrog=10),
        ),
    )
    print(audit)
    assert audit.harm is not None

    learned = [float(pyro.param(name).detach()) for name in names]
    print(f"\n{'log evidence':14}{'lower':>10}{'estimate':>10}{'upper':>10}{'Kalman':>10}")
    for name, theta, evidence in (
        ("as learned", learned, audit.harm.train.learned),
        ("at reference", reference, audit.harm.train.reference),
    ):
        upper = evidence.upper()
        assert upper is not None
        row = (evidence.lower().value, evidence.per_unit.total().value, upper.value)
        values = (*row, float(exact.loglike(theta)))
        print(f"{name:14}" + "".join(f"{value:10.3f}" for value in values))
        print(f"{'':14}variances: observation {theta[0]:.1f}, level {theta[1]:.1f}")

    options.out.mkdir(parents=True, exist_ok=True)
    vh.plot_ledger(vh.to_datatree(audit)).savefig(options.out / "nile_ledger.png", dpi=150)
    print(f"\nwritten: {options.out / 'nile_ledger.png'}")


if __name__ == "__main__":
    main()
