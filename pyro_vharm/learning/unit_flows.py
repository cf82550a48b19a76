"""A normalizing flow for each unit: monotone splines, autoregressive, after one another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.inference.gaussians import UnitGaussian
from pyro_vharm.learning.monotone_splines import bend, num_knot_parameters
from pyro_vharm.learning.unit_families import Tensors, UnitDraws, affine, begin_affine

__all__ = ["Flow"]


_EM_STEPS, _LEAST_WIDTH = 20, 0.02


@dataclass(frozen=True)
class Flow:
    """A normalizing flow of a mixture, with parameters of its own for each unit.

    h = m + L T(z), where z comes from a mixture of K diagonal Gaussians with free shares π_k, and T
    is one or more layers y_i = t_i + R_i(z_i). R_i is a monotone rational-quadratic spline; t_i
    and the knots are functions of z_1, …, z_{i−1} by a small network, and the order of coordinates
    is reversed between layers. So log q(h) = log Σ_k π_k N_k(z) − Σ_i log dy_i/dz_i − log det L.
    In one dimension there is no network.

    The components are strata, E_q[f] = Σ_k π_k E_k[f]: the mass of modes that lie apart is then
    learned from all of them, where a flow of a single Gaussian drops one. A fit begins at a
    Gaussian, with T = 1, and at a mixture fitted to posterior draws by EM.

    Args:
        num_components: K.
        num_layers: layers of T.
        num_bins: pieces of each spline.
        num_hidden: hidden nodes of each layer's network.
        name: in tables and as a key of results.

    Raises:
        InputError: for counts below 1.

    Source: "Neural Spline Flows", Durkan, Bekasov, Murray, Papamakarios (2019); "Improved
    Variational Inference with Inverse Autoregressive Flow", Kingma et al. (2016); for the strata,
    "Automatic Differentiation Variational Inference with Mixtures", Morningstar et al. (2021).

    >>> Flow(num_components=2).name
    'flow'
    """

    num_components: int = 4
    num_layers: int = 2
    num_bins: int = 8
    num_hidden: int = 16
    name: str = "flow"
    rung: ClassVar[int] = 2

    def __post_init__(self) -> None:
        for name in ("num_components", "num_layers", "num_bins", "num_hidden"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def free(self) -> tuple[str, ...]:
        """The parameters that are optimised."""
        layers = [f"{part}_{i}" for i in range(self.num_layers) for part in ("inner", "outer")]
        biases = [f"{name}_bias" for name in layers]
        base = "centre", "log_width", "log_share"
        return "shift", "log_scale", "tilt", *base, *layers, *biases

    @property
    def num_strata(self) -> int:
        """The components of the base."""
        return self.num_components

    def begin(self, gaussian: UnitGaussian, draws: Tensor | None = None) -> Tensors:
        """That Gaussian, or a mixture fitted to draws by EM; T = 1, whatever the inner weights."""
        num_units, dim = gaussian.mean.shape
        like, count = gaussian.mean, dim * self._num_outputs
        tensors = begin_affine(gaussian)
        base = _one_component(like, self.num_components)
        if draws is not None:
            base = _fit_mixture(gaussian.whiten(draws), self.num_components)
        tensors |= base
        for i in range(self.num_layers):
            weights = torch.randn(dim, self.num_hidden).to(like) / dim**0.5
            tensors[f"inner_{i}"] = weights.expand(num_units, -1, -1)
            tensors[f"inner_{i}_bias"] = like.new_zeros(num_units, self.num_hidden)
            tensors[f"outer_{i}"] = like.new_zeros(num_units, self.num_hidden, count)
            tensors[f"outer_{i}_bias"] = like.new_zeros(num_units, count)
        return tensors

    def rebased(self, tensors: Tensors) -> Tensors:
        """The same q, with a new origin of the affine map."""
        return {**tensors, **begin_affine(affine(tensors))}

    def draw(self, tensors: Tensors, noise: Tensor) -> UnitDraws:
        """Draws of each component and log q there."""
        base, log_base, shares = _base(tensors, noise)
        at, log_slope = base.flatten(0, 1), torch.zeros_like(log_base.flatten(0, 1))
        for i in range(self.num_layers):
            moved, log_slopes = self._layer(tensors, i, at)
            at, log_slope = moved.flip(-1), log_slope + log_slopes
        if self.num_layers % 2:
            at = at.flip(-1)
        outer = affine(tensors)
        log_slope = (log_slope + outer.log_abs_det).reshape(log_base.shape)
        latents = outer.unwhiten(at).reshape(base.shape)
        return UnitDraws(latents, log_base - log_slope, shares)

    def gaussian(self, tensors: Tensors) -> UnitGaussian | None:
        """None."""
        return None

    @property
    def _num_outputs(self) -> int:
        """The shift t of a coordinate, and its spline's parameters."""
        return 1 + num_knot_parameters(self.num_bins)

    def _layer(self, tensors: Tensors, i: int, at: Tensor) -> tuple[Tensor, Tensor]:
        """One autoregressive layer, and its log slope summed over coordinates."""
        dim = at.shape[-1]
        raw = tensors[f"outer_{i}_bias"]
        if dim > 1:
            sees, seen = self._masks(dim, at)
            inner = torch.einsum("pui,uih->puh", at, tensors[f"inner_{i}"] * sees)
            hidden = torch.tanh(inner + tensors[f"inner_{i}_bias"]) / self.num_hidden**0.5
            raw = raw + torch.einsum("puh,uho->puo", hidden, tensors[f"outer_{i}"] * seen)
        raw = raw.unflatten(-1, (dim, -1))
        moved, log_slopes = bend(at, raw[..., 1:])
        return moved + raw[..., 0], log_slopes.sum(-1)

    def _masks(self, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Which coordinates a hidden node sees, and which outputs see it: earlier ones only."""
        order = torch.arange(dim, device=like.device)
        last = torch.arange(self.num_hidden, device=like.device) % (dim - 1)
        sees = (order[:, None] <= last).to(like)
        seen = (last[:, None] < order).to(like)
        return sees, seen.repeat_interleave(self._num_outputs, 1)


def _base(tensors: Tensors, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draws z of each component, the log density of the mixture there, and the shares."""
    centre, log_width = tensors["centre"].movedim(1, 0), tensors["log_width"].movedim(1, 0)
    log_share = tensors["log_share"].T.log_softmax(0)
    base = centre + log_width.exp() * noise
    away = (base[:, :, None] - centre) * (-log_width).exp()
    log_each = -0.5 * (away.square() + math.log(2 * math.pi)) - log_width
    return base, (log_share + log_each.sum(-1)).logsumexp(2), log_share.exp()


def _one_component(like: Tensor, num_components: int) -> dict[str, Tensor]:
    """Standard normal components that coincide, for units and dims like these."""
    centre = like.new_zeros(len(like), num_components, like.shape[-1])
    shares = like.new_zeros(len(like), num_components)
    return {"centre": centre, "log_width": torch.zeros_like(centre), "log_share": shares}


def _fit_mixture(draws: Tensor, num_components: int) -> dict[str, Tensor]:
    """A mixture of diagonal Gaussians for each unit's draws ``(particle, unit, dim)``, by EM.

    It begins at draws that lie far apart from one another.
    """
    chosen = [draws[0]]
    for _ in range(num_components - 1):
        nearest = torch.stack([(draws - one).square().sum(-1) for one in chosen]).amin(0)
        farthest = nearest.argmax(0)[None, :, None].expand(1, -1, draws.shape[-1])
        chosen.append(draws.gather(0, farthest)[0])
    centre = torch.stack(chosen, 1)
    width, log_share = torch.ones_like(centre), torch.zeros_like(centre[..., 0])
    for _ in range(_EM_STEPS):
        away = (draws[:, :, None] - centre) / width
        log_each = log_share - 0.5 * away.square().sum(-1) - width.log().sum(-1)
        owner = log_each.softmax(-1)
        total = owner.sum(0) + 1e-3
        centre = (torch.einsum("puk,pui->uki", owner, draws) + 1e-3 * centre) / total[..., None]
        square = (draws[:, :, None] - centre).square()
        spread = torch.einsum("puk,puki->uki", owner, square) / total[..., None]
        width = spread.sqrt().clamp(min=_LEAST_WIDTH)
        log_share = (total / total.sum(-1, keepdim=True)).log()
    return {"centre": centre, "log_width": width.log(), "log_share": log_share}
