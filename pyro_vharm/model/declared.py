"""Sites that the guide holds as point masses, declared to be parameters of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.model.data import Batch
from pyro_vharm.model.parameters import Parameters, capture_parameters
from pyro_vharm.model.sites import fixed_sites
from pyro_vharm.model.tracing import PyroFunction, trace_call

__all__ = ["DeclaredModel", "declare"]


@dataclass(frozen=True)
class DeclaredModel:
    """A model in which some latent sites are observed at the points where the guide holds them.

    Attributes:
        model: the model as the user wrote it.
        whole_guide: the guide with its point masses.
        names: the declared sites.
    """

    model: PyroFunction
    whole_guide: PyroFunction
    names: tuple[str, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model at the guide's present points."""
        return poutine.condition(self.model, data=self.points(*args, **kwargs))(*args, **kwargs)

    def points(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Where the guide holds the declared sites, differentiable in its parameters."""
        with poutine.block():  # also from the plate of particles: these sites have one value
            trace = poutine.trace(self.whole_guide).get_trace(*args, **kwargs)
        return {name: trace.nodes[name]["value"] for name in self.names}

    def split(self, batch: Batch) -> tuple[Parameters, Parameters]:
        """The guide's parameters that the points are made of, and the others."""
        guide = capture_parameters(self.whole_guide, batch)
        with torch.enable_grad():
            points = self.points(*batch.args, **batch.kwargs).values()
            total = torch.stack([point.sum() for point in points]).sum()
            leaves = guide.leaves
            learned = [name for name, leaf in leaves.items() if leaf.requires_grad]
            gradients = torch.autograd.grad(
                total, [leaves[name] for name in learned], allow_unused=True
            )
        own = {name for name, g in zip(learned, gradients, strict=True) if g is not None}
        return guide.select(own), guide.select(leaves.keys() - own)


def declare(
    model: PyroFunction, guide: PyroFunction | None, names: Sequence[str], batch: Batch
) -> tuple[PyroFunction, PyroFunction | None]:
    """The model with some sites as parameters, and the guide without them.

    Raises:
        InputError: if the names are not a list of sites that the guide holds as point masses.
    """
    if not names or isinstance(model, DeclaredModel):
        return model, guide
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise InputError(f"parameters must be a list of site names, not {names!r}")
    if guide is None:
        raise InputError(f"parameters={list(names)} needs the guide that holds them as points")
    fixed = fixed_sites(trace_call(guide, batch), trace_call(guide, batch))
    wrong = sorted(set(names) - set(fixed))
    if wrong:
        raise InputError(
            f"parameters must name sites that the guide holds as point masses (Delta), which are "
            f"{sorted(fixed)}; {wrong} are not"
        )
    return DeclaredModel(model, guide, tuple(names)), poutine.block(guide, hide=list(names))
