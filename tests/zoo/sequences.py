"""Latent chains in time inside the plate of units: Gaussian states and enumerated ones."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

from .case import Case

PADDING = 9.0
"""Stands after the end of a shorter sequence: a model that scores it is found out."""


def gaussian_model(steps, v, present):
    """x₀ ~ N(0.4, 1), x_t ~ N(0.7 x_{t−1}, 0.5²), v_t ~ N(x_t, 0.6²) for the steps present."""
    with pyro.plate("units", len(v)):
        loc, scale = v.new_tensor(0.4), 1.0
        for t in steps:
            with poutine.mask(mask=present[:, t]):
                x = pyro.sample(f"x_{t}", dist.Normal(loc, scale))
                pyro.sample(f"v_{t}", dist.Normal(x, 0.6), obs=v[:, t])
            loc, scale = 0.7 * x, 0.5


def gaussian_guide(steps, v, present):
    """Filters with a gain of its own, wider than the posterior."""
    with pyro.plate("units", len(v)):
        x = v.new_zeros(())
        for t in steps:
            with poutine.mask(mask=present[:, t]):
                x = pyro.sample(f"x_{t}", dist.Normal(0.5 * v[:, t] + 0.35 * x, 0.5))


def gaussian_evidence(v, lengths):
    """log p of the first `length` values of each row of v."""
    num_steps = v.shape[1]
    steps = torch.arange(num_steps)
    decay = torch.tril(0.7 ** (steps[:, None] - steps).clamp(min=0).to(v))
    variance = torch.tensor([1.0] + [0.5**2] * (num_steps - 1))
    covariance = decay @ variance.diag() @ decay.T + 0.6**2 * torch.eye(num_steps)
    mean = 0.4 * decay[:, 0]
    rows = [
        dist.MultivariateNormal(mean[:n], covariance[:n, :n]).log_prob(row[:n])
        for row, n in zip(v, lengths, strict=True)
    ]
    return torch.stack(rows)


def gaussian_sequences():
    """Three units of four steps."""
    return torch.tensor([[0.9, 1.6, 0.2, -0.5], [-1.4, -0.3, 0.8, 2.0], [2.7, 1.1, 1.5, 0.4]])


def gaussian_chain_case(name, steps) -> Case:
    """`gaussian_model` with all steps present, walked by `steps()`."""
    v = gaussian_sequences()

    def model(v):
        gaussian_model(steps(), v, torch.ones_like(v, dtype=torch.bool))

    def guide(v):
        gaussian_guide(steps(), v, torch.ones_like(v, dtype=torch.bool))

    return Case(name, model, guide, (v,), gaussian_evidence(v, [4, 4, 4]))


def loop_over_time() -> Case:
    """A linear Gaussian chain in a Python loop."""
    return gaussian_chain_case("loop over time", lambda: range(4))


def markov_over_time() -> Case:
    """The same chain in `pyro.markov`, a name for each step."""
    return gaussian_chain_case("markov over time", lambda: pyro.markov(range(4)))


def ragged_sequences() -> Case:
    """The same chain cut to each unit's length by `poutine.mask`, in the model and the guide."""
    lengths = torch.tensor([4, 1, 3])
    present = torch.arange(4) < lengths[:, None]
    v = torch.where(present, gaussian_sequences(), PADDING)

    def model(v, present):
        gaussian_model(range(4), v, present)

    def guide(v, present):
        gaussian_guide(range(4), v, present)

    exact = gaussian_evidence(v, lengths)
    return Case("ragged sequences", model, guide, (v, present), exact)


def no_guide(*data):
    """Every latent is enumerated."""


def hidden_markov_parts():
    """Initial probabilities, transition matrix, emission means; noise is 0.7 throughout."""
    initial = torch.tensor([0.5, 0.2, 0.3])
    transition = torch.tensor([[0.7, 0.2, 0.1], [0.15, 0.6, 0.25], [0.3, 0.1, 0.6]])
    return initial, transition, torch.tensor([-1.3, 0.4, 2.1])


