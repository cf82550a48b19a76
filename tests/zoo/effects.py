"""Masks, factors, scales and reparameterisations around ordinary Gaussian models."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam

from .case import Case

MISSING = 9.0
"""Stands where nothing was observed: a model that scores it is found out."""

LOADINGS = (1.0, 0.6, -0.8)


def one_factor_evidence(v, observed):
    """log p of the observed entries of each row of v, v ~ N(0, w wᵀ + 0.5² I)."""
    w = torch.tensor(LOADINGS)

    def log_prob(row, keep):
        covariance = torch.outer(w[keep], w[keep]) + 0.5**2 * torch.eye(int(keep.sum()))
        zeros = torch.zeros(int(keep.sum()))
        return dist.MultivariateNormal(zeros, covariance).log_prob(row[keep])

    return torch.stack([log_prob(*pair) for pair in zip(v, observed, strict=True)])


def one_factor_data():
    """Three units of three entries each, some of them missing."""
    v = torch.tensor([[0.8, MISSING, -1.1], [-1.6, 0.4, 0.7], [MISSING, MISSING, 1.3]])
    return v, v != MISSING


def one_factor_loc(v, observed):
    """Where the guides of the one-factor models put h."""
    return 0.6 * torch.where(observed, v * torch.tensor(LOADINGS), 0.0).sum(-1) + 0.1


def missing_entries() -> Case:
    """h ~ N(0, 1), v_k ~ N(w_k h, 0.5²); `obs_mask` turns missing entries into latents."""
    v, observed = one_factor_data()
    w = torch.tensor(LOADINGS)

    def model(v, observed):
        with pyro.plate("units", len(v), dim=-2):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            with pyro.plate("entries", 3, dim=-1):
                pyro.sample("v", dist.Normal(w * h, 0.5), obs=v, obs_mask=observed)

    def guide(v, observed):
        with pyro.plate("units", len(v), dim=-2):
            loc = one_factor_loc(v, observed).unsqueeze(-1)
            h = pyro.sample("h", dist.Normal(loc, 0.65))
            with pyro.plate("entries", 3, dim=-1), poutine.mask(mask=~observed):
                pyro.sample("v_unobserved", dist.Normal(0.9 * w * h, 0.65))

    exact = one_factor_evidence(v, observed)
    return Case("missing entries", model, guide, (v, observed), exact)


def masked_distribution() -> Case:
    """As `missing_entries` with the missing entries masked inside the observed distribution."""
    v, observed = one_factor_data()
    w = torch.tensor(LOADINGS)

    def model(v, observed):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            entries = dist.Normal(w * h.unsqueeze(-1), 0.5).mask(observed)
            pyro.sample("v", entries.to_event(1), obs=v)

    def guide(v, observed):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(one_factor_loc(v, observed), 0.65))

    exact = one_factor_evidence(v, observed)
    return Case("masked distribution", model, guide, (v, observed), exact)


def normal_case(name, model, latent="h", wrap=lambda callable_: callable_) -> Case:
    """v ~ N(0.5, 1.2² + 0.6²) with the same guide on `latent`, whatever surrounds the model."""
    v = torch.tensor([1.4, -0.9, 0.6, 3.3])

    def guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample(latent, dist.Normal(0.7 * v + 0.2, 0.75))

    exact = dist.Normal(0.5, (1.2**2 + 0.6**2) ** 0.5).log_prob(v)
    return Case(name, wrap(model), wrap(guide), (v,), exact)


def normal_model(v):
    """h ~ N(0.5, 1.2²), v | h ~ N(h, 0.6²)."""
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(0.5, 1.2))
        pyro.sample("v", dist.Normal(h, 0.6), obs=v)


def factor_likelihood() -> Case:
    """The likelihood N(v; h, 0.6²) by `pyro.factor`: no site holds the data."""

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(0.5, 1.2))
            pyro.factor("likelihood", dist.Normal(h, 0.6).log_prob(v))

    return normal_case("factor likelihood", model)


def deterministic_site() -> Case:
    """h ~ N(0.5, 1.2²), mean = h recorded by `pyro.deterministic`, v | h ~ N(mean, 0.6²)."""

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(0.5, 1.2))
            mean = pyro.deterministic("mean", h)
            pyro.sample("v", dist.Normal(mean, 0.6), obs=v)

    return normal_case("deterministic site", model)


def reparameterized() -> Case:
    """`normal_model` partly decentred: h = 0.5 + 1.2^0.7 (h_decentered − 0.15)."""
    model = poutine.reparam(normal_model, config={"h": LocScaleReparam(0.3)})
    return normal_case("reparameterized", model, latent="h_decentered")


def scaled() -> Case:
    """`normal_model` and its guide under `poutine.scale`: the evidence per unit is unscaled."""
    return normal_case("scaled", normal_model, wrap=lambda callable_: poutine.scale(callable_, 0.4))


MAKERS = (
    missing_entries,
    masked_distribution,
    factor_likelihood,
    deterministic_site,
    reparameterized,
    scaled,
)
