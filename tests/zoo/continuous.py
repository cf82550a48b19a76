"""Local continuous latents on every kind of support."""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from scipy import stats

from .basics import linear_gaussian, two_modes
from .case import Case
from .quadrature import log_expectation, normal_nodes, uniform_nodes


def normal_normal() -> Case:
    """h ~ N(0.5, 1.3²), v | h ~ N(h, 0.7²): v ~ N(0.5, 1.3² + 0.7²)."""
    v = torch.tensor([-1.4, 0.3, 0.9, 3.8])

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(0.5, 1.3))
            pyro.sample("v", dist.Normal(h, 0.7), obs=v)

    def guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.StudentT(5.0, 0.6 * v - 0.1, 0.7))

    exact = dist.Normal(0.5, (1.3**2 + 0.7**2) ** 0.5).log_prob(v)
    return Case("normal-normal", model, guide, (v,), exact)


def gamma_poisson() -> Case:
    """Positive: h ~ Gamma(2, 0.5), v | h ~ Poisson(h): v is negative binomial."""
    v = torch.tensor([0.0, 1.0, 3.0, 11.0])

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Gamma(2.0, 0.5))
            pyro.sample("v", dist.Poisson(h), obs=v)

    def guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Gamma(0.7 * (v + 2.3), 1.0))

    exact = torch.tensor(stats.nbinom(2, 0.5 / 1.5).logpmf(v.numpy()))
    return Case("gamma-Poisson", model, guide, (v,), exact)


def beta_binomial() -> Case:
    """Unit interval: h ~ Beta(1.5, 0.8), v | h ~ Binomial(10, h)."""
    v = torch.tensor([2.0, 10.0, 5.0])

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Beta(1.5, 0.8))
            pyro.sample("v", dist.Binomial(10, h), obs=v)

    def guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Beta(0.7 * v + 1.4, 0.8 * (10 - v) + 0.7))

    exact = torch.tensor(stats.betabinom(10, 1.5, 0.8).logpmf(v.numpy()))
    return Case("beta-binomial", model, guide, (v,), exact)


def dirichlet_multinomial() -> Case:
    """Simplex: h ~ Dirichlet(1.5, 0.8, 2), v | h ~ Multinomial(h)."""
    v = torch.tensor([[1.0, 4.0, 2.0], [0.0, 0.0, 5.0], [3.0, 1.0, 0.0]])
    concentration = torch.tensor([1.5, 0.8, 2.0])

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Dirichlet(concentration))
            pyro.sample("v", dist.Multinomial(probs=h, validate_args=False), obs=v)

    def guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Dirichlet(0.7 * v + 0.9 * concentration))

    exact = dist.DirichletMultinomial(concentration, v.sum(-1), is_sparse=False).log_prob(v)
    return Case("Dirichlet-multinomial", model, guide, (v,), exact)


def dependent_interval() -> Case:
    """An interval that ends at its parent: a ~ U(0, 1), h ~ U(0, a), v | h ~ N(h, 0.2²)."""
    v = torch.tensor([0.1, 0.6, 0.95, -0.2])

    def model(v):
        with pyro.plate("units", len(v)):
            a = pyro.sample("a", dist.Uniform(0.0, 1.0))
            h = pyro.sample("h", dist.Uniform(0.0, a))
            pyro.sample("v", dist.Normal(h, 0.2), obs=v)

    def guide(v):
        with pyro.plate("units", len(v)):
            a = pyro.sample("a", dist.Beta(torch.ones_like(v), 0.8))
            share = dist.Beta(torch.where(v > 0.5, 1.0, 0.8), 0.95)
            pyro.sample("h", dist.TransformedDistribution(share, transforms.AffineTransform(0, a)))

    nodes, log_weights = uniform_nodes(2)
    exact = log_expectation(dist.Normal(nodes.prod(-1)[:, None], 0.2).log_prob(v), log_weights)
    return Case("dependent interval", model, guide, (v,), exact)


def ordered_vector() -> Case:
    """h = (z₁, z₁ + exp(z₂)), z ~ N(0, I), v | h ~ N(h, 0.8² I)."""
    v = torch.tensor([[-0.4, 0.9], [0.8, 0.6], [-1.1, 0.5]])
    ordered = transforms.OrderedTransform()

    def model(v):
        with pyro.plate("units", len(v)):
            base = dist.Normal(v.new_zeros(2), 1.0).to_event(1)
            h = pyro.sample("h", dist.TransformedDistribution(base, ordered))
            pyro.sample("v", dist.Normal(h, 0.8).to_event(1), obs=v)

    def guide(v):
        spacing = (v[:, 1] - v[:, 0]).clamp(min=0.5)
        loc = torch.stack([0.6 * v.min(-1).values, 0.7 * spacing.log() - 0.1], -1)
        base = dist.Normal(loc, torch.tensor([0.75, 0.8])).to_event(1)
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.TransformedDistribution(base, ordered))

    nodes, log_weights = normal_nodes(2)
    log_likelihood = dist.Normal(ordered(nodes)[:, None], 0.8).to_event(1).log_prob(v)
    exact = log_expectation(log_likelihood, log_weights)
    return Case("ordered vector", model, guide, (v,), exact)


