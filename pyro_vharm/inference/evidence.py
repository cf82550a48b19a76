"""Log evidence of every unit, with bounds on the total and what each rests on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from scipy.stats import norm
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vharm.estimates import Bound, Kind, UnitEstimates, concatenate
from pyro_vharm.inference.agreement import Agreement, Confirmation, confirm
from pyro_vharm.inference.choice import Choice, InferenceMethod, choose_method
from pyro_vharm.inference.estimation import estimate_units, sum_replicates, unit_widths
from pyro_vharm.model.data import Data
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.problem import prepare
from pyro_vharm.model.state import untouched
from pyro_vharm.model.tracing import PyroFunction
from pyro_vharm.particles import (
    Particles,
    by_blocks,
    choose_num_replicates,
    effective_sample_size,
)
from pyro_vharm.tables import html_table, text_table

__all__ = ["Evidence", "estimate_evidence", "log_evidence", "run_choice"]

_LARGEST_SHAPE = 0.7
_LARGEST_RHAT = 1.05  # 1.01 is advised for one quantity; this is the largest of many
_LEAST_CHAIN_SIZE = 100.0
_LEAST_SIZE, _FEW = 2.0, 0.05
_CONFIRMATION = Confirmation()
_REVERSED = 5.0  # standard errors by which upper bounds may lie below lower ones


type Standing = Literal["confirmed", "unconfirmed", "doubtful"]


@dataclass(frozen=True)
class Evidence:
    """Log evidence ℓ = Σ_u log p(v_u; θ), in nats.

    Attributes:
        per_unit: estimates of log p(v_u; θ), corrected for the first-order bias of the logarithm;
            their errors are larger where a second method finds more, see `Agreement.error_scale`.
        lower_replicates: totals of independent stochastic lower bounds, shape ``(M,)``;
            ``None`` for quadrature, enumeration and bridge sampling.
        upper_replicates: totals of independent stochastic upper bounds, shape ``(M,)``, from runs
            that start at chain output; ``None`` where the method has none.
        effective_sizes: effective sample size of each unit's weights, shape ``(unit,)``.
        num_particles: weights per unit.
        acceptance: mean acceptance probability per unit, ``None`` without transitions.
        num_nonfinite: weights that were not finite and count as zero.
        method: the method's settings.
        reason: why that method was taken; empty where the user named it.
        widths: upper less lower stochastic bound of each unit, shape ``(unit,)``, where there are
            both; their mean is what the settings earned.
        target_width: nats that the bounds of a unit should lie apart, if any were asked for.
        num_steps: temperatures of each unit, for methods that anneal.
        pareto_shapes: k̂ of each unit's weights, see `pareto_shape`, for importance sampling with
            at least 100 particles.
        rhat: largest R̂ of each unit, for methods that run chains.
        chain_sizes: least effective number of draws of each unit, for the same.
        agreement: what a method started elsewhere says; ``None`` where nothing was random or the
            check was left out or impossible.
    """

    per_unit: UnitEstimates
    lower_replicates: Tensor | None
    upper_replicates: Tensor | None
    effective_sizes: Tensor
    num_particles: int
    acceptance: Tensor | None
    num_nonfinite: int
    method: str
    reason: str = ""
    widths: Tensor | None = None
    target_width: float | None = None
    num_steps: Tensor | None = None
    pareto_shapes: Tensor | None = None
    rhat: Tensor | None = None
    chain_sizes: Tensor | None = None
    agreement: Agreement | None = None

    @property
    def standing(self) -> Standing:
        """Whether the estimate may be believed within its errors.

        *confirmed*: exact, numerical with a finite error, or met by a method that starts
        elsewhere. *doubtful*: a diagnostic speaks against it; see `doubts`. *unconfirmed*: nothing
        speaks against it, and no second method confirms it.
        """
        if self.doubts:
            return "doubtful"
        settled = self.per_unit.kind <= Kind.NUMERICAL
        agreed = self.agreement is not None and self.agreement.outcome == "agrees"
        return "confirmed" if settled or agreed else "unconfirmed"

    @property
    def doubts(self) -> tuple[str, ...]:
        """What speaks against the estimate, one sentence each; empty for a clean bill."""
        found = []
        if self.agreement is not None and self.agreement.outcome == "contradicts":
            found.append(f"A method that starts elsewhere finds more: {self.agreement}.")
        degenerate = self.effective_sizes < _LEAST_SIZE
        degenerate = degenerate & (degenerate.double().mean() > _FEW)
        checks = [
            (~torch.isfinite(self.per_unit.errors), "have no finite error"),
            (degenerate, "rest on one particle"),
            (_above(self.pareto_shapes, _LARGEST_SHAPE), f"have Pareto k̂ above {_LARGEST_SHAPE}"),
            (_above(self.rhat, _LARGEST_RHAT), f"have R̂ above {_LARGEST_RHAT}"),
            (_below(self.chain_sizes, _LEAST_CHAIN_SIZE), "have too few effective draws"),
        ]
        if self.lower_replicates is None and self.rhat is None:
            checks = checks[:1]  # nodes of quadrature are no draws
        for bad, what in checks:
            if bad is not None and bool(bad.any()):
                found.append(f"{int(bad.sum())} of {len(self.per_unit.values)} units {what}.")
        if self._is_reversed:
            found.append("Upper bounds lie below lower ones: the chains are not at the posterior.")
        return tuple(found)

    @property
    def _is_reversed(self) -> bool:
        if self.widths is None or len(self.widths) < 2:
            return False
        widths = self.widths.double()
        error = float(widths.std()) / len(widths) ** 0.5
        limit: float = -_REVERSED * max(error, 1e-9)
        return float(widths.mean()) < limit

    @property
    def target_is_met(self) -> bool | None:
        """Whether the bounds lie as close as was asked, on average over units, and are confirmed.

        ``None`` if no width was asked for.
        """
        if self.target_width is None:
            return None
        close = (
            bool((self.per_unit.errors <= self.target_width).all())
            if self.widths is None
            else float(self.widths.mean()) <= self.target_width
        )
        return bool(close) and self.standing == "confirmed"

    def lower(self, delta: float = 0.05) -> Bound:
        """A lower bound on the total that fails with probability at most delta.

        For M replicates, P(min_m log Ẑ_m > ℓ + log(1/δ)/M) ≤ δ by Markov's inequality, since
        each Ẑ_m is unbiased for exp(ℓ). Quadrature gives its value less its error, bridge
        sampling less a normal quantile of it.
        """
        if self.lower_replicates is None:
            return self._by_error("lower", delta)
        slack = math.log(1 / delta) / len(self.lower_replicates)
        value = float(self.lower_replicates.min()) - slack
        return Bound(value, "lower", Kind.CERTIFIED, 1 - delta)

    def upper(self, delta: float = 0.05) -> Bound | None:
        """An upper bound on the total, mirrored; conditional on the chains, or ``None``."""
        if self.lower_replicates is None:
            return self._by_error("upper", delta)
        if self.upper_replicates is None:
            return None
        slack = math.log(1 / delta) / len(self.upper_replicates)
        value = float(self.upper_replicates.max()) + slack
        return Bound(value, "upper", Kind.CONDITIONAL, 1 - delta)

    def _by_error(self, side: Literal["lower", "upper"], delta: float) -> Bound:
        """The estimate less or plus its error, or a normal quantile of a standard one."""
        total, sign = self.per_unit.total(), -1.0 if side == "lower" else 1.0
        if total.kind <= Kind.NUMERICAL:
            return Bound(total.value + sign * total.mc_error, side, total.kind, 1.0)
        reach = float(norm.isf(delta)) * total.mc_error
        return Bound(total.value + sign * reach, side, total.kind, 1 - delta)

    def __str__(self) -> str:
        total = self.per_unit.total()
        upper = self.upper()
        rows = [
            ["estimate", f"{total.value:.3f}", f"± {total.mc_error:.3f}", str(total.kind)],
            _bound_row("lower bound", self.lower()),
            *([] if upper is None else [_bound_row("upper bound", upper)]),
        ]
        table = text_table(["log evidence", "nats", "", "kind"], rows)
        because = f"; {self.reason}" if self.reason else ""
        origin = (
            f"{total.num_units} units, {total.per_unit.value:.4f} nats each, by "
            f"{self.method}{because}"
        )
        return "\n".join([table, origin, *self._diagnostics(), *self._conclusion()])

    def _diagnostics(self) -> list[str]:
        lines = []
        if self.lower_replicates is not None:
            lines.append(
                f"effective sample size: median {float(self.effective_sizes.median()):.1f}, least "
                f"{float(self.effective_sizes.min()):.1f} of {self.num_particles}"
            )
        if self.widths is not None:
            wanted = "" if self.target_width is None else f", asked for {self.target_width:g}"
            lines.append(
                f"bounds apart: mean {float(self.widths.mean()):.3f} nats per unit, largest "
                f"{float(self.widths.max()):.3f}{wanted}"
            )
        if self.num_steps is not None:
            least, most = (int(f(self.num_steps)) for f in (torch.min, torch.max))
            lines.append(f"temperatures: {least}" + (f" to {most}" if most > least else ""))
        if self.acceptance is not None:
            lines.append(f"acceptance: mean {float(self.acceptance.mean()):.2f}")
        if self.pareto_shapes is not None:
            lines.append(f"Pareto k̂: largest {float(self.pareto_shapes.max()):.2f}")
        if self.rhat is not None and self.chain_sizes is not None:
            lines.append(
                f"R̂: largest {float(self.rhat.max()):.3f}; effective draws: least "
                f"{float(self.chain_sizes.min()):.0f}"
            )
        if self.num_nonfinite:
            lines.append(f"{self.num_nonfinite} weights were not finite and count as zero")
        return lines

    def _conclusion(self) -> list[str]:
        if self.standing == "doubtful":
            return ["NOT TO BE TRUSTED:", *(f"  {doubt}" for doubt in self.doubts)]
        if self.agreement is not None:
            return [f"{self.standing}: {self.agreement}"]
        if self.per_unit.kind <= Kind.NUMERICAL:
            return []
        return ["unconfirmed: no second method was run"]

    def _repr_html_(self) -> str:
        return html_table(str(self))


def _bound_row(name: str, bound: Bound) -> list[str]:
    return [name, f"{bound.value:.3f}", f"{bound.confidence:.0%}", str(bound.kind)]


def _above(values: Tensor | None, limit: float) -> Tensor | None:
    return None if values is None else ~(values <= limit)  # NaN is no clean bill


def _below(values: Tensor | None, limit: float) -> Tensor | None:
    return None if values is None else ~(values >= limit)


def estimate_evidence(
    densities: Sequence[UnitDensities],
    choice: Choice,
    *,
    confirmation: Confirmation | None = None,
    progress: bool = False,
    delta: float = 0.05,
) -> Evidence:
    """Log evidence over all batches, at the parameters that the model holds now.

    Args:
        densities: one entry per batch.
        choice: the inference method, and what to run if it does not converge.
        confirmation: how to check it by a second method; ``None`` to leave that out.
        progress: show a bar.
        delta: the failure probability for which the number of replicates is chosen.
    """
    choice, runs = run_choice(densities, choice, progress=progress)
    per_unit = [estimate_units(run) for run in runs]
    agreement = None
    if confirmation is not None and runs[0].kind > Kind.NUMERICAL:
        agreement = confirm(densities, per_unit, choice.method, confirmation, progress)
    scale = 1.0 if agreement is None else agreement.error_scale
    lower, upper = _replicates(runs, delta)
    return Evidence(
        per_unit=concatenate(per_unit).with_errors_times(scale),
        lower_replicates=lower,
        upper_replicates=upper,
        effective_sizes=torch.cat(
            [by_blocks(effective_sample_size, run.log_weights) for run in runs]
        ),
        num_particles=len(runs[0].log_weights),
        acceptance=_joined([run.acceptance for run in runs]),
        num_nonfinite=sum(run.num_nonfinite for run in runs),
        method=str(choice.method),
        reason=choice.reason,
        widths=_joined([unit_widths(run) for run in runs]),
        target_width=choice.target_width,
        num_steps=_joined([run.num_steps for run in runs]),
        pareto_shapes=_joined([run.pareto_shapes for run in runs]),
        rhat=_joined([run.rhat for run in runs]),
        chain_sizes=_joined([run.chain_sizes for run in runs]),
        agreement=agreement,
    )


def run_choice(
    densities: Sequence[UnitDensities], choice: Choice, *, progress: bool = False
) -> tuple[Choice, list[Particles]]:
    """Particles of every batch, by what was chosen or by what is to be run if that fails.

    Returns:
        the choice as it was made in the end, and the particles.
    """
    runs = _run(densities, choice.method, progress)
    if choice.otherwise is None:
        return choice, runs
    limit = choice.target_width or math.inf
    errors = torch.cat([run.numerical_error for run in runs if run.numerical_error is not None])
    failed = int((~(errors <= limit)).sum())
    if not failed:
        return choice, runs
    reason = f"quadrature leaves {failed} of {len(errors)} units with larger errors"
    choice = replace(choice, method=choice.otherwise, reason=reason)
    return choice, _run(densities, choice.method, progress)


def _run(
    densities: Sequence[UnitDensities], method: InferenceMethod, progress: bool
) -> list[Particles]:
    single = len(densities) == 1
    bar = tqdm(
        densities, desc="evidence", disable=single or not progress or None, delay=2, leave=False
    )
    return [method.run(batch, progress=progress and single) for batch in bar]


def _replicates(runs: Sequence[Particles], delta: float) -> tuple[Tensor | None, Tensor | None]:
    """Totals over units in independent groups of weights, forward and in reverse."""
    if runs[0].kind != Kind.ESTIMATED:
        return None, None
    forward = [run.independent_log_weights for run in runs]
    pilot = [run.pilot_variance for run in runs if run.pilot_variance is not None]
    variance = float(torch.cat(pilot).sum()) if len(pilot) == len(runs) else math.inf
    count = choose_num_replicates(variance, len(forward[0]), delta)
    lower = sum_replicates(forward, count, reverse=False)
    reverse = [run.reverse_log_weights for run in runs if run.reverse_log_weights is not None]
    if len(reverse) < len(runs):
        return lower, None
    return lower, sum_replicates(reverse, count, reverse=True)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """One value per unit, over all batches."""
    known = [part for part in parts if part is not None]
    return torch.cat(known) if len(known) == len(parts) else None


def log_evidence(
    model: PyroFunction,
    data: Data,
    *,
    guide: PyroFunction | None = None,
    method: InferenceMethod | Literal["auto"] | None = None,
    target_width: float = 0.1,
    confirmation: Confirmation | None = _CONFIRMATION,
    unit_plate: str | None = None,
    parameters: Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> Evidence:
    """Log evidence Σ_u log p(v_u; θ) at the parameters that the model holds now, in nats.

    Args:
        model: a Pyro model; discrete latents are summed out.
        data: positional arguments as a tuple, keyword arguments as a Mapping, or an iterable of
            batches.
        guide: a trained guide; its draws say where to look. Without one, the prior does.
        method: an inference method. By default, or with ``"auto"``: `Enumeration` where all
            latents are discrete, `Quadrature` for units of up to three continuous dimensions where
            it converges and is not far dearer, else `AnnealedImportanceSampling` with as many
            temperatures as the target width needs; the result says which and why.
        target_width: nats per unit for which ``"auto"`` chooses: bounds apart, or numerical error.
            A method of your own has its own settings.
        confirmation: how a Monte Carlo result is checked by a second method that starts elsewhere,
            on some of the units; ``None`` leaves the check out.
        unit_plate: name of the plate of independent units; found if left out.
        parameters: sites that the guide holds as point masses (as AutoDelta does) and that count
            as θ: log evidence then includes their log prior.
        seed: of all random numbers used.
        progress: show bars on long work.

    Raises:
        InputError: where model, guide or data break a constraint, before any long work.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         h = pyro.sample("h", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(h, 1.0), obs=x)
    >>> x = torch.tensor([0.5, -1.0], dtype=torch.float64)
    >>> exact = dist.Normal(0.0, 2.0**0.5).log_prob(x).sum()
    >>> evidence = log_evidence(model, (x,), progress=False)
    >>> abs(evidence.per_unit.total().value - float(exact)) < 1e-5
    True
    """
    with untouched(seed, model, guide):
        problem = prepare(model, guide, data, unit_plate=unit_plate, parameters=parameters)
        chosen = choose_method(problem.densities, method, target_width)
        return estimate_evidence(
            problem.densities, chosen, confirmation=confirmation, progress=progress
        )
