"""What can go wrong before any long work starts: one error for bad input, one warning for units."""

from __future__ import annotations

__all__ = ["InputError", "JointUnitWarning"]


class InputError(ValueError):
    """An argument breaks a constraint; the message names it, what was received and the mend."""


class JointUnitWarning(UserWarning):
    """The data were not split into units because a site stands outside every common plate."""
