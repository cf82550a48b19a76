"""The data a user hands over, as a list of batches of call arguments."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vharm.errors import InputError

__all__ = ["Batch", "Data", "as_batches", "fingerprint", "with_subsample"]

type Data = tuple[Any, ...] | Mapping[str, Any] | Iterable[Any]


@dataclass(frozen=True)
class Batch:
    """One call of model and guide.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        subsample: the indices that plates which subsample are held at, by plate.
        num_padded: how many of the last units only fill up such a plate, and do not count.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    subsample: Mapping[str, Tensor] = field(default_factory=dict)
    num_padded: int = 0


def as_batches(data: Data, name: str = "data") -> list[Batch]:
    """Read data as batches: a tuple is positional arguments, a Mapping keyword arguments.

    Anything else is an iterable of batches, each a tuple, list, Mapping or Tensor. It is passed
    over once and kept, so that every later use sees the same units in the same order, also when
    it is a generator or a shuffled loader.

    Raises:
        InputError: for a bare Tensor, no batch, an entry of another type, or an empty tensor.
    """
    if isinstance(data, Tensor):
        raise InputError(
            f"{name} is a bare Tensor of shape {tuple(data.shape)}; write ({name},) to pass it as "
            f"the one argument of the model, or list({name}.split(100)) to pass batches"
        )
    if isinstance(data, tuple | Mapping):
        batches = [_as_batch(data, name)]
    elif isinstance(data, Iterable):
        batches = [_as_batch(entry, f"{name}[{i}]") for i, entry in enumerate(data)]
    else:
        raise InputError(
            f"{name} must be a tuple, a Mapping or an iterable of batches, not {type(data)}"
        )
    if not batches:
        raise InputError(f"{name} has no batches; was a generator used up before?")
    return batches


def _as_batch(entry: Any, name: str) -> Batch:
    if isinstance(entry, Tensor):
        entry = (entry,)
    if isinstance(entry, Batch):
        return entry
    if isinstance(entry, Mapping):
        batch = Batch(kwargs=dict(entry))
    elif isinstance(entry, tuple | list):
        batch = Batch(args=tuple(entry))
    else:
        raise InputError(f"{name} must be a tuple, list, Mapping or Tensor, not {type(entry)}")
    for key, value in [*enumerate(batch.args), *batch.kwargs.items()]:
        if isinstance(value, Tensor) and value.numel() == 0:
            raise InputError(f"{name}[{key!r}] is an empty tensor of shape {tuple(value.shape)}")
    return batch


def with_subsample(batch: Batch, indices: Mapping[str, Tensor]) -> Batch:
    """The batch with plates that subsample held at given indices, where they are not yet."""
    return replace(batch, subsample={**indices, **batch.subsample}) if indices else batch


def fingerprint(content: Any) -> str:
    """A digest of the tensors and other leaves in nested containers and batches."""
    digest = hashlib.sha256()
    leaves = pytree.tree_leaves(content, is_leaf=lambda part: isinstance(part, Batch))
    for leaf in leaves:
        if isinstance(leaf, Batch):
            digest.update(fingerprint((leaf.args, dict(leaf.kwargs))).encode())
        elif isinstance(leaf, Tensor):
            plain = leaf.detach().cpu().contiguous()
            digest.update(str((plain.dtype, tuple(plain.shape))).encode())
            digest.update(plain.view(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()[:16]
