"""Leaving no trace: random state, param store and gradients are the same before and after."""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

__all__ = ["current_call", "reachable_modules", "untouched"]


_COUNTER = {"calls": 0}


def current_call() -> int:
    """The number of the last public call begun: a user changes things between two of them."""
    return _COUNTER["calls"]


@contextmanager
def untouched(seed: int, *functions: Callable[..., Any] | None) -> Iterator[None]:
    """Work with random numbers from `seed`, then put everything back, also on an error.

    Restored: the random states of Python, NumPy and torch (all devices), the names in Pyro's
    param store, the values and gradients of the parameters in it, and of the modules that the
    functions hold: attributes, buffers, parameters and train or eval mode. Values are restored in
    place, so that optimisers keep pointing at the same tensors.

    Args:
        seed: of the random numbers inside.
        functions: models and guides that are about to be run.
    """
    roots = [root for function in functions for root in reachable_modules(function)]
    every = {id(module): module for root in roots for module in root.modules()}
    modules = [_kept_module(module) for module in every.values()]
    _COUNTER["calls"] += 1
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
                    _put_back(leaf, value)
                    leaf.grad = gradient
            for module in modules:
                module.restore()


def _put_back(tensor: Tensor, value: Tensor) -> None:
    """Copy only where something changed: graphs that the user holds stay valid otherwise."""
    if not torch.equal(tensor, value):
        tensor.copy_(value)


@dataclass(frozen=True)
class _KeptModule:
    """One module, without its submodules, as it was."""

    module: nn.Module
    attributes: dict[str, Any]
    contents: dict[str, dict[str, Any]]
    values: list[tuple[Tensor, Tensor, Tensor | None]]

    def restore(self) -> None:
        own = self.module.__dict__
        own.clear()
        own.update(self.attributes)
        for name, content in self.contents.items():
            own[name].clear()
            own[name].update(content)
        with torch.no_grad():
            for tensor, value, gradient in self.values:
                _put_back(tensor, value)
                tensor.grad = gradient


def _kept_module(module: nn.Module) -> _KeptModule:
    own = module.__dict__
    tensors = [*own["_parameters"].values(), *own["_buffers"].values()]
    return _KeptModule(
        module,
        dict(own),
        {name: dict(value) for name, value in own.items() if isinstance(value, dict)},
        [(t, t.detach().clone(), t.grad) for t in tensors if t is not None],
    )


def reachable_modules(function: Any) -> list[nn.Module]:
    """The modules that a callable is, is bound to, or closes over, also inside containers.

    Each once, always in the same order, without the modules inside them.
    """
    return list({id(root): root for root in _reachable(function, 5, set())}.values())


def _contents(cell: Any) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # not filled yet
        return []


def _reachable(value: Any, depth: int, seen: set[int]) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif depth > 0 and id(value) not in seen:
        seen.add(id(value))
        for part in _parts(value):
            yield from _reachable(part, depth - 1, seen)


def _parts(value: Any) -> list[Any]:
    """What a callable or container holds that may run, or hold, a module."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set):
        return list(value)
    if inspect.ismethod(value):
        return [value.__self__, *getattr(value.__self__, "__dict__", {}).values(), value.__func__]
    if inspect.isfunction(value):
        known = value.__globals__
        held = [known[name] for name in sorted(_names(value.__code__)) if name in known]
        return held + [content for cell in value.__closure__ or () for content in _contents(cell)]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if callable(value) and not isinstance(value, type):
        return [*getattr(value, "__dict__", {}).values(), type(value).__call__]
    return []


def _names(code: CodeType) -> set[str]:
    """The global names that code and the functions inside it look up."""
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return set(code.co_names).union(*map(_names, inner))
