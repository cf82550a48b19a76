"""Nodes and log weights for expectations under a standard normal or a uniform density."""

import numpy as np
import torch
from torch.distributions import Normal


def product(nodes, dim):
    """Every combination of `dim` nodes, one a row."""
    return torch.stack(torch.meshgrid(*[nodes] * dim, indexing="ij"), -1).reshape(-1, dim)


def normal_nodes(dim, num=161, bound=8.0):
    """Trapezium rule for E[f(z)], z ~ N(0, I): nodes (num^dim, dim), log weights (num^dim,)."""
    nodes = torch.linspace(-bound, bound, num)
    log_weights = Normal(0.0, 1.0).log_prob(nodes) + (nodes[1] - nodes[0]).log()
    return product(nodes, dim), product(log_weights, dim).sum(-1)


def uniform_nodes(dim, num=100):
    """Gauss-Legendre rule for E[f(u)], u uniform on (0, 1)^dim: nodes and log weights alike."""
    nodes, weights = (torch.as_tensor(x) for x in np.polynomial.legendre.leggauss(num))
    return product((nodes + 1) / 2, dim), product((weights / 2).log(), dim).sum(-1)


def log_expectation(log_values, log_weights):
    """log Σ_i w_i f_i for `log_values` of shape (node, unit)."""
    return torch.logsumexp(log_values + log_weights[:, None], 0)
