"""Sums of a trace's factors over everything but particles and units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vharm.model.enumeration import Factor, sum_out
from pyro_vharm.model.sites import sample_sites
from pyro_vharm.model.tracing import PARTICLES
from pyro_vharm.model.units import UnitLayout

__all__ = ["UnitSums", "count_units"]


class UnitSums(NamedTuple):
    """Sums the factors of one trace.

    Attributes:
        trace: of a model or guide.
        layout: which batch dim counts units.
        num_particles: under a plate of how many particles it ran; ``None`` without one.
        num_units: how many units there are.
    """

    trace: Trace
    layout: UnitLayout
    num_particles: int | None
    num_units: int

    def product(self, factors: Sequence[Factor]) -> Tensor:
        """Log of the product, ``(particle, unit)``, one particle without a plate of them."""
        count = self.num_particles or 1
        terms = [self.layout.by_unit(term, count, self.num_units) for _, term in factors]
        if terms:
            return sum(terms[1:], start=terms[0])
        like = next((site["value"] for site in sample_sites(self.trace)), torch.zeros(()))
        return torch.zeros(count, self.num_units, device=like.device)

    def summed_out(self, factors: Sequence[Factor]) -> Tensor:
        """The same with every enumerated site summed out."""
        log_prob = sum_out(self.trace, factors, self.layout, PARTICLES)
        return self.layout.by_unit(log_prob, self.num_particles or 1, self.num_units)


def count_units(trace: Trace, layout: UnitLayout) -> int:
    """The number of units in one run, 1 for a joint unit."""
    if layout.plate is None:
        return 1
    for site in trace.nodes.values():
        if site["type"] == "sample":
            for frame in site["cond_indep_stack"]:
                if frame.name == layout.plate:
                    size: int = frame.size
                    return size
    return 1
