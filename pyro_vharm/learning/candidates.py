"""Candidates for the guide and objective of a model, and the ladder of the usual ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pyro.infer.autoguide import AutoDelta, AutoIAFNormal, AutoNormal

from pyro_vharm.errors import InputError
from pyro_vharm.inference.quadrature import MOST_DIMENSIONS
from pyro_vharm.learning.objective_value import OwnObjective, check_objective
from pyro_vharm.model.data import Data
from pyro_vharm.model.problem import prepare
from pyro_vharm.model.state import untouched
from pyro_vharm.model.tracing import PyroFunction
from pyro_vharm.model.unit_guides import AutoUnitNormal, expose_sites
from pyro_vharm.objectives.exact import ExactEvidence
from pyro_vharm.objectives.importance_weighted import ImportanceWeightedELBO

__all__ = ["Candidate", "MakeGuide", "guide_ladder"]

type MakeGuide = Callable[[PyroFunction], PyroFunction]

_WEIGHTS = 16


@dataclass(frozen=True)
class Candidate:
    """A guide to train a model with, and on what.

    Args:
        guide: model → a new guide for it, such as `AutoNormal` itself.
        objective: what to train on, as `SVI` takes it for ``loss=``; ``None`` for what all
            candidates without one are trained on.
    """

    guide: MakeGuide
    objective: OwnObjective | None = None

    def __post_init__(self) -> None:
        if not callable(self.guide):
            raise InputError(
                "guide must be a callable from a model to a new guide, such as AutoNormal, not "
                f"{self.guide!r}"
            )
        check_objective(self.objective)


def guide_ladder(
    model: PyroFunction, data: Data, *, unit_plate: str | None = None
) -> dict[str, Candidate]:
    """The usual guides and objectives for a model, from crude to exact, for `compare_guides`.

    * *point mass*: `AutoDelta`, the mode of the latents; it has no bound.
    * *mean field*: `AutoNormal`, a Gaussian for every latent by itself.
    * *full rank*: `AutoUnitNormal`, one Gaussian for all latents of a unit; where a unit has more
      than one dimension.
    * *flow*: `AutoIAFNormal`, an inverse autoregressive flow; where the data are one joint unit of
      more than one dimension, as it has no density per unit.
    * *importance-weighted*: the mean field, trained on `ImportanceWeightedELBO` with 16 weights.
    * *exact*: log evidence itself, by `ExactEvidence`; up to three continuous dimensions per unit.

    Which of these there are depends on the units of the data. Discrete latents are summed out in
    all of them; where there are no others, *exact* is the only one.

    Args:
        model: a Pyro model.
        data: the training data; nothing is trained on it here.
        unit_plate: name of the plate of independent units; found if left out.

    Raises:
        InputError: where model or data break a constraint.

    >>> import pyro, torch, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         h = pyro.sample("h", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...         pyro.sample("x", dist.Normal(h.sum(-1), 1.0), obs=x)
    >>> list(guide_ladder(model, (torch.zeros(3),)))
    ['point mass', 'mean field', 'full rank', 'importance-weighted', 'exact']
    """
    with untouched(0, model):
        densities = prepare(model, None, data, unit_plate=unit_plate).densities[0]
    names, plate, dim = densities.structure.continuous, densities.layout.plate, densities.dim

    def guided(make: MakeGuide) -> MakeGuide:
        return lambda again: make(expose_sites(again, names))

    mean_field = guided(AutoNormal)
    if dim == 0:
        return {"exact": Candidate(_no_guide, ExactEvidence(unit_plate=plate))}
    ladder = {
        "point mass": Candidate(guided(AutoDelta)),
        "mean field": Candidate(mean_field),
    }
    if dim > 1:
        full = guided(lambda again: AutoUnitNormal(again, unit_plate=plate))
        ladder["full rank"] = Candidate(full)
        if plate is None:
            ladder["flow"] = Candidate(guided(AutoIAFNormal))
    weighted = ImportanceWeightedELBO(_WEIGHTS, unit_plate=plate)
    ladder["importance-weighted"] = Candidate(mean_field, weighted)
    if dim <= MOST_DIMENSIONS:
        ladder["exact"] = Candidate(mean_field, ExactEvidence(unit_plate=plate))
    return ladder


def _no_guide(_model: PyroFunction) -> PyroFunction:
    def guide(*_args: object, **_kwargs: object) -> None:
        """Draws nothing."""

    return guide
