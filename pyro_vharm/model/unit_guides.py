"""Guides made from a model: a full-rank Gaussian for each unit, and the latents they guide."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuide, init_to_feasible
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import biject_to

from pyro_vharm.errors import InputError
from pyro_vharm.model.tracing import PyroFunction

__all__ = ["AutoUnitNormal", "expose_sites"]


def expose_sites(model: PyroFunction, names: Collection[str]) -> PyroFunction:
    """The model with no sites to be seen but some latents: what an autoguide is made from."""
    exposed: PyroFunction = poutine.block(model, expose=list(names))
    return exposed


class AutoUnitNormal(AutoGuide):  # type: ignore[misc]
    """A guide with a full-rank Gaussian for each unit, over all its latents, unconstrained.

    Pyro's `AutoMultivariateNormal` has one Gaussian for the latents of all units together, whose
    covariance grows with the square of their number, and no density per unit. Given θ units are
    independent, so their posteriors are too, and this guide has all of its reach that matters.
    Its parameters ``loc``, shape ``(unit, dim)``, and ``scale_tril``, shape ``(unit, dim, dim)``,
    belong to the units of the data that it first sees.

    Args:
        model: a Pyro model whose latents are continuous.
        unit_plate: name of the plate of independent units. Left out, the outermost plate that holds
            every latent; if there is none, all latents are one unit.
        init_loc_fn: where locations start; see Pyro's autoguides.
        init_scale: standard deviations at the start.

    Raises:
        InputError: on the first call, if a latent lies outside the plate or the plate subsamples.

    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         h = pyro.sample("h", dist.Normal(0.0, 1.0))
    ...         scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(h, scale), obs=x)
    >>> guide = AutoUnitNormal(model)
    >>> drawn = guide(torch.zeros(5))
    >>> drawn["scale"].shape, guide.scale_tril.shape
    (torch.Size([5]), torch.Size([5, 2, 2]))
    """

    def __init__(
        self,
        model: PyroFunction,
        *,
        unit_plate: str | None = None,
        init_loc_fn: Callable[..., Any] = init_to_feasible,
        init_scale: float = 0.1,
    ) -> None:
        if not init_scale > 0:
            raise InputError(f"init_scale must be positive, not {init_scale}")
        super().__init__(InitMessenger(init_loc_fn)(model))
        self.unit_plate = unit_plate
        self.init_scale = init_scale

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        sites = dict(self.prototype_trace.iter_stochastic_nodes())
        if not sites:
            raise InputError("model must have a latent site for a guide to guide")
        self._unit = self._find_plate(sites)
        self._shapes: dict[str, torch.Size] = {}
        parts = []
        for name, site in sites.items():
            start = biject_to(site["fn"].support).inv(site["value"].detach()).detach()
            batch = site["fn"].batch_shape
            event = start.shape[site["value"].dim() - site["fn"].event_dim :]
            self._shapes[name] = event
            parts.append(self._flatten(start.expand(batch + event), len(event)))
        loc = torch.cat(parts, -1)
        eye = torch.eye(loc.shape[-1], dtype=loc.dtype, device=loc.device)
        scale = (self.init_scale * eye).expand(*loc.shape, -1).clone()
        self.loc = PyroParam(loc, constraints.real, event_dim=1)
        self.scale_tril = PyroParam(scale, constraints.softplus_lower_cholesky, event_dim=2)

    def _find_plate(self, sites: dict[str, Any]) -> Any:
        plates = [
            {f.name: f for f in s["cond_indep_stack"] if f.vectorized} for s in sites.values()
        ]
        common = set.intersection(*map(set, plates))
        if self.unit_plate is not None and self.unit_plate not in common:
            raise InputError(f"unit_plate={self.unit_plate!r} does not hold every latent site")
        if not common:
            return None
        outermost = min(common, key=lambda name: plates[0][name].dim)
        frame = plates[0][self.unit_plate or outermost]
        if frame.full_size not in (None, frame.size):
            raise InputError(
                f"the plate {frame.name!r} is subsampled, and this guide has parameters for the "
                "units that it first sees; pass all data in one call"
            )
        return frame

    def _flatten(self, value: Tensor, event_dim: int) -> Tensor:
        """From ``(*batch, *event)`` to ``(unit, dim)``, or ``(dim,)`` of one unit."""
        if self._unit is None:
            return value.reshape(-1)
        moved = value.movedim(self._unit.dim - event_dim, 0)
        return moved.reshape(len(moved), -1)

    def _unflatten(self, part: Tensor, name: str) -> Tensor:
        """The inverse, for parts of a draw: ``(*particles, unit, 1, …, dim)``."""
        batch = self.prototype_trace.nodes[name]["fn"].batch_shape
        event = self._shapes[name]
        if self._unit is None:
            outer = part.shape[:-1]
            return part.reshape(outer[: max(len(outer) - len(batch), 0)] + batch + event)
        right = -self._unit.dim - 1
        left = batch[: len(batch) - right - 1]
        inner = batch[len(batch) - right :]
        outer = part.shape[: part.dim() - 2 - right]
        lead = outer[: max(len(outer) - len(left), 0)]
        whole = part.reshape(lead + part.shape[len(outer) : len(outer) + 1] + left + inner + event)
        return whole.movedim(len(lead), len(lead) + len(left))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """A draw of every latent, with the arguments of the model."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        drawn = self._draw(plates)
        found, begin = {}, 0
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            batch, event = site["fn"].batch_shape, self._shapes[name]
            units = 1 if self._unit is None else self._unit.size
            end = begin + (batch + event).numel() // units
            unconstrained = self._unflatten(drawn[..., begin:end], name)
            begin = end
            transform = biject_to(site["fn"].support)
            value = transform(unconstrained)
            volume = transform.inv.log_abs_det_jacobian(value, unconstrained)
            extra = volume.dim() - (value.dim() - site["fn"].event_dim)
            volume = volume.sum(list(range(-extra, 0))) if extra else volume
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                point = dist.Delta(value, log_density=volume, event_dim=site["fn"].event_dim)
                found[name] = pyro.sample(name, point)
        return found

    def _draw(self, plates: dict[str, Any]) -> Tensor:
        loc, scale = self.loc, self.scale_tril
        with ExitStack() as stack:
            if self._unit is not None:
                inner = (1,) * (-self._unit.dim - 1)
                loc = loc.reshape(loc.shape[:1] + inner + loc.shape[1:])
                scale = scale.reshape(scale.shape[:1] + inner + scale.shape[1:])
                stack.enter_context(plates[self._unit.name])
            normal = dist.MultivariateNormal(loc, scale_tril=scale)
            drawn: Tensor = pyro.sample("_unit_latent", normal, infer={"is_auxiliary": True})
            return drawn
