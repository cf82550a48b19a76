"""Summing enumerated discrete latents out of a trace's factors, exactly, for each unit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vharm.model import log_einsum
from pyro_vharm.model.sites import Site
from pyro_vharm.model.units import UnitLayout

__all__ = ["Factor", "sum_out"]

type Factor = tuple[Site, Tensor]


def sum_out(
    trace: Trace, factors: Sequence[Factor], layout: UnitLayout, particle_plate: str
) -> Tensor:
    """Log of the sum, over all enumerated values, of the product of some of a trace's factors.

    Plates other than those of particles and units are multiplied out, after the sums over what
    lies inside them.

    Args:
        trace: a trace with enumerated sites, its dims named by ``symbolize_dims``.
        factors: sites of it, each with its log density.
        layout: which plate counts units.
        particle_plate: name of the plate of particles.

    Returns:
        a log density over the batch dims of particles and units.

    Source: "Tensor Variable Elimination for Plated Factor Graphs", Obermeyer, Bingham, Jankowiak,
    Pradhan, Chiu, Rush, Goodman (2019).
    """
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    summed: set[str] = set()
    for site, log_prob in factors:
        frames = [f for f in site["cond_indep_stack"] if f.vectorized]
        symbols = frozenset(trace.plate_to_symbol[frame.name] for frame in frames)
        full = _over_plates(log_prob, {frame.dim: frame.size for frame in frames})
        factor = packed.pack(full, site["infer"]["_dim_to_symbol"])
        tree.setdefault(symbols, []).append(factor)
        summed.update(set(_symbols(factor)) - set(trace.plate_to_symbol.values()))
    kept = {trace.plate_to_symbol.get(name) for name in (particle_plate, layout.plate)}
    shown = set().union(*(_symbols(term) for terms in tree.values() for term in terms))
    target = frozenset(symbol for symbol in kept if symbol in shown)
    contracted: Tensor = contract_to_tensor(tree, summed, target, ring=_Ring())
    unpacked: Tensor = packed.unpack(contracted, trace.symbol_to_dim)
    return unpacked


class _Ring(LogRing):  # type: ignore[misc]
    """Products and sums of densities in log space, also under `torch.vmap`."""

    _backend = log_einsum.__name__


def _symbols(factor: Any) -> str:
    symbols: str = factor._pyro_dims
    return symbols


def _over_plates(log_prob: Tensor, sizes: dict[int, int]) -> Tensor:
    """Expand a log density over its plates, so that products over them count every element."""
    depth = max([log_prob.dim(), *(-dim for dim in sizes)])
    shape = [1] * (depth - log_prob.dim()) + list(log_prob.shape)
    for dim, size in sizes.items():
        shape[dim] = size
    return log_prob.expand(shape)
