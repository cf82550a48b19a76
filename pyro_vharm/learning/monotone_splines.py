"""Monotone rational-quadratic splines of the whole line, whose ends are free."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["bend", "num_knot_parameters"]

_BOUND = 3.0  # standard normal draws are bent within, and go along straight lines outside
_MOST = 6.0


def num_knot_parameters(num_bins: int) -> int:
    """How many parameters a spline of so many pieces has: widths, heights, and slopes at knots.

    >>> num_knot_parameters(8)
    25
    """
    return 3 * num_bins + 1


def bend(points: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """A monotone map of each point, and the log of its slope there.

    In a piece from (x, y) of width w and height h, with s = h/w, slopes d and e at its ends and
    θ = (z − x)/w, the map is y + h (s θ² + d θ(1 − θ)) / (s + (d + e − 2s) θ(1 − θ)). Heights and
    outer slopes are free, and not tied to an identity outside as in most uses: so mass can be
    moved to modes that lie far apart. Where all parameters are 0 it is the identity.

    Args:
        points: shape ``(*,)``.
        parameters: of one spline for each point, shape ``(*, num_knot_parameters(num_bins))``.

    Source: "Piecewise rational quadratic interpolation", Gregory, Delbourgo (1982); "Neural Spline
    Flows", Durkan, Bekasov, Murray, Papamakarios (2019).

    >>> moved, log_slope = bend(torch.tensor([-5.0, 0.3]), torch.zeros(2, 25))
    >>> [round(float(value), 4) for value in (*moved, *log_slope)]
    [-5.0, 0.3, 0.0, 0.0]
    """
    num_bins = (parameters.shape[-1] - 1) // 3
    even = 2 * _BOUND / num_bins
    raw = _MOST * torch.tanh(parameters / _MOST)  # exp must not overflow
    widths = 2 * _BOUND * raw[..., :num_bins].softmax(-1)
    heights = even * raw[..., num_bins : 2 * num_bins].exp()
    slopes = raw[..., 2 * num_bins :].exp()
    left = pad(widths.cumsum(-1), (1, 0)) - _BOUND
    low = pad(heights.cumsum(-1), (1, 0)) - 0.5 * heights.sum(-1, keepdim=True)
    within = points.clamp(-_BOUND, _BOUND)
    piece = (within[..., None] >= left[..., 1:-1]).sum(-1, keepdim=True)
    x, y, w, h, d, e = (
        values.expand(*points.shape, -1).gather(-1, piece)[..., 0]
        for values in (left, low, widths, heights, slopes[..., :-1], slopes[..., 1:])
    )
    s, at = h / w, ((within - x) / w).clamp(0.0, 1.0)
    both = at * (1 - at)
    lower = s + (d + e - 2 * s) * both
    moved = y + h * (s * at.square() + d * both) / lower
    slope = s.square() * (e * at.square() + 2 * s * both + d * (1 - at).square()) / lower.square()
    beyond = points - within
    return moved + slope * beyond, slope.log()
