"""What every objective shares: from a call by `SVI` to the densities of its units, and back."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Self

import torch
from pyro.infer import ELBO
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import UnitEstimates
from pyro_vharm.model.data import Batch
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.parameters import check_disjoint
from pyro_vharm.model.problem import call_densities, capture_pair, checked_densities
from pyro_vharm.model.structure import Structure
from pyro_vharm.model.subsampling import hold_indices
from pyro_vharm.model.tracing import PyroFunction

__all__ = ["ObjectiveReport", "Side", "UnitObjective", "UnitTerms"]

_MOST_SHAPES = 64

type Side = Literal["lower", "upper", "exact"]


class UnitTerms(NamedTuple):
    """What an objective finds for one batch.

    Attributes:
        per_unit: what it says of log p(v_u; θ), in nats, detached.
        loss: a scalar, the sum over units of the loss, whose value and gradient are those to
            descend; without the factor from subsampling.
        scale: the factor from subsampling.
        acceptance: mean acceptance probability of each unit's transitions, shape ``(unit,)``.
        side: which side of log p(v_u; θ) it is on, where that is not the objective's own.
    """

    per_unit: UnitEstimates
    loss: Tensor
    scale: float
    acceptance: Tensor | None = None
    side: Side | None = None


class ObjectiveReport(NamedTuple):
    """What an objective said of each unit when it was last evaluated, next to its loss.

    Attributes:
        per_unit: stochastic bounds on log p(v_u; θ), or its value, in nats, with their Monte Carlo
            errors; one value for all units where log q can be had in total only.
        side: ``"lower"``, ``"upper"`` or ``"exact"``: which side of log p(v_u; θ) they are on.
        acceptance: mean acceptance probability of each unit's transitions; ``None`` without any.
    """

    per_unit: UnitEstimates
    side: Side
    acceptance: Tensor | None

    def __str__(self) -> str:
        total = self.per_unit.total()
        what = "log evidence" if self.side == "exact" else f"{self.side} bound on log evidence"
        accepted = "" if self.acceptance is None else f", acceptance {self.acceptance.mean():.2f}"
        return f"{what}: {total} nats in {total.num_units} units ({total.kind}){accepted}"


class UnitObjective(ELBO, ABC):  # type: ignore[misc]
    """An objective made of one term per unit, for `SVI` or as a loss module.

    ``SVI(model, guide, optim, loss=objective)`` and ``objective(model, guide)(*args)``, with a
    torch optimizer, both work. The terms of the units of a minibatch are summed and multiplied by
    the plate's scale, outside any logarithm.

    Attributes:
        side: which side of log p(v_u; θ) its terms bound.
        needs_guide_density: whether the guide must have a density.
        shares_parameters: whether it is right where model and guide have parameters in common.
        latest: what was found when it was last evaluated; ``None`` before.
    """

    side: Side = "lower"
    needs_guide_density = True
    shares_parameters = True

    def __init__(self, *, num_particles: int = 1, unit_plate: str | None = None) -> None:
        if num_particles < 1:
            raise InputError(f"num_particles must be at least 1, not {num_particles}")
        super().__init__(num_particles=num_particles)
        self.unit_plate = unit_plate
        self.latest: ObjectiveReport | None
        self._structures: dict[Hashable, Structure]
        self._shapes: dict[Hashable, UnitDensities]
        self.forget()

    @property
    def title(self) -> str:
        """What it is, for tables."""
        return type(self).__name__

    def __repr__(self) -> str:
        own = inspect.signature(type(self).__init__).parameters
        given = ", ".join(f"{n}={getattr(self, n)!r}" for n in own if n != "self")
        return f"{type(self).__name__}({given})"

    def renewed(self) -> Self:
        """A copy with the same settings, without what is carried from call to call."""
        again = copy.copy(self)
        again.forget()
        return again

    def forget(self) -> None:
        """Drop what is carried from call to call."""
        self.latest = None
        self._structures = {}
        self._shapes = {}

    def carried(self) -> dict[str, Any]:
        """What is carried from call to call, as plain tensors and numbers, to be written down."""
        return {}

    def carry(self, carried: Mapping[str, Any]) -> None:
        """Go on with what `carried` gave."""

    def leaves(self, densities: UnitDensities) -> list[Tensor]:
        """Parameters of the objective itself, unconstrained, to be trained with θ and φ."""
        return []

    @abstractmethod
    def evaluate(self, densities: UnitDensities) -> UnitTerms:
        """The terms of a batch of units, differentiable in θ and φ where gradients are on."""

    def check(self, densities: UnitDensities) -> None:
        """Refuse a model and guide that the objective cannot train.

        Raises:
            InputError: saying what stands in the way.
        """
        if self.needs_guide_density and not densities.has_guide_density:
            raise InputError(
                "the guide holds continuous latents as point masses (Delta), so "
                f"{type(self).__name__} has no bound to train on; use a guide with a density, "
                "such as AutoNormal"
            )
        if not self.shares_parameters:
            check_disjoint(*capture_pair(densities.model, densities.guide, densities.batch))

    def differentiable_loss(
        self, model: PyroFunction, guide: PyroFunction, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss as a tensor whose gradient is the objective's estimator, in nats."""
        terms = self.evaluate(self._densities(model, guide, Batch(args, kwargs)))
        self.latest = ObjectiveReport(terms.per_unit, terms.side or self.side, terms.acceptance)
        return terms.scale * terms.loss

    def loss(self, model: PyroFunction, guide: PyroFunction, *args: Any, **kwargs: Any) -> float:
        """An estimate of the loss, in nats."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(
        self, model: PyroFunction, guide: PyroFunction, *args: Any, **kwargs: Any
    ) -> float:
        """An estimate of the loss; its gradients are added to the parameters' ``.grad``."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())

    def _densities(self, model: PyroFunction, guide: PyroFunction, batch: Batch) -> UnitDensities:
        """The densities of one call: checked at the first of its kind, read anew for each shape."""
        leaves = pytree.tree_leaves((batch.args, dict(batch.kwargs)))
        key: Hashable = (model, guide, tuple(map(_kind, leaves)))  # the objects: ids come back
        if key not in self._structures:
            checked = checked_densities(model, guide, batch, self.unit_plate)
            self.check(checked)
            self._structures[key] = checked.structure
        structure = self._structures[key]
        batch = hold_indices(model, guide, batch, structure.subsampled)
        shape = (key, tuple(map(_shape, leaves)))
        if shape not in self._shapes:
            if len(self._shapes) == _MOST_SHAPES:
                del self._shapes[next(iter(self._shapes))]
            made = call_densities(model, guide, batch, structure)
            self._shapes[shape] = replace(made, batch=Batch())
        return replace(self._shapes[shape], batch=batch)

    def _get_trace(self, *_: Any) -> Any:
        raise TypeError("this objective runs model and guide for all particles at once")


def _kind(argument: Any) -> Hashable:
    """What an argument may decide about the sites of a model: whether it is there, its dims."""
    if isinstance(argument, Tensor):
        return argument.dim(), argument.dtype
    return argument if isinstance(argument, int | str) else type(argument).__qualname__


def _shape(argument: Any) -> Hashable:
    return (tuple(argument.shape), argument.device) if isinstance(argument, Tensor) else None
