"""The importance-weighted bound per unit, as a Pyro ELBO."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from pyro.infer import ELBO
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vharm.errors import InputError
from pyro_vharm.model.data import Batch, with_subsample
from pyro_vharm.model.guide_runs import run_guide
from pyro_vharm.model.model_runs import run_model_at
from pyro_vharm.model.parameters import check_disjoint
from pyro_vharm.model.problem import capture_pair, objective_structure
from pyro_vharm.model.sites import subsample_sites
from pyro_vharm.model.structure import Structure
from pyro_vharm.model.tracing import PyroFunction, trace_call

__all__ = ["ImportanceWeightedELBO", "UnitBound", "importance_weighted_bound"]


class UnitBound(NamedTuple):
    """A stochastic lower bound per unit and what to differentiate.

    Attributes:
        values: estimates of the bound per unit, in nats, detached, shape ``(unit,)``.
        surrogate: a scalar whose gradient is that of the sum of the bounds; its value means
            nothing.
        scale: the factor from subsampling that an objective puts on the sum.
    """

    values: Tensor
    surrogate: Tensor
    scale: float


def importance_weighted_bound(
    model: PyroFunction,
    guide: PyroFunction,
    batch: Batch,
    structure: Structure,
    num_particles: int,
    num_replicates: int = 1,
) -> UnitBound:
    """The K-particle bound of each unit, averaged over independent replicates, with gradients.

    L_K = E[log (1/K) Σ_k w_k] ≤ log p(v; θ), with w = p(v, h; θ) / q(h). With w̃ the weights
    normalised over K, the gradient for θ is Σ w̃ ∇_θ log p, and for φ, doubly reparameterised,
    Σ w̃² (∂log w/∂h) (∂h/∂φ), which for K = 1 is the gradient that sticks the landing.

    Where log q can be had in total only, all units are one joint unit.

    The model is run once, at latents whose gradients a hook multiplies by w̃: the one backward
    pass of Σ w̃ log p then gives both parts. The guide is run a second time at its draws as fixed
    leaves, so that log q enters as a function of h alone.

    A guide that computes latents from its draws by a function with parameters of its own
    (AutoStructured, AutoGaussian) takes the plain pathwise gradient Σ w̃ ∇ log w: the function's
    part of log q is no score term, and must stay.

    Raises:
        InputError: if a site of the guide cannot be reparameterised.

    Source: "Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives", Tucker,
    Lawson, Gu, Maddison (2019); "Sticking the Landing", Roeder, Wu, Duvenaud (2017).
    """
    count = num_particles * num_replicates
    structure = structure.as_guide_splits()
    layout, dims = structure.layout, structure.dims
    batch = _hold_indices(model, guide, batch, structure)
    drawn = run_guide(guide, batch, structure, count)
    if drawn.irreproducible:
        raise InputError(
            f"the guide's sites {list(drawn.irreproducible)} cannot be reparameterised, which the "
            "gradient for the guide needs; leave discrete latents out of the guide, so that they "
            "are summed out"
        )
    latents = {name: value.view_as(value) for name, value in drawn.values.items()}
    at = run_model_at(model, batch, structure, count, drawn._replace(values=latents))
    values, weights = _bound_and_weights(at.log_joint, drawn.log_guide, num_particles)
    if batch.num_padded:
        values, weights[:, -batch.num_padded :] = values[: -batch.num_padded], 0.0
    shares = weights / num_replicates
    if structure.learned_transforms:
        return UnitBound(values, (shares * (at.log_joint - drawn.log_guide)).sum(), at.scale)
    for name, value in latents.items():
        if value.requires_grad:
            value.register_hook(_scaled_by(layout.over_site(weights, dims[name].event_dim)))
    surrogate = (shares * at.log_joint).sum()

    leaves = {name: drawn.values[name].detach().requires_grad_() for name in drawn.random}
    fixed = run_guide(guide, batch, structure, count, leaves)
    log_guide = (shares * fixed.log_guide).sum()
    if not log_guide.requires_grad:  # a guide with flat densities
        return UnitBound(values, surrogate, at.scale)
    gradients = torch.autograd.grad(log_guide, list(leaves.values()), allow_unused=True)
    for name, gradient in zip(drawn.random, gradients, strict=True):
        if gradient is None:
            continue
        squared = layout.over_site(weights, dims[name].event_dim) * gradient
        surrogate = surrogate - (squared * drawn.values[name]).sum()
    return UnitBound(values, surrogate, at.scale)


def _hold_indices(
    model: PyroFunction, guide: PyroFunction, batch: Batch, structure: Structure
) -> Batch:
    """Draw the indices of plates that subsample once, for all runs of guide and model."""
    if structure.subsampled <= batch.subsample.keys():
        return batch
    with torch.no_grad():
        for function in (guide, model):
            found = subsample_sites(trace_call(function, batch))
            batch = with_subsample(batch, {name: site["value"] for name, site in found.items()})
    return batch


def _scaled_by(factor: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * factor


def _bound_and_weights(
    log_joint: Tensor, log_guide: Tensor, num_particles: int
) -> tuple[Tensor, Tensor]:
    log_weights = (log_joint - log_guide.to(log_joint.device)).detach()
    grouped = log_weights.reshape(-1, num_particles, log_weights.shape[1])
    values = (torch.logsumexp(grouped, 1) - math.log(num_particles)).mean(0)
    return values, torch.softmax(grouped, 1).reshape(log_weights.shape)


class ImportanceWeightedELBO(ELBO):  # type: ignore[misc]
    """Importance-weighted lower bound Σ_u E[log (1/K) Σ_k w_uk], for `SVI` or as a loss module.

    Each unit has its own K weights, so the bound tightens toward Σ_u log p(v_u; θ) as K grows.
    Under subsampling each unit's bound is multiplied by the plate's scale, outside the
    logarithm, so that minibatches give unbiased gradients. The loss is its negative, in nats.

    Args:
        num_particles: K, importance samples inside the logarithm.
        num_replicates: independent bounds to average; lowers the gradient's variance only.
        unit_plate: name of the plate of independent units. Left out, it is the outermost plate
            that holds every site; without one, the weights are those of the whole data set.

    Raises:
        InputError: on the first call, if the guide cannot be evaluated per unit or not be
            reparameterised, or shares parameters with the model.

    Source: "Importance Weighted Autoencoders", Burda, Grosse, Salakhutdinov (2016).

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer import SVI
    >>> def model(x):
    ...     scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    ...     with pyro.plate("data", len(x)):
    ...         h = pyro.sample("h", dist.Normal(0.0, scale))
    ...         pyro.sample("x", dist.Normal(h, 1.0), obs=x)
    >>> def guide(x):
    ...     slope = pyro.param("slope", torch.tensor(0.5))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("h", dist.Normal(slope * x, 0.7))
    >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), ImportanceWeightedELBO(8))
    >>> isinstance(svi.step(torch.tensor([1.0, -2.0])), float)
    True
    """

    def __init__(
        self, num_particles: int = 1, *, num_replicates: int = 1, unit_plate: str | None = None
    ) -> None:
        for name, value in (("num_particles", num_particles), ("num_replicates", num_replicates)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        super().__init__(num_particles=num_particles)
        self.num_replicates = num_replicates
        self.unit_plate = unit_plate
        self._structures: dict[Hashable, Structure] = {}

    def differentiable_loss(
        self, model: PyroFunction, guide: PyroFunction, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss as a tensor whose gradient is the estimator described above."""
        batch = Batch(args, kwargs)
        structure = self._find_structure(model, guide, batch)
        bound = importance_weighted_bound(
            model, guide, batch, structure, self.num_particles, self.num_replicates
        )
        value = -bound.values.sum()
        return bound.scale * (value - bound.surrogate + bound.surrogate.detach())

    def loss(self, model: PyroFunction, guide: PyroFunction, *args: Any, **kwargs: Any) -> float:
        """An estimate of the loss."""
        batch = Batch(args, kwargs)
        structure = self._find_structure(model, guide, batch)
        structure = structure.as_guide_splits()
        with torch.no_grad():
            count = self.num_particles * self.num_replicates
            batch = _hold_indices(model, guide, batch, structure)
            drawn = run_guide(guide, batch, structure, count)
            at = run_model_at(model, batch, structure, count, drawn)
            values, _ = _bound_and_weights(at.log_joint, drawn.log_guide, self.num_particles)
        return -at.scale * float(values.sum())

    def loss_and_grads(
        self, model: PyroFunction, guide: PyroFunction, *args: Any, **kwargs: Any
    ) -> float:
        """An estimate of the loss; its gradients are added to the parameters' ``.grad``."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return float(loss.detach())

    def _find_structure(self, model: PyroFunction, guide: PyroFunction, batch: Batch) -> Structure:
        kinds = tuple(_kind(leaf) for leaf in pytree.tree_leaves((batch.args, dict(batch.kwargs))))
        key = model, guide, kinds  # the objects: an id may come back after they are gone
        if key not in self._structures:
            self._structures[key] = objective_structure(model, guide, batch, self.unit_plate)
            check_disjoint(*capture_pair(model, guide, batch))
        return self._structures[key]

    def _get_trace(self, *_: Any) -> Any:
        raise TypeError("this objective runs model and guide for all particles at once")


def _kind(argument: Any) -> Hashable:
    """What an argument may decide about the sites of a model: whether it is there, its dims."""
    if isinstance(argument, Tensor):
        return argument.dim(), argument.dtype
    return argument if isinstance(argument, int | str) else type(argument).__qualname__
