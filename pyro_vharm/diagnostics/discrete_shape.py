"""The posterior of discrete latents: entropy, dependence and the most probable configurations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_vharm.diagnostics.weighted_moments import Blocks, Measured, grid_blocks, random_blocks
from pyro_vharm.estimates import Kind, UnitEstimates, concatenate
from pyro_vharm.model.configurations import Configurations
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.particles import Particles, resample
from pyro_vharm.tables import nats, text_table

__all__ = ["DiscreteShape", "join_discrete", "measure_discrete"]

_TOP = 5
_ROWS_PER_PASS, _MOST_ROWS, _FEWER = 2**17, 2**18, 512


@dataclass(frozen=True)
class DiscreteShape:
    """The posterior of the discrete latents z of each unit, continuous ones integrated out.

    Attributes:
        entropy: H(z | v), in nats.
        total_correlation: Σ_e H(z_e | v) − H(z | v) over the elements e of z: KL to the best
            product, in nats.
        probabilities: of the most probable configurations, falling, with errors; shape
            ``(unit, rank)``.
        configurations: which value of its support each element takes in these, shape
            ``(unit, rank, element)``.
        labels: of the elements.
    """

    entropy: UnitEstimates
    total_correlation: UnitEstimates
    probabilities: Measured
    configurations: Tensor
    labels: tuple[str, ...]

    def __str__(self) -> str:
        rows = []
        for name in ("entropy", "total_correlation"):
            units: UnitEstimates = getattr(self, name)
            mean = units.total().per_unit
            cells = nats(mean.value), nats(mean.mc_error), nats(float(units.values.max()))
            rows.append([name.replace("_", " "), *cells])
        top = float(self.probabilities.values[:, 0].mean())
        return "\n".join(
            [
                text_table(["discrete latents, nats", "per unit", "± mc", "largest"], rows),
                f"the most probable configuration has {top:.1%} on average",
            ]
        )


def measure_discrete(
    densities: UnitDensities, run: Particles, configurations: Configurations
) -> DiscreteShape:
    """P(z | v) = E_{p(h | v)}[p(z | h, v)] of each unit from particles of h, exact without h.

    Entropies of random particles are corrected for their first-order bias, with errors by the
    jackknife.

    Args:
        densities: of the units.
        run: particles of the continuous latents.
        configurations: all values of the discrete ones.
    """
    run = _affordable(run, len(configurations.codes))
    count, _, dim = run.unconstrained.shape
    numerical = run.kind <= Kind.NUMERICAL
    if dim == 0:
        blocks = Blocks([torch.arange(1)], torch.ones(2, 1), random=False)
    else:
        blocks = grid_blocks(count, dim) if numerical else random_blocks(count, run.group_size)
    probabilities = _probabilities(densities, run, configurations, blocks)
    entropy = torch.special.entr(probabilities).sum(1)
    marginal = sum(
        torch.special.entr(one).sum(1) for one in _marginals(probabilities, configurations.codes)
    )
    measured = blocks.measured(probabilities)
    rank = probabilities[0].topk(min(_TOP, len(configurations.codes)), dim=0).indices
    return DiscreteShape(
        _in_nats(blocks.measured(entropy), run.kind),
        _in_nats(blocks.measured(marginal - entropy), run.kind),
        Measured(*(field.gather(0, rank).T for field in measured)),
        configurations.codes[rank.T],
        configurations.labels,
    )


def _affordable(run: Particles, num_configurations: int) -> Particles:
    """The particles, or fewer without weights where they are too many."""
    if len(run.unconstrained) * num_configurations <= _MOST_ROWS:
        return run
    draws = resample(run.unconstrained, run.log_weights)[:_FEWER]
    kind = max(run.kind, Kind.ESTIMATED)
    return Particles(draws, torch.zeros_like(draws[..., 0]), kind)


def _probabilities(
    densities: UnitDensities, run: Particles, configurations: Configurations, blocks: Blocks
) -> Tensor:
    """P(z | v) in every version, shape ``(version, configuration, unit)``."""
    weights = torch.softmax(run.log_weights.double(), 0)
    rows = len(configurations.codes) * densities.num_units
    by_block = []
    for members in blocks.members:
        total = torch.zeros((), dtype=torch.float64)
        for part in members.split(max(_ROWS_PER_PASS // rows, 1)):
            with torch.no_grad():
                log_joint = configurations.log_joint(densities, run.unconstrained[part])
            given = torch.softmax(log_joint.double(), 1)
            total = total + torch.einsum("pu,pcu->cu", weights[part], given)
        by_block.append(total)
    combined = blocks.combine(torch.stack(by_block))
    return combined / combined.sum(1, keepdim=True)


def _marginals(probabilities: Tensor, codes: Tensor) -> list[Tensor]:
    """P(z_e | v) of each element, ``(version, value, unit)`` each."""
    found = []
    for element in codes.T:
        shape = (len(probabilities), int(element.max()) + 1, probabilities.shape[-1])
        empty = torch.zeros(shape, dtype=probabilities.dtype, device=probabilities.device)
        found.append(empty.index_add_(1, element, probabilities))
    return found


def _in_nats(measured: Measured, kind: Kind) -> UnitEstimates:
    values, errors = measured
    if kind <= Kind.NUMERICAL:
        return UnitEstimates(values, torch.zeros_like(values), kind, errors)
    return UnitEstimates(values, errors, kind)


def join_discrete(parts: Sequence[DiscreteShape]) -> DiscreteShape:
    """The units of several parts, one after the other."""
    fields = zip(*(part.probabilities for part in parts), strict=True)
    return replace(
        parts[0],
        entropy=concatenate([part.entropy for part in parts]),
        total_correlation=concatenate([part.total_correlation for part in parts]),
        probabilities=Measured(*(torch.cat(field) for field in fields)),
        configurations=torch.cat([part.configurations for part in parts]),
    )
