"""The choice of an inference method, with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pyro_vharm.errors import InputError
from pyro_vharm.inference.annealing import AnnealedImportanceSampling
from pyro_vharm.inference.chains import HamiltonianMonteCarlo
from pyro_vharm.inference.enumeration import Enumeration
from pyro_vharm.inference.quadrature import MOST_DIMENSIONS, Quadrature
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.particles import Particles

__all__ = ["Choice", "InferenceMethod", "choose_method"]

_FEWEST_STEPS = 5
# Evaluations that quadrature takes of a unit with an easy posterior, by dimension.
_PER_UNIT = {1: 3_000, 2: 10_000, 3: 90_000}
_PER_PARTICLE = 600  # what annealing takes, gradients, reverse runs and pilots counted
_WORTH = 2.0  # a numerical answer may cost so much more: it needs no second opinion
_LEAST_PARTICLES, _MOST_PARTICLES, _ELEMENTS = 16, 128, 2**15


class InferenceMethod(Protocol):
    """Turns the densities of a batch of units into particles."""

    def run(self, densities: UnitDensities, *, progress: bool = False) -> Particles:
        """Particles of every unit, whose weights give its log evidence."""
        ...


@dataclass(frozen=True)
class Choice:
    """An inference method and why it was taken.

    Attributes:
        method: what to run first.
        reason: why, as a clause; empty for a method that the user named.
        otherwise: what to run where the first is numerical and leaves a unit with a larger error
            than `target_width`.
        target_width: nats that the bounds of a unit may lie apart; ``None`` if none was asked for.
    """

    method: InferenceMethod
    reason: str = ""
    otherwise: InferenceMethod | None = None
    target_width: float | None = None

    def __str__(self) -> str:
        return str(self.method)


def choose_method(
    densities: Sequence[UnitDensities],
    method: InferenceMethod | Literal["auto"] | None = None,
    target_width: float = 0.1,
) -> Choice:
    """The user's method; or, by continuous dimensions of a unit, the cheapest that meets a width.

    None: enumeration, which is exact. Up to three: quadrature, and annealing if it does not
    converge. More, or where so many units share the particles that annealing is foreseen to take
    far fewer evaluations: annealing, whose pilot gives each unit the temperatures it needs.

    Raises:
        InputError: if the method is not one; gives draws, but no evidence; or all latents are
            discrete and it is another than enumeration.
    """
    if not target_width > 0:
        raise InputError(f"target_width must be positive, not {target_width}")
    dim, automatic = densities[0].dim, method is None or method == "auto"
    if dim == 0:
        if not (automatic or isinstance(method, Enumeration)):
            raise InputError(
                f"all latents are discrete, so the evidence is exact by Enumeration(); leave out "
                f"method={method!r}"
            )
        return Choice(Enumeration(), "all latents are discrete")
    if automatic:
        return _automatic(dim, target_width, _annealing(densities, target_width))
    _check(method)
    assert method is not None and method != "auto", "both are automatic"
    return Choice(method, target_width=getattr(method, "target_width", None))


def _automatic(dim: int, target_width: float, annealed: AnnealedImportanceSampling) -> Choice:
    """Quadrature where it can be had for about the evaluations that annealing takes."""
    if dim > MOST_DIMENSIONS:
        reason = f"{dim} continuous dimensions are too many for quadrature"
        return Choice(annealed, reason, target_width=target_width)
    numerical, sampled = _PER_UNIT[dim], annealed.num_particles * _PER_PARTICLE
    if numerical > _WORTH * sampled:
        reason = (
            f"quadrature over {dim} continuous dimensions would take about {numerical:,} "
            f"evaluations per unit, annealing with {annealed.num_particles} particles {sampled:,}"
        )
        return Choice(annealed, reason, target_width=target_width)
    reason = f"{dim} continuous dimension{'s' if dim > 1 else ''} can be integrated numerically"
    return Choice(Quadrature(), reason, annealed, target_width)


def _annealing(
    densities: Sequence[UnitDensities], target_width: float
) -> AnnealedImportanceSampling:
    """Bounds apart by the target, and a mean over units whose standard error is no larger.

    Bounds that lie w apart go with a standard error of √w per unit. Where units are few, more
    particles cost little.
    """
    num_units = sum(part.num_units for part in densities)
    width = target_width * min(1.0, num_units * target_width)
    count = min(part.affordable(_LEAST_PARTICLES, _MOST_PARTICLES, _ELEMENTS) for part in densities)
    return AnnealedImportanceSampling(count, num_steps=_FEWEST_STEPS, target_width=width)


def _check(method: object) -> None:
    if isinstance(method, HamiltonianMonteCarlo):
        raise InputError(
            "HamiltonianMonteCarlo gives posterior draws, but no evidence; pass "
            "method=BridgeSampling(draws=HamiltonianMonteCarlo(...)) to get it from them"
        )
    if not callable(getattr(method, "run", None)) or isinstance(method, type):
        raise InputError(
            "method must be 'auto' or an inference method, such as AnnealedImportanceSampling(), "
            f"not {method!r}"
        )