def correlation_cholesky() -> Case:
    """L ~ LKJCholesky(2, 1.5), four pairs v_t | L ~ N(0, LLᵀ); p(r) ∝ (1 − r²)^0.5."""
    v = torch.tensor(
        [
            [[0.3, 0.8], [-1.2, -0.7], [0.5, 0.1], [1.4, 1.9]],
            [[1.1, -0.6], [0.2, 0.9], [-0.8, 1.3], [0.4, 0.0]],
            [[-0.1, 0.6], [0.7, -1.5], [1.8, 0.2], [-0.3, -0.4]],
        ]
    )

    def pairs(cholesky):
        zeros = cholesky.new_zeros(4, 2)
        return dist.MultivariateNormal(zeros, scale_tril=cholesky.unsqueeze(-3)).to_event(1)

    def model(v):
        with pyro.plate("units", len(v)):
            cholesky = pyro.sample("cholesky", dist.LKJCholesky(2, 1.5))
            pyro.sample("v", pairs(cholesky), obs=v)

    def guide(v):
        correlation = v.prod(-1).sum(-1) / v.square().sum(-2).prod(-1).sqrt()
        base = dist.Normal(0.7 * correlation.unsqueeze(-1) + 0.1, 0.65).to_event(1)
        with pyro.plate("units", len(v)):
            transform = transforms.CorrCholeskyTransform()
            pyro.sample("cholesky", dist.TransformedDistribution(base, transform))

    # r = sin(φ) takes the prior's square root at ±1 away: p(φ) ∝ cos²(φ), φ in (−π/2, π/2).
    nodes, log_weights = uniform_nodes(1)
    angle = torch.pi * (nodes.squeeze(-1) - 0.5)
    log_prior = (2 * angle.cos().square()).log()
    cholesky = torch.zeros(len(angle), 2, 2)
    cholesky[:, 0, 0] = 1.0
    cholesky[:, 1, 0], cholesky[:, 1, 1] = angle.sin(), angle.cos()
    exact = log_expectation(pairs(cholesky[:, None]).log_prob(v), log_weights + log_prior)
    return Case("correlation Cholesky", model, guide, (v,), exact)


def normal_gamma() -> Case:
    """τ ~ Gamma(2.5, 1.2), h ~ N(0.4, 1/(0.6 τ)), three v ~ N(h, 1/τ): v is Student t."""
    v = torch.tensor([[0.2, 1.1, -0.5], [2.6, 3.3, 2.1], [-1.9, 0.7, 4.0]])

    def model(v):
        with pyro.plate("units", len(v)):
            precision = pyro.sample("precision", dist.Gamma(2.5, 1.2))
            h = pyro.sample("h", dist.Normal(0.4, (0.6 * precision).rsqrt()))
            loc = h.unsqueeze(-1).expand(*h.shape, 3)
            noise = dist.Normal(loc, precision.rsqrt().unsqueeze(-1))
            pyro.sample("v", noise.to_event(1), obs=v)

    def guide(v):
        with pyro.plate("units", len(v)):
            rate = 0.8 * (1.2 + v.var(-1))
            precision = pyro.sample("precision", dist.Gamma(torch.full_like(rate, 3.2), rate))
            loc = (v.sum(-1) + 0.24) / 3.6 + 0.1
            pyro.sample("h", dist.Normal(loc, 1.3 * (3.6 * precision).rsqrt()))

    scatter = 1.2 / 2.5 * (torch.eye(3) + 1 / 0.6)
    marginal = stats.multivariate_t(torch.full((3,), 0.4).numpy(), scatter.numpy(), df=5)
    return Case("normal-gamma", model, guide, (v,), torch.tensor(marginal.logpdf(v.numpy())))


MAKERS = (
    normal_normal,
    linear_gaussian,
    gamma_poisson,
    beta_binomial,
    dirichlet_multinomial,
    dependent_interval,
    ordered_vector,
    correlation_cholesky,
    normal_gamma,
    two_modes,
)
