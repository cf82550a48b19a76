"""What can go wrong: bad input, an unknown integral, and warnings of what could be better."""

from __future__ import annotations

__all__ = [
    "InputError",
    "JointUnitWarning",
    "LoopedRunsWarning",
    "NotTwiceDifferentiableError",
    "UncompiledWarning",
    "UnresolvedIntegralError",
]


class InputError(ValueError):
    """An argument breaks a constraint; the message names it, what was received and the mend."""


class NotTwiceDifferentiableError(InputError):
    """An operation in the model has no second derivative."""


class UnresolvedIntegralError(ArithmeticError):
    """A numerical integral tells nothing where its value is what was asked for."""


class JointUnitWarning(UserWarning):
    """The data were not split into units because a site stands outside every common plate."""


class LoopedRunsWarning(UserWarning):
    """A model or guide is run one particle at a time, as it gives other numbers when vectorised."""


class UncompiledWarning(UserWarning):
    """A long computation runs uncompiled: no compiler works here, or the model is not traceable."""
