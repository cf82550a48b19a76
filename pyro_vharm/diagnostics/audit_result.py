"""Everything that one audit found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pyro_vharm.diagnostics.gap import InferenceGap
from pyro_vharm.diagnostics.harm import LearningHarm
from pyro_vharm.diagnostics.local import LocalHarm
from pyro_vharm.diagnostics.pull import Reachability
from pyro_vharm.diagnostics.verdict import Verdict
from pyro_vharm.learning.reference import Reference
from pyro_vharm.tables import html_table

__all__ = ["Audit"]


@dataclass(frozen=True)
class Audit:
    """Everything one audit found. Print it for the ledger and the verdict.

    Attributes:
        gap: the inference gap at the learned parameters, on the training data.
        harm: learning harm relative to the reference; ``None`` for a model without parameters.
        verdict: the answer in words.
        settings: the seed and the method's settings.
        local: what shows near θ̂, without learning anew; ``None`` for a model without parameters.
        reachability: where the user's own training goes from the reference; ``None`` where
            neither objective nor optimiser was given.
    """

    gap: InferenceGap
    harm: LearningHarm | None
    verdict: Verdict
    settings: Mapping[str, str]
    local: LocalHarm | None = None
    reachability: Reachability | None = None

    @property
    def reference(self) -> Reference:
        """The better parameters that were found; its ``apply()`` keeps them.

        Raises:
            AttributeError: for a model without parameters.
        """
        if self.harm is None:
            raise AttributeError("a model without parameters has no reference")
        return self.harm.reference

    def __str__(self) -> str:
        parts = [str(self.gap if self.harm is None else self.harm)]
        parts += [str(part) for part in (self.local, self.reachability) if part is not None]
        return "\n\n".join([*parts, str(self.verdict)])

    def _repr_html_(self) -> str:
        return html_table(str(self))
