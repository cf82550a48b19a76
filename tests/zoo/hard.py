"""Posteriors that are hard to integrate, with guides that are poor on purpose."""

import math

import pyro
import pyro.distributions as dist
import torch

from .case import Case


def correlated(dim, correlation, num_units=3):
    """h ~ N(0, ρ^|i−j|), v | h ~ N(h, 0.25): mean field is far too narrow."""
    index = torch.arange(dim)
    prior = correlation ** (index[:, None] - index).abs().double()
    marginal = dist.MultivariateNormal(torch.zeros(dim), prior + 0.25 * torch.eye(dim))
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(num_units, dim, generator=generator, dtype=torch.float64)
    v = noise @ torch.linalg.cholesky(marginal.covariance_matrix).T
    factor = torch.linalg.cholesky(prior)

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.MultivariateNormal(v.new_zeros(dim), scale_tril=factor))
            pyro.sample("v", dist.Normal(h, 0.5).to_event(1), obs=v)

    def guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(0.9 * v, 0.25).to_event(1))

    return Case(f"correlated in {dim}", model, guide, (v,), marginal.log_prob(v))


def far_modes(dim, apart=8.0, share=0.3, num_units=4):
    """Two modes of unequal mass, so many standard deviations apart; the guide sits on the lesser.

    h ~ N(0, 25 I), and the likelihood is e^v (w N(h; m, I) + (1 − w) N(h; −m, I)).
    """
    v = torch.linspace(-1, 1, num_units)
    mode = torch.zeros(dim)
    mode[0] = apart / 2

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(dim), 5.0).to_event(1))
            right = dist.Normal(mode, 1.0).to_event(1).log_prob(h) + math.log(share)
            left = dist.Normal(-mode, 1.0).to_event(1).log_prob(h) + math.log(1 - share)
            pyro.factor("likelihood", torch.logaddexp(right, left) + v)

    def guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(mode.expand(len(v), dim), 0.95).to_event(1))

    exact = dist.Normal(0.0, 26**0.5).log_prob(mode).sum() + v
    return Case(f"far modes in {dim}", model, guide, (v,), exact)


def funnel(dim=9):
    """Neal's funnel: s ~ N(0, 9), h | s ~ N(0, e^s I), nothing observed but a factor e^v."""
    v = torch.tensor([0.0, 1.0, 2.0])

    def model(v):
        with pyro.plate("units", len(v)):
            s = pyro.sample("s", dist.Normal(v.new_zeros(()), 3.0))
            scale = (s / 2).exp()[..., None]
            pyro.sample("h", dist.Normal(v.new_zeros(dim), scale).to_event(1))
            pyro.factor("likelihood", v)

    def guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample("s", dist.Normal(torch.zeros_like(v), 1.0))
            pyro.sample("h", dist.Normal(v.new_zeros(len(v), dim), 1.0).to_event(1))

    return Case("funnel", model, guide, (v,), v)


def uniform_binomial():
    """h uniform on (0, 1), 2 of 10 heads: every number of heads has probability 1/11."""
    v = torch.tensor([2.0])

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Beta(torch.ones_like(v), torch.ones_like(v)))
            pyro.sample("v", dist.Binomial(10, h), obs=v)

    def guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Beta(v + 0.5, 10.5 - v))

    return Case("uniform binomial", model, guide, (v,), torch.tensor([1 / 11]).log())


EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)


def eight_schools(centred):
    """μ ~ N(0, 25), τ ~ half-Cauchy(5), θ_j ~ N(μ, τ²), y_j ~ N(θ_j, σ_j²): one joint unit.

    The evidence is that of quadrature over μ and τ, with θ integrated out.
    """
    effects, errors = torch.tensor(EFFECTS), torch.tensor(ERRORS)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
        with pyro.plate("schools", len(y)):
            if centred:
                theta = pyro.sample("theta", dist.Normal(mu, tau))
            else:
                theta = mu + tau * pyro.sample("e", dist.Normal(y.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(theta, errors), obs=y)

    name = f"eight schools, {'' if centred else 'not '}centred"
    return Case(name, model, None, (effects,), torch.tensor([-31.311347]), None)


def logistic_regression(num_observed=30):
    """w ~ N(0, I₂), y_i ~ Bernoulli(σ(x_iᵀ w)): one joint unit, by a grid over w."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(num_observed, 2, generator=generator, dtype=torch.float64)
    chance = torch.sigmoid(x @ torch.tensor([1.0, -2.0]))
    y = (torch.rand(num_observed, generator=generator, dtype=torch.float64) < chance).double()

    def model(x, y):
        w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("observed", len(y)):
            logits = (w.unsqueeze(-2) * x).sum(-1)
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    line = torch.linspace(-8, 8, 161)
    grid = torch.cartesian_prod(line, line)
    logits = grid @ x.T
    likelihood = (logits * y - torch.nn.functional.softplus(logits)).sum(-1)
    log_joint = likelihood + dist.Normal(0.0, 1.0).log_prob(grid).sum(-1)
    exact = torch.logsumexp(log_joint, 0) + 2 * (line[1] - line[0]).log()
    return Case("logistic regression", model, None, (x, y), exact.reshape(1), None)