def hidden_markov_model(v, present):
    """x₀ ~ Cat(π), x_t ~ Cat(P[x_{t−1}]), v_t ~ N(m[x_t], 0.7²) for the steps present."""
    probs, transition, means = hidden_markov_parts()
    with pyro.plate("units", len(v)):
        for t in pyro.markov(range(v.shape[1])):
            with poutine.mask(mask=present[:, t]):
                x = pyro.sample(f"x_{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
                pyro.sample(f"v_{t}", dist.Normal(means[x], 0.7), obs=v[:, t])
            probs = transition[x]


def forward_algorithm(v, lengths):
    """log p of the first `length` values of each row of v."""
    initial, transition, means = hidden_markov_parts()
    likelihood = dist.Normal(means, 0.7).log_prob(v.unsqueeze(-1)).exp()

    def log_evidence(emission):
        forward = initial * emission[0]
        for step in emission[1:]:
            forward = forward @ transition * step
        return forward.sum().log()

    return torch.stack([log_evidence(e[:n]) for e, n in zip(likelihood, lengths, strict=True)])


def hidden_markov_sequences():
    """Four units of four steps."""
    return torch.tensor(
        [
            [-1.0, -1.9, 0.3, 0.9],
            [2.4, 1.2, -0.6, 0.0],
            [0.5, 2.9, 1.7, 2.2],
            [-0.4, 0.8, 0.1, -1.5],
        ]
    )


def hidden_markov() -> Case:
    """A hidden Markov model per unit, its states enumerated in `pyro.markov`."""
    v = hidden_markov_sequences()

    def model(v):
        hidden_markov_model(v, torch.ones_like(v, dtype=torch.bool))

    return Case("hidden Markov", model, no_guide, (v,), forward_algorithm(v, [4] * 4))


def ragged_hidden_markov() -> Case:
    """The same, cut to each unit's length by `poutine.mask`."""
    lengths = torch.tensor([2, 4, 1, 3])
    present = torch.arange(4) < lengths[:, None]
    v = torch.where(present, hidden_markov_sequences(), PADDING)
    exact = forward_algorithm(v, lengths)
    return Case("ragged hidden Markov", hidden_markov_model, no_guide, (v, present), exact)


def switching_chain() -> Case:
    """s_t | s_{t−1} enumerated, x_t ~ N(a[s_t] x_{t−1} + b[s_t], 0.5²), v_t ~ N(x_t, 0.4²)."""
    v = torch.tensor([[0.5, 1.4], [-1.2, 0.6], [2.1, 0.9]])
    probs, stay = torch.tensor([0.35, 0.65]), torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    a, b = torch.tensor([0.9, -0.4]), torch.tensor([-0.3, 0.7])
    enumerated = {"enumerate": "parallel"}

    def model(v):
        with pyro.plate("units", len(v)):
            state_probs, x = probs, v.new_tensor(1.0)
            for t in pyro.markov(range(2)):
                s = pyro.sample(f"s_{t}", dist.Categorical(state_probs), infer=enumerated)
                x = pyro.sample(f"x_{t}", dist.Normal(a[s] * x + b[s], 0.5))
                pyro.sample(f"v_{t}", dist.Normal(x, 0.4), obs=v[:, t])
                state_probs = stay[s]

    def guide(v):
        with pyro.plate("units", len(v)):
            for t in pyro.markov(range(2)):
                pyro.sample(f"x_{t}", dist.Normal(0.6 * v[:, t] + 0.1, 0.5))

    def log_joint(s0, s1):
        """log p(s₀, s₁, v): given the states, (v₀, v₁) is Gaussian."""
        mean0 = a[s0] + b[s0]
        mean = torch.stack([mean0, a[s1] * mean0 + b[s1]])
        decay = torch.tensor([[1.0, 0.0], [a[s1], 1.0]])
        covariance = 0.5**2 * decay @ decay.T + 0.4**2 * torch.eye(2)
        log_prior = (probs[s0] * stay[s0, s1]).log()
        return log_prior + dist.MultivariateNormal(mean, covariance).log_prob(v)

    states = [log_joint(s0, s1) for s0 in (0, 1) for s1 in (0, 1)]
    return Case("switching chain", model, guide, (v,), torch.stack(states).logsumexp(0))


MAKERS = (
    loop_over_time,
    markov_over_time,
    ragged_sequences,
    hidden_markov,
    ragged_hidden_markov,
    switching_chain,
)
