"""Leaving no trace: random state, param store and gradients are the same before and after."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyro
import torch

__all__ = ["untouched"]


@contextmanager
def untouched(seed: int) -> Iterator[None]:
    """Work with random numbers from `seed`, then put everything global back, also on an error.

    Restored: the random states of Python, NumPy and torch (all devices), the names in Pyro's
    param store, and the values and gradients of the parameters in it. Values are restored in
    place, so that optimisers keep pointing at the same tensors.
    """
    store = pyro.get_param_store()
    state = store.get_state()
    leaves = list(state["params"].values())
    values = [leaf.detach().clone() for leaf in leaves]
    gradients = [leaf.grad for leaf in leaves]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            pyro.set_rng_seed(seed)
            for leaf in leaves:
                leaf.grad = None
            with store.scope(state):
                yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            with torch.no_grad():
                for leaf, value, gradient in zip(leaves, values, gradients, strict=True):
                    leaf.copy_(value)
                    leaf.grad = gradient
