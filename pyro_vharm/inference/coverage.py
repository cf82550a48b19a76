"""Whether what is matched to a posterior covers the mass that draws of the prior find."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.particles import log_mean_exp

__all__ = ["FAR", "Weighed", "finds_no_new_mass"]

FAR = 2.5  # standard deviations from a mean beyond which a Gaussian does not cover a peak
_NEW_MASS = 0.5  # nats that draws of the prior may add


class Weighed(NamedTuple):
    """Points with the densities that weigh them, each of shape ``(particle, unit)``.

    Attributes:
        log_prior: log p(h; θ).
        log_joint: log p(v, h; θ).
        log_matched: log density of what is matched to the posterior.
    """

    log_prior: Tensor
    log_joint: Tensor
    log_matched: Tensor

    @classmethod
    def at(cls, densities: UnitDensities, latents: Tensor, log_matched: Tensor) -> Weighed:
        """Of latents ``(particle, unit, dim)``; without a joint density they weigh nothing."""
        with torch.no_grad():
            terms = densities.terms(latents)
        return cls(terms.log_prior, terms.log_joint.nan_to_num(nan=-torch.inf), log_matched)

    @property
    def log_weights(self) -> Tensor:
        """Of draws of what is matched."""
        return self.log_joint - self.log_matched


def finds_no_new_mass(own: Weighed, scouts: Weighed) -> Tensor:
    """Whether draws of the prior add next to nothing to what is matched, shape ``(unit,)``.

    Both kinds of draws, weighed under their mixture, must have about the mean of the first kind's
    weights.

    Args:
        own: draws of what is matched.
        scouts: draws of the prior.
    """
    both = Weighed(*(torch.cat(pair) for pair in zip(own, scouts, strict=True)))
    share = len(own.log_joint) / len(both.log_joint)
    mixture = torch.logaddexp(
        both.log_matched + math.log(share), both.log_prior + math.log1p(-share)
    )
    total = log_mean_exp(both.log_joint - mixture)
    return total - log_mean_exp(own.log_weights) < _NEW_MASS
