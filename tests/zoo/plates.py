"""Where the units lie: nested, far to the left, broadcast, expanded, subsampled."""

import pyro
import pyro.distributions as dist
import torch

from .case import Case


def nested_plates() -> Case:
    """level ~ N(0.3, 1), h_k ~ N(level, 0.8²), v_k ~ N(h_k, 0.5²); units along dim −2."""
    v = torch.tensor([[0.7, -0.4, 1.9], [-1.2, -2.5, 0.3], [2.4, 3.1, 0.8], [0.0, 0.6, -0.9]])

    def model(v):
        units, inner = pyro.plate("units", len(v), dim=-2), pyro.plate("inner", 3, dim=-1)
        with units:
            level = pyro.sample("level", dist.Normal(0.3, 1.0))
            with inner:
                h = pyro.sample("h", dist.Normal(level, 0.8))
                pyro.sample("v", dist.Normal(h, 0.5), obs=v)

    def guide(v):
        with pyro.plate("units", len(v), dim=-2):
            level = pyro.sample("level", dist.Normal(0.7 * v.mean(-1, keepdim=True), 0.65))
            with pyro.plate("inner", 3, dim=-1):
                pyro.sample("h", dist.Normal(0.65 * v + 0.3 * level, 0.5))

    covariance = torch.ones(3, 3) + (0.8**2 + 0.5**2) * torch.eye(3)
    exact = dist.MultivariateNormal(torch.full((3,), 0.3), covariance).log_prob(v)
    return Case("nested plates", model, guide, (v,), exact)


def far_left_plate() -> Case:
    """As `nested_plates` with units along dim −3, no plate at dim −2, and a name to be quoted."""
    name = "the rows/2 (n° 1)"
    v = torch.tensor([[[1.3, 0.2]], [[-0.8, -1.7]], [[2.9, 0.4]]])

    def model(v):
        with pyro.plate(name, len(v), dim=-3):
            level = pyro.sample("a level", dist.Normal(-0.2, 1.1))
            with pyro.plate("inner", 2, dim=-1):
                h = pyro.sample("h/2", dist.Normal(level, 0.7))
                pyro.sample("v", dist.Normal(h, 0.6), obs=v)

    def guide(v):
        with pyro.plate(name, len(v), dim=-3):
            level = pyro.sample("a level", dist.Normal(0.5 * v.mean(-1, keepdim=True), 0.8))
            with pyro.plate("inner", 2, dim=-1):
                pyro.sample("h/2", dist.Normal(0.5 * v + 0.4 * level, 0.55))

    covariance = 1.1**2 * torch.ones(2, 2) + (0.7**2 + 0.6**2) * torch.eye(2)
    exact = dist.MultivariateNormal(torch.full((2,), -0.2), covariance).log_prob(v)
    return Case("far left plate", model, guide, (v,), exact.squeeze(-1), name)


def inner_latents_only() -> Case:
    """h_k ~ N(m_k, 1) in a plate inside the units, v_k ~ N(h_k, 0.4²): no latent of the unit."""
    v = torch.tensor([[0.5, -1.3], [1.9, 0.2], [-0.7, 2.2]])
    prior = torch.tensor([0.4, -0.6])

    def model(v):
        with pyro.plate("units", len(v), dim=-2), pyro.plate("inner", 2, dim=-1):
            h = pyro.sample("h", dist.Normal(prior, 1.0))
            pyro.sample("v", dist.Normal(h, 0.4), obs=v)

    def guide(v):
        with pyro.plate("units", len(v), dim=-2), pyro.plate("inner", 2, dim=-1):
            pyro.sample("h", dist.Normal(0.75 * v + 0.1, 0.5))

    exact = dist.Normal(prior, (1 + 0.4**2) ** 0.5).log_prob(v).sum(-1)
    return Case("inner latents only", model, guide, (v,), exact)


def scalar_observation() -> Case:
    """One number observed in every unit: h_u ~ N(m_u, 1), 0.7 | h_u ~ N(h_u, 0.5²)."""
    prior = torch.tensor([0.2, -1.1, 1.6])
    v = torch.tensor(0.7)

    def model(prior, v):
        with pyro.plate("units", len(prior)):
            h = pyro.sample("h", dist.Normal(prior, 1.0))
            pyro.sample("v", dist.Normal(h, 0.5), obs=v)

    def guide(prior, v):
        with pyro.plate("units", len(prior)):
            pyro.sample("h", dist.Normal(0.6 * v + 0.3 * prior, 0.6))

    exact = dist.Normal(prior, (1 + 0.5**2) ** 0.5).log_prob(v)
    return Case("scalar observation", model, guide, (prior, v), exact)


