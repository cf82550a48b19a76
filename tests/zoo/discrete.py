"""Discrete latents, enumerated by the model unless the guide has their site."""

from itertools import product

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import config_enumerate

from .case import Case

ENUMERATED = {"enumerate": "parallel"}


def no_guide(*data):
    """Every latent is enumerated."""


def gaussian_mixture() -> Case:
    """z ~ Cat(π), v | z ~ N(m_z, s_z²): nothing left for the guide."""
    v = torch.tensor([-1.7, 0.2, 1.0, 3.4])
    probs = torch.tensor([0.5, 0.2, 0.3])
    components = dist.Normal(torch.tensor([-1.5, 0.3, 2.2]), torch.tensor([0.6, 0.3, 1.1]))

    def model(v):
        with pyro.plate("units", len(v)):
            z = pyro.sample("z", dist.Categorical(probs.to(v)), infer=ENUMERATED)
            loc, scale = components.loc.to(v)[z], components.scale.to(v)[z]
            pyro.sample("v", dist.Normal(loc, scale), obs=v)

    exact = (probs.log() + components.log_prob(v.unsqueeze(-1))).logsumexp(-1)
    return Case("Gaussian mixture", model, no_guide, (v,), exact)


def mixture_of_priors():
    """z ~ Cat(π), h | z ~ N(m_z, s_z²), v | h ~ N(h, 0.8²): its parts, data and evidence."""
    v = torch.tensor([-2.1, 0.4, 1.3, 2.8, -0.5])
    probs = torch.tensor([0.35, 0.65])
    loc, scale = torch.tensor([-1.2, 1.6]), torch.tensor([0.9, 0.5])
    marginal = dist.Normal(loc, (scale**2 + 0.8**2).sqrt()).log_prob(v.unsqueeze(-1))
    return v, probs, loc, scale, (probs.log() + marginal).logsumexp(-1)


def class_above_latent() -> Case:
    """`mixture_of_priors`, z enumerated and h in the guide, which does not know z."""
    v, probs, loc, scale, exact = mixture_of_priors()

    def model(v):
        with pyro.plate("units", len(v)):
            z = pyro.sample("z", dist.Categorical(probs.to(v)), infer=ENUMERATED)
            h = pyro.sample("h", dist.Normal(loc.to(v)[z], scale.to(v)[z]))
            pyro.sample("v", dist.Normal(h, 0.8), obs=v)

    def guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(0.55 * v + 0.4, 1.0))

    return Case("class above a latent", model, guide, (v,), exact)


def class_in_guide() -> Case:
    """`mixture_of_priors`, z and then h sampled in the guide."""
    v, probs, loc, scale, exact = mixture_of_priors()

    def model(v):
        with pyro.plate("units", len(v)):
            z = pyro.sample("z", dist.Categorical(probs))
            h = pyro.sample("h", dist.Normal(loc[z], scale[z]))
            pyro.sample("v", dist.Normal(h, 0.8), obs=v)

    def guide(v):
        slope = pyro.param("slope", torch.tensor([-0.6, 0.9]))
        with pyro.plate("units", len(v)):
            z = pyro.sample("z", dist.Categorical(logits=v.unsqueeze(-1) * slope))
            pyro.sample("h", dist.Normal(0.4 * v + 0.5 * loc[z] + 0.1, 0.75))

    return Case("class in the guide", model, guide, (v,), exact)


def noisy_or() -> Case:
    """Causes c_1, c_2 | c_1 and c_3; effect j stays off with (1 − leak_j) Π_k (1 − s_kj)^{c_k}."""
    v = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0]])
    rate_1, rate_2, rate_3 = 0.3, torch.tensor([0.15, 0.6]), 0.1
    leak = torch.tensor([0.05, 0.1, 0.02, 0.2])
    strength = torch.tensor([[0.9, 0.1, 0.4, 0.0], [0.2, 0.8, 0.3, 0.1], [0.0, 0.5, 0.7, 0.6]])

    def effects(causes):
        """The distribution of the effects for `causes` of shape (..., 3)."""
        off = (1 - leak).log() + causes @ (1 - strength).log()
        return dist.Bernoulli(-torch.expm1(off)).to_event(1)

    def model(v):
        with pyro.plate("units", len(v)):
            c_1 = pyro.sample("c_1", dist.Bernoulli(rate_1), infer=ENUMERATED)
            c_2 = pyro.sample("c_2", dist.Bernoulli(rate_2[c_1.long()]), infer=ENUMERATED)
            c_3 = pyro.sample("c_3", dist.Bernoulli(rate_3), infer=ENUMERATED)
            causes = torch.stack(torch.broadcast_tensors(c_1, c_2, c_3), -1)
            pyro.sample("v", effects(causes), obs=v)

    causes = torch.tensor(list(product([0.0, 1.0], repeat=3)))
    c_1, c_2, c_3 = causes.T
    rates = torch.stack([torch.full((8,), rate_1), rate_2[c_1.long()], torch.full((8,), rate_3)])
    log_prior = dist.Bernoulli(rates).log_prob(torch.stack([c_1, c_2, c_3])).sum(0)
    exact = (log_prior + effects(causes).log_prob(v[:, None])).logsumexp(-1)
    return Case("noisy-OR", model, no_guide, (v,), exact)


