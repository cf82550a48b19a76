"""Wall time, also where a GPU works behind the caller's back."""

from __future__ import annotations

import time

import torch

__all__ = ["now"]


def now() -> float:
    """Seconds on a clock, once what a GPU was asked for is done: its calls return before that."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
