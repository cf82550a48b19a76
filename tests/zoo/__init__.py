"""Pyro models of many kinds with exact log evidence per unit, each with an imperfect guide."""

from . import (
    continuous,
    discrete,
    effects,
    hierarchical,
    networks,
    parameters,
    plates,
    sequences,
)
from .basics import (
    LOADINGS,
    NOISE,
    joint_unit,
    linear_gaussian,
    linear_gaussian_evidence,
    linear_gaussian_posterior,
    normal_guide,
    normal_model,
    two_modes,
)
from .continuous import beta_binomial, dirichlet_multinomial, gamma_poisson
from .plates import nested_plates

__all__ = [
    "BASICS",
    "LOADINGS",
    "NOISE",
    "ONE_DRAW_AT_A_TIME",
    "ZOO",
    "beta_binomial",
    "dirichlet_multinomial",
    "gamma_poisson",
    "joint_unit",
    "linear_gaussian",
    "linear_gaussian_evidence",
    "linear_gaussian_posterior",
    "nested_plates",
    "normal_guide",
    "normal_model",
    "two_modes",
]

MODULES = (
    continuous,
    plates,
    effects,
    sequences,
    discrete,
    hierarchical,
    parameters,
    networks,
)
ZOO = tuple(maker for module in MODULES for maker in module.MAKERS)

ONE_DRAW_AT_A_TIME = (*hierarchical.ONE_DRAW_AT_A_TIME, *networks.ONE_DRAW_AT_A_TIME)
"""Makers of models that cannot run under a plate of particles."""

BASICS = (
    linear_gaussian,
    gamma_poisson,
    beta_binomial,
    dirichlet_multinomial,
    two_modes,
    nested_plates,
    joint_unit,
)
"""Makers that every estimator is run on."""