def broadcast_observation() -> Case:
    """A value of shape (units, 1) scored under three noise scales: v 1 ~ N(0, 11ᵀ + diag σ²)."""
    v = torch.tensor([[0.6], [-1.5], [2.3], [0.0]])
    noise = torch.tensor([0.7, 1.4, 0.9])

    def model(v):
        with pyro.plate("units", len(v), dim=-2):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            with pyro.plate("instruments", 3, dim=-1):
                pyro.sample("v", dist.Normal(h, noise), obs=v)

    def guide(v):
        with pyro.plate("units", len(v), dim=-2):
            pyro.sample("h", dist.Normal(0.7 * v + 0.1, 0.6))

    covariance = torch.ones(3, 3) + noise.square().diag()
    exact = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(v.expand(-1, 3))
    return Case("broadcast observation", model, guide, (v,), exact)


def matrix_latent() -> Case:
    """h ~ N(0, 0.9²) expanded to a 2 × 2 matrix event, v | h ~ N(h a, 0.5² I)."""
    v = torch.tensor([[0.9, -0.3], [-2.1, 1.4], [0.2, 2.6]])
    a = torch.tensor([1.0, -0.6])

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 0.9).expand([2, 2]).to_event(2))
            pyro.sample("v", dist.Normal(h @ a, 0.5).to_event(1), obs=v)

    def guide(v):
        with pyro.plate("units", len(v)):
            loc = 0.5 * v.unsqueeze(-1) * a + 0.1
            pyro.sample("h", dist.Normal(loc, 0.8).to_event(2))

    exact = dist.Normal(0.0, (0.9**2 * a.dot(a) + 0.5**2).sqrt()).log_prob(v).sum(-1)
    return Case("matrix latent", model, guide, (v,), exact)


def subsampled_plate() -> Case:
    """h ~ N(0.5, 1.2²), v | h ~ N(h, 0.8²); the model draws three of its seven units itself."""
    v = torch.tensor([0.3, -1.9, 2.4, 1.1, 0.0, -0.6, 4.2])
    locs, scales = 0.6 * v + 0.2, torch.tensor([0.8, 0.85, 0.9, 0.8, 0.95, 0.85, 0.9])

    def model(v):
        with pyro.plate("units", len(v), subsample_size=3) as index:
            h = pyro.sample("h", dist.Normal(0.5, 1.2))
            pyro.sample("v", dist.Normal(h, 0.8), obs=v[index])

    def guide(v):
        loc = pyro.param("locs", locs)
        scale = pyro.param("scales", scales, constraint=dist.constraints.positive)
        with pyro.plate("units", len(v), subsample_size=3) as index:
            pyro.sample("h", dist.Normal(loc[index], scale[index]))

    exact = dist.Normal(0.5, (1.2**2 + 0.8**2) ** 0.5).log_prob(v)
    return Case("subsampled plate", model, guide, (v,), exact)


def minibatch() -> Case:
    """As `subsampled_plate`, handed 4 of 20 units: the plate only scales, its indices are idle."""
    v = torch.tensor([1.2, -0.7, 3.0, 0.1])

    def model(v):
        with pyro.plate("units", 20, subsample_size=len(v)):
            h = pyro.sample("h", dist.Normal(0.5, 1.2))
            pyro.sample("v", dist.Normal(h, 0.8), obs=v)

    def guide(v):
        with pyro.plate("units", 20, subsample_size=len(v)):
            pyro.sample("h", dist.Normal(0.6 * v + 0.2, 0.85))

    exact = dist.Normal(0.5, (1.2**2 + 0.8**2) ** 0.5).log_prob(v)
    return Case("minibatch", model, guide, (v,), exact)


MAKERS = (
    nested_plates,
    far_left_plate,
    inner_latents_only,
    scalar_observation,
    broadcast_observation,
    matrix_latent,
    subsampled_plate,
    minibatch,
)
