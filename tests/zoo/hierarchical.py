"""Latents shared by all data: one joint unit."""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from torch import nn

from .case import Case
from .quadrature import log_expectation, uniform_nodes


def global_latent() -> Case:
    """h ~ N(0.5, 1.5²), five v_i ~ N(h, 0.8²)."""
    v = torch.tensor([1.7, 0.4, 2.2, -0.3, 1.1])

    def model(v):
        h = pyro.sample("h", dist.Normal(0.5, 1.5))
        with pyro.plate("data", len(v)):
            pyro.sample("v", dist.Normal(h, 0.8), obs=v)

    def guide(v):
        pyro.sample("h", dist.Normal(0.8 * v.mean(), 0.5))

    covariance = 1.5**2 * torch.ones(5, 5) + 0.8**2 * torch.eye(5)
    exact = dist.MultivariateNormal(torch.full((5,), 0.5), covariance).log_prob(v)
    return Case("global latent", model, guide, (v,), exact.reshape(1), None)


def global_and_local() -> Case:
    """level ~ N(0.3, 1.2²), h_i ~ N(level, 0.8²), v_i ~ N(h_i, 0.5²)."""
    v = torch.tensor([0.4, -1.0, 2.2, 1.3])

    def model(v):
        level = pyro.sample("level", dist.Normal(0.3, 1.2))
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(level, 0.8))
            pyro.sample("v", dist.Normal(h, 0.5), obs=v)

    def guide(v):
        level = pyro.sample("level", dist.Normal(0.8 * v.mean(), 0.6))
        with pyro.plate("data", len(v)):
            pyro.sample("h", dist.Normal(0.65 * v + 0.3 * level, 0.5))

    covariance = 1.2**2 * torch.ones(4, 4) + (0.8**2 + 0.5**2) * torch.eye(4)
    exact = dist.MultivariateNormal(torch.full((4,), 0.3), covariance).log_prob(v)
    return Case("global and local", model, guide, (v,), exact.reshape(1), None)


def eight_schools() -> Case:
    """mu ~ N(0, 5²), tau ~ HalfCauchy(5), theta_j ~ N(mu, tau²), y_j ~ N(theta_j, σ_j²)."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(y, sigma):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    def guide(y, sigma):
        mu = pyro.sample("mu", dist.Normal(3.0, 4.5))
        tau = pyro.sample("tau", dist.HalfCauchy(4.0))
        with pyro.plate("schools", len(y)):
            precision = 1 / sigma**2 + 1 / tau**2
            loc = (y / sigma**2 + mu / tau**2) / precision
            pyro.sample("theta", dist.Normal(loc, 1.15 * precision.rsqrt()))

    nodes, log_weights = uniform_nodes(1, num=400)
    tau = 5 * torch.tan(torch.pi / 2 * nodes)[..., None]
    covariance = 5.0**2 * torch.ones(8, 8) + (sigma**2 + tau**2) * torch.eye(8)
    log_likelihood = dist.MultivariateNormal(torch.zeros(8), covariance).log_prob(y)
    exact = log_expectation(log_likelihood[:, None], log_weights)
    return Case("eight schools", model, guide, (y, sigma), exact, None)


def regression_data():
    """Six rows of two covariates and a response."""
    x = torch.tensor([[0.5, -1.2], [1.4, 0.3], [-0.8, 0.9], [2.1, -0.4], [0.0, 1.6], [-1.5, -0.7]])
    return x, torch.tensor([1.9, 1.2, -1.4, 2.6, -0.9, -0.3])


def regression_evidence(x, y):
    """y ~ N(0, x xᵀ + 2² 11ᵀ + 0.7² I)."""
    covariance = x @ x.T + 2.0**2 + 0.7**2 * torch.eye(len(y))
    return dist.MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y).reshape(1)


class Regression(PyroModule):
    """Linear regression in `nn.Linear`, whose weight and bias are latents."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 2.0).expand([1]).to_event(1))

    def forward(self, x, y):
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 0.7), obs=y)


def linear_with_priors() -> Case:
    """weight ~ N(0, I₂), bias ~ N(0, 2²) as `PyroSample` of an `nn.Linear`, y ~ N(x w + b, 0.7²).

    `nn.Linear` takes no batch of weights: this model cannot run under a plate of particles.
    """
    x, y = regression_data()

    def guide(x, y):
        weight = torch.tensor([[1.0, -0.7]])
        pyro.sample("linear.weight", dist.Normal(weight, 0.35).to_event(2))
        pyro.sample("linear.bias", dist.Normal(y.mean().reshape(1) - 0.3, 0.4).to_event(1))

    with torch.random.fork_rng(devices=[]):
        model = Regression()
    exact = regression_evidence(x, y)
    return Case("linear with priors", model, guide, (x, y), exact, None)


class BroadcastingRegression(PyroModule):
    """The same regression, its weights attributes of the module itself."""

    def __init__(self):
        super().__init__()
        self.weight = PyroSample(dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        self.bias = PyroSample(dist.Normal(0.0, 2.0))

    def forward(self, x, y):
        mean = (self.weight * x).sum(-1) + self.bias
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 0.7), obs=y)


def weights_with_priors() -> Case:
    """As `linear_with_priors`, for a batch of weights."""
    x, y = regression_data()

    def guide(x, y):
        pyro.sample("weight", dist.Normal(torch.tensor([1.0, -0.7]), 0.35).to_event(1))
        pyro.sample("bias", dist.Normal(y.mean() - 0.3, 0.4))

    exact = regression_evidence(x, y)
    return Case("weights with priors", BroadcastingRegression(), guide, (x, y), exact, None)


MAKERS = (global_latent, global_and_local, eight_schools, linear_with_priors, weights_with_priors)

ONE_DRAW_AT_A_TIME = (linear_with_priors,)
"""Makers of models that cannot run under a plate of particles."""
