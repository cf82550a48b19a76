"""The controls of the calibration: models with exact answers, and the data sets to simulate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from benchmarks.continuous_models import factor_analysis, sign_symmetric, two_causes
from benchmarks.discrete_models import collapsed_mixture, mixture, noisy_or
from benchmarks.encoder_models import linear_encoder, sigmoid_belief_net
from benchmarks.exact_optima import HarmedModel
from benchmarks.hard_models import known_weights, vanished_variance
from benchmarks.null_models import (
    free_causes,
    poisson_intercepts,
    principal_components,
    random_effects,
)
from benchmarks.sequence_models import autoregression, two_chains, two_chains_near

__all__ = ["CONTROLS", "Control", "Role"]

type Role = Literal["null", "positive", "hard"]

BOTH, EXACT, ONE_UNIT = ("exact", "sampled"), ("exact",), ("sampled", "chains")


@dataclass(frozen=True)
class Control:
    """A family of simulated data sets.

    Attributes:
        role: ``"null"``: no harm; ``"positive"``: harm; ``"hard"``: the visible gap misleads.
        make: model, guide, data, θ̂ and θ* for a size, if there is one, and a seed.
        sizes: units, or steps in time; seeds take them in turn. Empty where the size is fixed.
        seeds: of the data sets.
        measurements: how they are measured, see `MEASUREMENTS` in ``calibration_runs``.
    """

    role: Role
    make: Callable[..., HarmedModel]
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    measurements: tuple[str, ...]

    def size(self, seed: int) -> int | None:
        """Of the data set of a seed."""
        return self.sizes[seed % len(self.sizes)] if self.sizes else None

    def simulate(self, seed: int) -> HarmedModel:
        """The data set of a seed, with its exact answers."""
        size = self.size(seed)
        return self.make(seed=seed) if size is None else self.make(size, seed=seed)


def _first(count: int) -> tuple[int, ...]:
    return tuple(range(count))


CONTROLS: dict[str, Control] = {
    "family holds the posterior": Control("null", random_effects, (20, 40), _first(75), BOTH),
    "probabilistic PCA": Control("null", principal_components, (20, 40), _first(75), BOTH),
    "two causes, free": Control("null", free_causes, (20, 40), _first(75), BOTH),
    "Poisson, random intercepts": Control("null", poisson_intercepts, (20, 40), _first(75), BOTH),
    "two causes, tied": Control("positive", two_causes, (10, 30, 100, 300), _first(12), BOTH),
    "factor analysis": Control("positive", factor_analysis, (20, 60, 200), _first(9), BOTH),
    "AR(1), mean field over time": Control(
        "positive", autoregression, (20, 40, 80), _first(6), ONE_UNIT
    ),
    "sign-symmetric": Control("positive", sign_symmetric, (20, 60, 150), _first(9), BOTH),
    "noisy-OR": Control("positive", noisy_or, (20, 40, 100), _first(9), EXACT),
    "sigmoid belief net": Control("positive", sigmoid_belief_net, (60, 150, 300), _first(9), EXACT),
    "mixture, hard assignment": Control("positive", mixture, (40, 100, 300), _first(9), EXACT),
    "linear encoder, curved model": Control(
        "positive", linear_encoder, (30, 100, 200), _first(9), BOTH
    ),
    "mixture, collapsed": Control("hard", collapsed_mixture, (), _first(3), EXACT),
    "factor analysis, a variance gone": Control("hard", vanished_variance, (), _first(3), EXACT),
    "two causes, weight known": Control("hard", known_weights, (), _first(3), EXACT),
    "two chains, global maximum of L": Control("hard", two_chains, (), (0, 2, 7), ONE_UNIT),
    "two chains, local maximum of L": Control("hard", two_chains_near, (), (0, 2, 7), ONE_UNIT),
}
