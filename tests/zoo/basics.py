"""The models that tests of single estimators are written on."""

import pyro
import pyro.distributions as dist
import torch

from pyro_vharm.inference.gaussians import UnitGaussian

from .case import Case

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


def linear_gaussian(num_units=5, repeat=None, seed=3):
    """h ~ N(0, I₂), v | h ~ N(Wᵀh, 0.36 I₃); with `repeat`, the first unit as often."""
    generator = torch.Generator().manual_seed(seed)
    v = 2.0 * torch.randn(num_units, 3, generator=generator, dtype=torch.float64)
    if repeat is not None:
        v = v[:1].repeat(repeat, 1)

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(2), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(h @ LOADINGS.to(h), NOISE).to_event(1), obs=v)

    def guide(v):
        slope = LOADINGS.T.to(v) / (1.0 + NOISE**2)
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(0.4 * v @ slope + 0.3, 0.6).to_event(1))

    return Case("linear Gaussian", model, guide, (v,), linear_gaussian_evidence(v))


def linear_gaussian_evidence(v):
    """Log p(v_u) of each unit of `linear_gaussian`."""
    covariance = LOADINGS.T @ LOADINGS + NOISE**2 * torch.eye(3)
    return dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(v)


def linear_gaussian_posterior(v):
    """The exact posterior of each unit of `linear_gaussian`."""
    precision = torch.eye(2) + LOADINGS @ LOADINGS.T / NOISE**2
    covariance = torch.linalg.inv(precision)
    mean = v @ LOADINGS.T @ covariance / NOISE**2
    return UnitGaussian(mean, torch.linalg.cholesky(covariance).expand(len(v), 2, 2))


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
    return Case("joint unit", model, guide, (v,), exact.reshape(1), None)