def classes_in_inner_plate() -> Case:
    """type ~ Cat(π); in a plate inside the unit, item_k | type ~ Cat(P[type]), v_k ~ N(m, 0.6²)."""
    v = torch.tensor([[0.2, 1.9, -1.1], [2.2, 2.8, 0.4], [-0.9, -2.0, -0.3]])
    probs, items = torch.tensor([0.4, 0.6]), torch.tensor([[0.7, 0.2, 0.1], [0.15, 0.25, 0.6]])
    means = torch.tensor([-1.4, 0.5, 2.3])

    def model(v):
        with pyro.plate("units", len(v), dim=-2):
            kind = pyro.sample("kind", dist.Categorical(probs), infer=ENUMERATED)
            with pyro.plate("items", v.shape[-1], dim=-1):
                item = pyro.sample("item", dist.Categorical(items[kind]), infer=ENUMERATED)
                pyro.sample("v", dist.Normal(means[item], 0.6), obs=v)

    log_item = items.log() + dist.Normal(means, 0.6).log_prob(v[..., None, None])
    log_kind = log_item.logsumexp(-1).sum(-2) + probs.log()
    return Case("classes in an inner plate", model, no_guide, (v,), log_kind.logsumexp(-1))


def global_weights() -> Case:
    """π ~ Dirichlet(a), z_i ~ Cat(π), v_i ~ N(m[z_i], 0.6²): exact by a sum over all z."""
    v = torch.tensor([-1.0, 0.7, 1.9, -0.3])
    concentration, means = torch.tensor([1.5, 0.9, 2.0]), torch.tensor([-1.2, 0.4, 1.7])

    def model(v):
        probs = pyro.sample("probs", dist.Dirichlet(concentration))
        with pyro.plate("data", len(v)):
            z = pyro.sample("z", dist.Categorical(probs), infer=ENUMERATED)
            pyro.sample("v", dist.Normal(means[z], 0.6), obs=v)

    def guide(v):
        pyro.sample("probs", dist.Dirichlet(torch.tensor([2.2, 1.3, 2.1])))

    def log_beta(concentration):
        return concentration.lgamma().sum() - concentration.sum().lgamma()

    def log_joint(z):
        """log p(z, v): the weights integrate to a ratio of Beta functions."""
        posterior = concentration + torch.bincount(torch.tensor(z), minlength=3)
        log_likelihood = dist.Normal(means[list(z)], 0.6).log_prob(v).sum()
        return log_beta(posterior) - log_beta(concentration) + log_likelihood

    exact = torch.stack([log_joint(z) for z in product(range(3), repeat=len(v))]).logsumexp(0)
    return Case("global weights", model, guide, (v,), exact.reshape(1), None)


def class_pair():
    """Class probabilities and a standard deviation, and the two class means."""
    return torch.tensor([0.3, 0.7]), 0.9, torch.tensor([-1.1, 1.4])


def labelled_plates() -> Case:
    """Semi-supervised in two plates, the unlabelled one enumerated: one joint unit."""
    probs, scale, means = class_pair()
    labelled, labels = torch.tensor([-0.4, 2.1]), torch.tensor([0, 1])
    unlabelled = torch.tensor([0.3, -2.0, 1.2])

    def model(labelled, labels, unlabelled):
        shift = pyro.sample("shift", dist.Normal(0.2, 0.8))
        with pyro.plate("labelled", len(labelled)):
            z = pyro.sample("z", dist.Categorical(probs), obs=labels)
            pyro.sample("v", dist.Normal(means[z] + shift, scale), obs=labelled)
        with pyro.plate("unlabelled", len(unlabelled)):
            z = pyro.sample("hidden z", dist.Categorical(probs), infer=ENUMERATED)
            pyro.sample("hidden v", dist.Normal(means[z] + shift, scale), obs=unlabelled)

    def guide(labelled, labels, unlabelled):
        pyro.sample("shift", dist.Normal(0.3, 0.55))

    def log_joint(hidden):
        """log p(z, v) of all five data: given every class, v is Gaussian."""
        z = torch.cat([labels, torch.tensor(hidden)])
        covariance = scale**2 * torch.eye(5) + 0.8**2
        noise = dist.MultivariateNormal(means[z] + 0.2, covariance)
        return probs[z].log().sum() + noise.log_prob(torch.cat([labelled, unlabelled]))

    exact = torch.stack([log_joint(z) for z in product(range(2), repeat=3)]).logsumexp(0)
    data = (labelled, labels, unlabelled)
    return Case("labelled plates", model, guide, data, exact.reshape(1), None)


def some_labels() -> Case:
    """Semi-supervised by `obs_mask`: p(z, v) of a labelled unit, p(v) of the others.

    `obs_mask` drops `infer` on its way to the site "z_unobserved"; `config_enumerate` reaches it.
    """
    probs, scale, means = class_pair()
    v, labels = torch.tensor([-0.4, 2.1, 0.3, -2.0]), torch.tensor([0, 1, 0, 0])
    known = torch.tensor([True, True, False, False])

    @config_enumerate
    def model(v, labels, known):
        with pyro.plate("units", len(v)):
            z = pyro.sample("z", dist.Categorical(probs), obs=labels, obs_mask=known)
            pyro.sample("v", dist.Normal(means[z], scale), obs=v)

    log_joint = probs.log() + dist.Normal(means, scale).log_prob(v.unsqueeze(-1))
    log_labelled = log_joint.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    exact = torch.where(known, log_labelled, log_joint.logsumexp(-1))
    return Case("some labels", model, no_guide, (v, labels, known), exact)


MAKERS = (
    gaussian_mixture,
    class_above_latent,
    class_in_guide,
    noisy_or,
    classes_in_inner_plate,
    global_weights,
    labelled_plates,
    some_labels,
)
