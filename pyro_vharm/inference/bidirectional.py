"""Bidirectional Monte Carlo on data from the model: how narrow a sandwich the settings earn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Bound, Kind
from pyro_vharm.inference.annealing import AnnealedImportanceSampling
from pyro_vharm.inference.estimation import pooled_upper_bounds
from pyro_vharm.model.data import Data
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.problem import Problem, prepare
from pyro_vharm.model.simulation import Rebuild, simulate_batch
from pyro_vharm.model.state import untouched
from pyro_vharm.model.tracing import PyroFunction
from pyro_vharm.particles import log_mean_exp
from pyro_vharm.tables import html_table, nats, text_table

__all__ = ["Sandwich", "bdmc", "simulate_densities"]


@dataclass(frozen=True)
class Sandwich:
    """Log evidence of simulated data from both sides, in nats.

    Attributes:
        lower: stochastic lower bounds log Ẑ of each unit, shape ``(unit,)``.
        upper: stochastic upper bounds of each unit, from the forward runs and one back from the
            exact posterior draw that made its data, shape ``(unit,)``.
        acceptance: mean acceptance probability of each unit's forward runs, shape ``(unit,)``; NaN
            for units that need one temperature, as none of their particles moves.
        method: the method's settings.
    """

    lower: Tensor
    upper: Tensor
    acceptance: Tensor
    method: str

    @property
    def widths(self) -> Tensor:
        """Upper less lower bound of each unit; their mean is above 0, single ones may not be."""
        return self.upper - self.lower

    def total_lower(self, delta: float = 0.05) -> Bound:
        """A lower bound on the total that fails with probability at most delta, by Markov."""
        value = float(self.lower.double().sum()) - math.log(1 / delta)
        return Bound(value, "lower", Kind.CERTIFIED, 1 - delta)

    def total_upper(self, delta: float = 0.05) -> Bound:
        """An upper bound on the total, mirrored: certified, as the draws are exact."""
        value = float(self.upper.double().sum()) + math.log(1 / delta)
        return Bound(value, "upper", Kind.CERTIFIED, 1 - delta)

    def __str__(self) -> str:
        widths = self.widths.double()
        error = float(widths.std()) / len(widths) ** 0.5 if len(widths) > 1 else math.nan
        rows = [
            [
                "lower bound",
                nats(float(self.lower.double().sum())),
                nats(float(self.lower.mean()), 4),
            ],
            [
                "upper bound",
                nats(float(self.upper.double().sum())),
                nats(float(self.upper.mean()), 4),
            ],
            ["width", nats(float(widths.sum())), nats(float(widths.mean()), 4)],
        ]
        footer = [
            f"{len(widths)} simulated units, by {self.method}",
            f"width per unit {float(widths.mean()):.4f} ± {error:.4f}, largest "
            f"{float(widths.max()):.3f}{self._moved}",
            "an indication of what the same settings earn on real data like these, no guarantee",
        ]
        return "\n".join([text_table(["simulated data", "total", "per unit"], rows), *footer])

    @property
    def _moved(self) -> str:
        moved = self.acceptance[~self.acceptance.isnan()]
        return f"; acceptance {float(moved.mean()):.2f}" if len(moved) else ""

    def _repr_html_(self) -> str:
        return html_table(str(self))


def bdmc(
    model: PyroFunction,
    data: Data,
    *,
    guide: PyroFunction | None = None,
    method: AnnealedImportanceSampling | None = None,
    rebuild: Rebuild | None = None,
    unit_plate: str | None = None,
    parameters: Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> Sandwich:
    """Simulate data from the model, and bound their log evidence from both sides.

    The latents h* that made the data v are one exact draw from p(h | v; θ). With w* the weight of a
    run back from it and w_1 … w_K those of the forward runs, Ẑ = (w* + Σ_k w_k) / (K + 1) has
    E[1/Ẑ] = 1/p(v; θ): log Ẑ is a stochastic upper bound without any trust in chains, and the log
    mean of the w_k alone the lower one. For weights of variance V, relative to their squared mean,
    they lie about V/K apart. Whatever the pilot tunes depends on v and on other random numbers,
    never on h*. How close the two come is what the settings earn on data like these.

    Args:
        model: a Pyro model that can simulate its data; see `simulate`.
        data: one call's arguments, or batches: they say how many units to draw.
        guide: a trained guide; its draws for the simulated data say where to look.
        method: the annealing whose settings are tried.
        rebuild: makes arguments from simulated values, where they are not arguments themselves;
            see `simulate`.
        unit_plate: name of the plate of independent units; found if left out.
        parameters: sites that the guide holds as point masses and that count as θ.
        seed: of all random numbers used.
        progress: show bars on long work.

    Raises:
        InputError: where model, guide or data break a constraint, the model cannot simulate, or
            all latents are discrete.

    Source: "Sandwiching the marginal likelihood using bidirectional Monte Carlo", Grosse,
    Ghahramani, Adams (2015); "Measuring the reliability of MCMC inference with bidirectional Monte
    Carlo", Grosse, Ancha, Roy (2016); "Improving mutual information estimation with annealed and
    energy-based bounds", Brekelmans, Huang, Ghassemi, Ver Steeg, Grosse, Makhzani (2022).

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         h = pyro.sample("h", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(h, 1.0), obs=x)
    >>> sandwich = bdmc(model, (torch.zeros(200),), progress=False)
    >>> float(sandwich.widths.mean()) < 0.1
    True
    """
    method = AnnealedImportanceSampling() if method is None else method
    if not isinstance(method, AnnealedImportanceSampling):
        raise InputError(
            f"bdmc runs AnnealedImportanceSampling back from exact draws, not {method!r}"
        )
    with untouched(seed, model, guide):
        given = prepare(model, guide, data, unit_plate=unit_plate, parameters=parameters)
        if given.densities[0].dim == 0:
            raise InputError("all latents are discrete, so the evidence is exact: use log_evidence")
        runs = [
            method.run(densities, exact=exact, progress=progress)
            for densities, exact in simulate_densities(given, rebuild)
        ]
        return Sandwich(
            lower=torch.cat([log_mean_exp(run.log_weights) for run in runs]),
            upper=torch.cat([pooled_upper_bounds(run) for run in runs]),
            acceptance=torch.cat([run.acceptance for run in runs if run.acceptance is not None]),
            method=str(method),
        )


def simulate_densities(
    given: Problem, rebuild: Rebuild | None = None
) -> Iterator[tuple[UnitDensities, Tensor]]:
    """Densities of data simulated in the place of each batch, with an exact posterior draw.

    The draw, ``(1, unit, dim)``, are the latents that made the data.
    """
    parts = [simulate_batch(given.model, one.batch, rebuild) for one in given.densities]
    problem = prepare(
        given.model,
        given.guide,
        [batch for batch, _ in parts],
        unit_plate=given.layout.plate,
        parameters=given.declared,
        checked=given.densities[0].structure,
    )
    for densities, (_, simulation) in zip(problem.densities, parts, strict=True):
        yield densities, densities.pack_values(simulation.latents)
