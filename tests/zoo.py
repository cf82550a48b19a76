"""Models with exact log evidence per unit, each with a guide that fits it imperfectly."""

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from scipy import stats
from torch import Tensor

from pyro_vharm.inference.start import UnitGaussian

LOADINGS = torch.tensor([[1.0, 0.7, -0.2], [0.8, -0.5, 1.5]], dtype=torch.float64)
NOISE = 0.6


def normal_model(v):
    """h ~ N(0, 1), v | h ~ N(h, 1): the posterior is N(v/2, 1/2)."""
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def normal_guide(slope, scale):
    """N(slope · v, scale²) for each unit of `normal_model`."""

    def guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(slope * v, scale))

    return guide


@dataclass(frozen=True)
class Case:
    """A model, a guide, its data, and log p(v_u) of each unit."""

    name: str
    model: Callable
    guide: Callable
    data: tuple
    exact: Tensor


def linear_gaussian(num_units=5, repeat=None, seed=3):
    """h ~ N(0, I₂), v | h ~ N(Wᵀh, 0.36 I₃); with `repeat`, the first unit as often."""
    generator = torch.Generator().manual_seed(seed)
    v = 2.0 * torch.randn(num_units, 3, generator=generator, dtype=torch.float64)
    if repeat is not None:
        v = v[:1].repeat(repeat, 1)

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(2), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(h @ LOADINGS, NOISE).to_event(1), obs=v)

    def guide(v):
        slope = LOADINGS.T / (1.0 + NOISE**2)
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(0.4 * v @ slope + 0.3, 0.6).to_event(1))

    covariance = LOADINGS.T @ LOADINGS + NOISE**2 * torch.eye(3)
    exact = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(v)
    return Case("linear Gaussian", model, guide, (v,), exact)


def linear_gaussian_posterior(v):
    """The exact posterior of each unit of `linear_gaussian`."""
    precision = torch.eye(2) + LOADINGS @ LOADINGS.T / NOISE**2
    covariance = torch.linalg.inv(precision)
    mean = v @ LOADINGS.T @ covariance / NOISE**2
    return UnitGaussian(mean, torch.linalg.cholesky(covariance).expand(len(v), 2, 2))


def gamma_poisson():
    """A positive latent: h ~ Gamma(2, 0.5), v | h ~ Poisson(h)."""
    v = torch.tensor([0.0, 1.0, 3.0, 11.0])

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Gamma(v.new_tensor(2.0), 0.5))
            pyro.sample("v", dist.Poisson(h), obs=v)

    def guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.LogNormal(((v + 2) / 1.5).log() - 0.2, 0.7))

    exact = torch.tensor(stats.nbinom(2, 0.5 / 1.5).logpmf(v.numpy()))
    return Case("gamma-Poisson", model, guide, (v,), exact)


def beta_binomial():
    """A latent on the unit interval: uniform prior, 2 of 10 and 10 of 10; both have 1/11."""
    v = torch.tensor([2.0, 10.0])

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Beta(v.new_ones(()), 1.0))
            pyro.sample("v", dist.Binomial(10, h), obs=v)

    def guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Beta(v + 2, 12 - v))

    return Case("beta-binomial", model, guide, (v,), torch.full((2,), 1 / 11).log())


def dirichlet_multinomial():
    """A latent on the simplex."""
    v = torch.tensor([[1.0, 4.0, 2.0], [0.0, 0.0, 5.0]])
    concentration = torch.tensor([1.5, 0.8, 2.0])

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Dirichlet(concentration))
            pyro.sample("v", dist.Multinomial(probs=h, validate_args=False), obs=v)

    def guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Dirichlet(0.8 * v + concentration))

    exact = dist.DirichletMultinomial(concentration, v.sum(-1), is_sparse=False).log_prob(v)
    return Case("Dirichlet-multinomial", model, guide, (v,), exact)


def two_modes():
    """v | h ~ N(h², 0.3²): two far modes, of which the guide knows one."""
    v = torch.tensor([0.5, 2.0, 4.0, -1.0])

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            pyro.sample("v", dist.Normal(h**2, 0.3), obs=v)

    def guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(v.clamp(min=0.05).sqrt(), 0.15))

    grid = torch.linspace(-8, 8, 400001)
    log_joint = dist.Normal(0.0, 1.0).log_prob(grid)[:, None] + dist.Normal(
        grid[:, None] ** 2, 0.3
    ).log_prob(v)
    exact = torch.logsumexp(log_joint, 0) + (grid[1] - grid[0]).log()
    return Case("two modes", model, guide, (v,), exact)


def nested_plates():
    """Two latent sites per unit, one in a plate inside; units count along dim −2."""
    generator = torch.Generator().manual_seed(5)
    v = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    tau, sigma = 0.8, 0.5

    def model(v):
        units, inner = pyro.plate("units", len(v), dim=-2), pyro.plate("inner", 3, dim=-1)
        with units:
            level = pyro.sample("level", dist.Normal(v.new_tensor(0.3), 1.0))
            with inner:
                h = pyro.sample("h", dist.Normal(level, tau))
                pyro.sample("v", dist.Normal(h, sigma), obs=v)

    def guide(v):
        with pyro.plate("units", len(v), dim=-2):
            level = pyro.sample("level", dist.Normal(0.8 * v.mean(-1, keepdim=True), 0.5))
            with pyro.plate("inner", 3, dim=-1):
                pyro.sample("h", dist.Normal(0.7 * v + 0.3 * level, 0.45))

    covariance = torch.ones(3, 3) + (tau**2 + sigma**2) * torch.eye(3)
    exact = dist.MultivariateNormal(torch.full((3,), 0.3), covariance).log_prob(v)
    return Case("nested plates", model, guide, (v,), exact)


def joint_unit():
    """A global latent and local ones: the data are one joint unit."""
    v = torch.tensor([0.4, -1.0, 2.2])

    def model(v):
        level = pyro.sample("level", dist.Normal(v.new_zeros(()), 1.0))
        noise = pyro.sample("offset", dist.Normal(v.new_zeros(3), 0.5).to_event(1))
        pyro.sample("v", dist.Normal(level.unsqueeze(-1) + noise, 0.4).to_event(1), obs=v)

    def guide(v):
        level = pyro.sample("level", dist.Normal(v.mean(), 0.4))
        pyro.sample("offset", dist.Normal(0.6 * (v - level.unsqueeze(-1)), 0.3).to_event(1))

    covariance = torch.ones(3, 3) + (0.5**2 + 0.4**2) * torch.eye(3)
    exact = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(v)
    return Case("joint unit", model, guide, (v,), exact.reshape(1))


MAKERS = (
    linear_gaussian,
    gamma_poisson,
    beta_binomial,
    dirichlet_multinomial,
    two_modes,
    nested_plates,
    joint_unit,
)
