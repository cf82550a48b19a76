"""Sums of products in log space, as a backend for opt_einsum: differentiable, and under vmap.

Pyro's own backend takes its logarithm by a custom autograd function, which `torch.vmap` refuses.
"""

from __future__ import annotations

import torch
from pyro.ops.einsum.util import Tensordot
from torch import Tensor

__all__ = ["einsum", "tensordot", "transpose"]


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """Log Σ Π exp(operand), each operand shifted by its maximum over the dims summed out.

    Args:
        equation: inputs and output, one symbol per dim, as for `torch.einsum`.
        operands: one for each input.
    """
    inputs, output = _letters(equation).split("->")
    if inputs == output:
        return operands[0].clone()
    names = inputs.split(",")
    shifts = [_maximum(dims, part, output) for dims, part in zip(names, operands, strict=True)]
    shifted = [(part - shift).exp() for part, shift in zip(operands, shifts, strict=True)]
    total = torch.einsum(f"{inputs}->{output}", shifted)
    positive = total > 0  # where nothing is left, log 0 without a gradient of its own
    log_total = torch.where(positive, total, 1.0).log()
    result = torch.where(positive, log_total, -torch.inf)
    for dims, shift in zip(names, shifts, strict=True):
        result = result + _aligned(dims, shift, output)
    return result


def transpose(operand: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Permute the dims."""
    return operand.permute(axes)


tensordot = Tensordot(einsum)


def _letters(equation: str) -> str:
    """Rename symbols to those that `torch.einsum` takes."""
    symbols = sorted(set(equation) - set(",->"))
    names = [chr(ord("a") + i) if i < 26 else chr(ord("A") + i - 26) for i in range(len(symbols))]
    return equation.translate(str.maketrans("".join(symbols), "".join(names)))


def _maximum(dims: str, operand: Tensor, output: str) -> Tensor:
    """The largest value over the dims that are summed out, which stay with size 1."""
    largest = operand.detach()
    summed = [i for i, dim in enumerate(dims) if dim not in output]
    if summed:
        largest = largest.amax(summed, keepdim=True)
    return largest.clamp(min=torch.finfo(operand.dtype).min)  # so that −∞ less −∞ is no NaN


def _aligned(dims: str, shift: Tensor, output: str) -> Tensor:
    """The shift with its dims where the output has them."""
    kept = [dim for dim in dims if dim in output]
    shape = [size for size, dim in zip(shift.shape, dims, strict=True) if dim in output]
    order = sorted(range(len(kept)), key=lambda i: output.index(kept[i]))
    permuted = shift.reshape(shape).permute(order)
    sizes = iter(permuted.shape)
    return permuted.reshape([next(sizes) if dim in kept else 1 for dim in output])
