"""Small models that variational inference harms, each with its optima known exactly.

For each: the model and guide in Pyro, data, log evidence ℓ(θ) in closed form (or enumerated, or
by a fine trapezoid rule), θ̂ where the bound L is highest over θ and the guide's family, and θ*
where ℓ is. ℓ and L are written by hand in torch, without this package, and maximised by scipy.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.continuous_models import factor_analysis, local_level, sign_symmetric, two_causes
from benchmarks.discrete_models import mixture, noisy_or
from benchmarks.exact_optima import HarmedModel

__all__ = ["HARMED_MODELS"]

HARMED_MODELS: dict[str, Callable[..., HarmedModel]] = {
    "two causes": two_causes,
    "factor analysis": factor_analysis,
    "sign-symmetric": sign_symmetric,
    "noisy-OR": noisy_or,
    "mixture": mixture,
    "Nile": local_level,
}
