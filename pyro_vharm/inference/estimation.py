"""From the particles of each unit to its log evidence, with errors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_vharm.estimates import UnitEstimates
from pyro_vharm.particles import (
    Particles,
    by_blocks,
    log_mean_exp,
    log_mean_exp_error,
    replicate_totals,
)

__all__ = ["estimate_units", "pooled_upper_bounds", "sum_replicates", "unit_widths"]


def estimate_units(run: Particles) -> UnitEstimates:
    """Log p(v_u; θ) of each unit, corrected for the first-order bias of the logarithm, in nats."""
    if run.log_evidence is not None:
        return run.log_evidence
    log_weights = run.independent_log_weights
    if run.numerical_error is not None:
        value = by_blocks(log_mean_exp, log_weights)
        return UnitEstimates(value, torch.zeros_like(value), run.kind, run.numerical_error)
    value, error = by_blocks(_corrected, log_weights)
    error = torch.hypot(error, _unseen_error(run, error))
    return UnitEstimates(value, error, run.kind, _disagreement(run))


def _corrected(log_weights: Tensor) -> Tensor:
    """Log Ẑ without its first-order bias, and its standard error, ``(2, unit)``."""
    error, correction = log_mean_exp_error(log_weights)
    return torch.stack([log_mean_exp(log_weights) + correction, error])


def _unseen_error(run: Particles, error: Tensor) -> Tensor:
    """Standard error that a unit's pilot foresaw and its weights do not show, ``(unit,)``.

    A few weights may all be alike by chance, as when none of 16 particles came from the share of
    prior in their start: then they lie off by more than they differ. The pilot's weights are
    another sample of the same; where their relative variance is larger, the mean of both counts.
    That makes the mean squared error at most half too large.
    """
    if run.pilot_variance is None:
        return torch.zeros_like(error)
    foreseen = run.pilot_variance / (len(run.log_weights) // run.group_size)
    more = (foreseen - error.square()).clamp(min=0.0)
    finite = torch.where(torch.isfinite(more), more, 0.0)  # a pilot without weights says nothing
    return (0.5 * finite).sqrt()


def _disagreement(run: Particles) -> Tensor | None:
    """Half of what forward and reverse runs differ by in total, shared equally among the units.

    The delta method knows only of the weights that were seen: its error is at most about a nat
    per unit however poor the run. What both directions, each corrected for its first-order bias,
    disagree by in total is a measure of the bias that is left, and biases add up over units.
    """
    if run.reverse_log_weights is None:
        return None

    def apart(forward: Tensor, reverse: Tensor) -> Tensor:
        return -_corrected(-reverse)[0] - _corrected(forward)[0]

    differences = by_blocks(apart, run.log_weights, run.reverse_log_weights)
    share = 0.5 * differences.nan_to_num(nan=torch.inf).mean().abs()
    return share.expand_as(differences)


def unit_widths(run: Particles) -> Tensor | None:
    """Upper less lower stochastic bound of each unit, shape ``(unit,)``; their mean is above 0."""
    if run.reverse_log_weights is None:
        return None

    def width(forward: Tensor, reverse: Tensor) -> Tensor:
        return -log_mean_exp(-reverse) - log_mean_exp(forward)

    return by_blocks(width, run.log_weights, run.reverse_log_weights)


def pooled_upper_bounds(run: Particles) -> Tensor:
    """Upper bounds from forward runs and one back from an exact draw, pooled, shape ``(unit,)``.

    Of K forward runs and one back from an exact posterior draw, in a place among them that is
    drawn at random, the density is Ẑ/Z times that of K + 1 forward runs, with Ẑ their mean weight.
    So E[1/Ẑ] = 1/Z, and E[log Ẑ] ≥ log Z. With several exact draws, it is the mean of their log Ẑ.

    Forward weights of zero are left out, sum and number, which can only raise the bound: those of
    particles without a density, counted, would lower it.

    Source: "Improving mutual information estimation with annealed and energy-based bounds",
    Brekelmans, Huang, Ghassemi, Ver Steeg, Grosse, Makhzani (2022).
    """
    reverse = run.reverse_log_weights
    assert reverse is not None, "the caller ran in both directions"
    total = torch.logaddexp(run.log_weights.logsumexp(0), reverse)
    count = 1 + torch.isfinite(run.log_weights).sum(0)
    return (total - count.log()).mean(0)


def sum_replicates(log_weights: Sequence[Tensor], count: int, *, reverse: bool) -> Tensor:
    """Totals over the units of all batches of log Ẑ, in so many independent groups of weights."""
    totals = [replicate_totals(part, count, reverse=reverse) for part in log_weights]
    return torch.stack(totals).sum(0)
