"""Active units: which latent dims the guide's posterior means vary in from unit to unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.problem import Problem
from pyro_vharm.tables import html_table, nats, text_table

__all__ = ["ActiveUnits", "check_threshold", "measure_activity"]

_ROWS_PER_PASS, _PRIOR_ROWS = 2**17, 2**14


@dataclass(frozen=True)
class ActiveUnits:
    """Which dims of the unconstrained latents are in use, in the sense of active units.

    A_d = Var_u(E_q[h_d | v_u]), between units, and its share A_d / Var_p(h_d) of the variance
    under the prior, in draws of all units together. A dim whose share is above the threshold is
    in use; for a prior N(0, 1) that is the rule A_d > 0.01 of the paper. By the law of total
    variance the share is at most 1 for a fitted model with an exact guide. A prior without a
    finite variance has no share to speak of. Where the prior differs between units, as with
    covariates, a dim may be in use without the data.

    Attributes:
        variances: A_d, corrected for the Monte Carlo noise of the means, so perhaps below 0; shape
            ``(dim,)``.
        errors: Monte Carlo standard errors of these, for the units as they are.
        prior_variances: Var_p(h_d), shape ``(dim,)``.
        labels: of the dims, like ``h[0]``.
        threshold: the share above which a dim is in use.
        num_units: how many units there are.

    Source: "Importance Weighted Autoencoders", Burda, Grosse, Salakhutdinov (2016).

    >>> found = ActiveUnits(torch.tensor([0.7, 0.001]), torch.tensor([0.01, 0.001]),
    ...     torch.tensor([1.0, 1.0]), ("h[0]", "h[1]"), 0.01, 50)
    >>> found.count, found.unused
    (1, ('h[1]',))
    """

    variances: Tensor
    errors: Tensor
    prior_variances: Tensor
    labels: tuple[str, ...]
    threshold: float
    num_units: int

    @property
    def shares(self) -> Tensor:
        """A_d / Var_p(h_d), shape ``(dim,)``."""
        return self.variances / self.prior_variances

    @property
    def active(self) -> Tensor:
        """Which dims are in use, shape ``(dim,)``."""
        return self.shares > self.threshold

    @property
    def count(self) -> int:
        """How many dims are in use."""
        return int(self.active.sum())

    @property
    def unused(self) -> tuple[str, ...]:
        """Labels of the other dims."""
        pairs = zip(self.labels, self.active.tolist(), strict=True)
        return tuple(label for label, active in pairs if not active)

    @property
    def summary(self) -> str:
        """One line."""
        shown = ", ".join(self.unused[:5]) + (", …" if len(self.unused) > 5 else "")
        tail = f"; not in use: {shown}" if shown else ""
        return f"latent dims in use: {self.count} of {len(self.labels)}{tail}"

    def __str__(self) -> str:
        columns = self.variances, self.errors, self.prior_variances, self.shares
        rows = [
            [label, *(nats(value, 4) for value in values), "yes" if active else "no"]
            for label, active, *values in zip(
                self.labels, self.active.tolist(), *(c.tolist() for c in columns), strict=True
            )
        ]
        header = ["latent", "variance of means", "mc error", "prior variance", "share", "in use"]
        ending = f"{self.summary} (share above {self.threshold:g}; {self.num_units} units)"
        return "\n".join([text_table(header, rows), ending])

    def _repr_html_(self) -> str:
        return html_table(str(self))


def check_threshold(threshold: float) -> None:
    """Refuse a threshold that no share can be compared with.

    Raises:
        InputError: unless it lies in (0, 1).
    """
    if not 0 < threshold < 1:
        raise InputError(
            f"active_threshold must lie in (0, 1), a share of the prior's variance, not {threshold}"
        )


def measure_activity(problem: Problem, num_draws: int, threshold: float) -> ActiveUnits | None:
    """A_d of every latent dim by draws of the guide, corrected for the noise of the means.

    With m̂_u the mean of n draws, s_u² their variance, τ_u² = s_u²/n and U units, A_d is the
    variance of the m̂_u less the mean of the τ_u². Its variance is
    Σ_u (4 (m_u − m̄)² τ_u² + 2 τ_u⁴) / (U − 1)² for units as they are.

    Returns:
        ``None`` for a single unit, and where there are no continuous latents.
    """
    first = problem.densities[0]
    if problem.num_units < 2 or first.dim == 0:
        return None
    means, noise = _joined([_guide_means(part, num_draws) for part in problem.densities])
    away = (means - means.mean(0)).square()
    variances = away.sum(0) / (len(means) - 1) - noise.mean(0)
    each = torch.maximum(4 * away * noise - 2 * noise.square(), 2 * noise.square())
    errors = each.sum(0).sqrt() / (len(means) - 1)
    return ActiveUnits(
        variances=variances,
        errors=errors,
        prior_variances=_prior_variances(problem.densities),
        labels=first.labels,
        threshold=threshold,
        num_units=problem.num_units,
    )


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    means, noise = zip(*parts, strict=True)
    return torch.cat(means), torch.cat(noise)


def _guide_means(densities: UnitDensities, num_draws: int) -> tuple[Tensor, Tensor]:
    """Means of draws of the guide, and the squares of their standard errors, ``(unit, dim)``."""
    with torch.no_grad():
        origin = densities.draw_guide(2).latents.double().mean(0)  # so that squares stay small
        totals, squares = torch.zeros_like(origin), torch.zeros_like(origin)
        for count in _passes(densities, num_draws):
            away = densities.draw_guide(count).latents.double() - origin
            totals, squares = totals + away.sum(0), squares + away.square().sum(0)
    shift = totals / num_draws
    variance = (squares - num_draws * shift.square()) / (num_draws - 1)
    return origin + shift, variance / num_draws


def _prior_variances(parts: Sequence[UnitDensities]) -> Tensor:
    """Var_p(h_d) of the draws of all units together, ``(dim,)``; for A_d its error is small."""
    with torch.no_grad():
        draws = [
            part.draw_prior(max(_PRIOR_ROWS // part.num_units, 2)).double().flatten(0, 1)
            for part in parts
        ]
    return torch.cat(draws).var(0)


def _passes(densities: UnitDensities, num_draws: int) -> list[int]:
    """Numbers of draws that sum to as many, each few enough for memory."""
    most = max(_ROWS_PER_PASS // densities.num_units, 1)
    whole, rest = divmod(num_draws, most)
    return [most] * whole + ([rest] if rest else [])
