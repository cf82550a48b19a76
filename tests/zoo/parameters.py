"""Every way a model holds its θ: h ~ N(0, I₂), v | h ~ N(Wᵀh + b, σ² I₃) throughout."""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

from .case import Case

NOISE = 0.6


def loadings():
    """W of shape (2, 3)."""
    return torch.tensor([[1.0, 0.7, -0.2], [0.8, -0.5, 1.5]])


def intercept():
    """b of shape (3,)."""
    return torch.tensor([0.3, -0.4, 0.1])


def sites(v, mean, noise=NOISE):
    """The model's sites, given the map from h to the mean of v."""
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(2), 1.0).to_event(1))
        pyro.sample("v", dist.Normal(mean(h), noise).to_event(1), obs=v)


def guide(v):
    """A linear encoder without parameters, off-centre and too wide."""
    slope = 0.3 * loadings().T.to(v)
    with pyro.plate("units", len(v)):
        pyro.sample("h", dist.Normal((v - intercept().to(v)) @ slope + 0.1, 0.5).to_event(1))


def factor_case(name, model) -> Case:
    """v ~ N(b, WᵀW + σ² I) at the initial parameters."""
    v = torch.tensor([[0.4, -1.1, 2.3], [-2.0, 0.6, 0.1], [1.7, 1.2, -0.9]])
    covariance = loadings().T @ loadings() + NOISE**2 * torch.eye(3)
    exact = dist.MultivariateNormal(intercept(), covariance).log_prob(v)
    return Case(name, model, guide, (v,), exact)


def param_statements() -> Case:
    """W and b unconstrained, σ positive, all by `pyro.param`."""

    def model(v):
        weight, bias = pyro.param("weight", loadings), pyro.param("bias", intercept)
        noise = pyro.param("noise", torch.tensor(NOISE), constraint=constraints.positive)
        sites(v, lambda h: h @ weight + bias, noise)

    return factor_case("param statements", model)


class ModuleParameters(PyroModule):
    """A `PyroModule` with `nn.Parameter` attributes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(loadings())
        self.bias = nn.Parameter(intercept())

    def forward(self, v):
        sites(v, lambda h: h @ self.weight + self.bias)


def module_parameters() -> Case:
    """W and b are `nn.Parameter` attributes of a `PyroModule`."""
    return factor_case("module parameters", ModuleParameters())


class ConstrainedParameters(PyroModule):
    """A `PyroModule` with a positive `PyroParam`, and one computed when first read."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(loadings())
        self.noise = PyroParam(torch.tensor(NOISE), constraint=constraints.positive)

    @PyroParam
    def bias(self):
        return intercept()

    def forward(self, v):
        sites(v, lambda h: h @ self.weight + self.bias, self.noise)


def constrained_parameters() -> Case:
    """σ is a positive `PyroParam`, b a lazy one."""
    return factor_case("constrained parameters", ConstrainedParameters())


class Decoder(nn.Module):
    """A plain module that holds W and b."""

    def __init__(self):
        super().__init__()
        self.linear = nn.utils.skip_init(nn.Linear, 2, 3)
        self.linear.weight = nn.Parameter(loadings().T)
        self.linear.bias = nn.Parameter(intercept())

    def forward(self, h):
        return self.linear(h)


def registered_module() -> Case:
    """W and b belong to a plain `nn.Module`, registered by `pyro.module`."""
    decoder = Decoder()

    def model(v):
        pyro.module("decoder", decoder)
        sites(v, decoder)

    return factor_case("registered module", model)


class Submodule(PyroModule):
    """A `PyroModule` whose decoder is a converted `nn.Linear`, with a frozen bias."""

    def __init__(self):
        super().__init__()
        self.decoder = Decoder()
        self.decoder.linear.bias.requires_grad_(False)
        pyro.nn.module.to_pyro_module_(self.decoder)

    def forward(self, v):
        sites(v, self.decoder)


def frozen_parameter() -> Case:
    """W and b belong to a submodule; b does not require gradients."""
    return factor_case("frozen parameter", Submodule())


class Buffers(PyroModule):
    """W a parameter; b and σ buffers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(loadings())
        self.register_buffer("bias", intercept())
        self.register_buffer("noise", torch.tensor(NOISE))

    def forward(self, v):
        sites(v, lambda h: h @ self.weight + self.bias, self.noise)


def buffers() -> Case:
    """b and σ are registered buffers."""
    return factor_case("buffers", Buffers())


def simplex_parameter() -> Case:
    """π on the simplex by `pyro.param`; z ~ Cat(π) enumerated, h ~ N(m_z, 0.7²), v ~ N(h, 0.9²)."""
    v = torch.tensor([-1.6, 0.9, 2.4, 0.1])
    initial, means = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([-1.0, 0.4, 1.9])

    def model(v):
        probs = pyro.param("probs", initial, constraint=constraints.simplex)
        with pyro.plate("units", len(v)):
            z = pyro.sample("z", dist.Categorical(probs), infer={"enumerate": "parallel"})
            h = pyro.sample("h", dist.Normal(means[z], 0.7))
            pyro.sample("v", dist.Normal(h, 0.9), obs=v)

    def guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(0.55 * v + 0.1, 0.95))

    marginal = dist.Normal(means, (0.7**2 + 0.9**2) ** 0.5).log_prob(v.unsqueeze(-1))
    exact = (initial.log() + marginal).logsumexp(-1)
    return Case("simplex parameter", model, guide, (v,), exact)


def single_precision() -> Case:
    """`param_statements` with data and parameters in float32; the exact value is not rounded."""

    def model(v):
        weight = pyro.param("weight", loadings().float())
        bias = pyro.param("bias", intercept().float())
        sites(v, lambda h: h @ weight + bias)

    case = factor_case("single precision", model)
    return Case(case.name, model, guide, (case.data[0].float(),), case.exact)


MAKERS = (
    param_statements,
    module_parameters,
    constrained_parameters,
    registered_module,
    frozen_parameter,
    buffers,
    simplex_parameter,
    single_precision,
)
