"""The history of a training: what model and guide held at chosen steps, in memory or on disk."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.model.snapshots import assign_tensors, live_tensors, snapshot
from pyro_vharm.model.tracing import PyroFunction
from pyro_vharm.tables import html_table, text_table

__all__ = ["Checkpoint", "History", "take_checkpoint"]

_MOST_ROWS = 12


@dataclass(frozen=True)
class Checkpoint:
    """What model and guide held after one step of training.

    Attributes:
        step: the step, counted by the training loop.
        values: name → value of every parameter, unconstrained, and every buffer; see
            `take_checkpoint`.
        scalars: numbers that came along, such as a loss.
    """

    step: int
    values: Mapping[str, Tensor]
    scalars: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.step < 0:
            raise InputError(f"step must not be negative, got {self.step}")

    def save(self, directory: str | PathLike[str]) -> None:
        """Write a file of plain tensors under a temporary name, then rename it.

        Under its own name a file is always whole: a process that is killed while writing leaves
        at most a temporary file, which nothing reads.
        """
        target = Path(directory) / f"step-{self.step:012d}.pt"
        temporary = target.with_suffix(".partial")
        content = {"step": self.step, "values": dict(self.values), "scalars": dict(self.scalars)}
        torch.save(content, temporary)
        temporary.replace(target)


def take_checkpoint(
    model: PyroFunction,
    guide: PyroFunction | None,
    step: int,
    scalars: Mapping[str, float | Tensor] | None = None,
) -> Checkpoint:
    """Copy what model and guide hold now; they are not run.

    Parameters in Pyro's param store have their names there; the whole store is taken, as it does
    not know whose a parameter is. Parameters of modules that were never run, and buffers, are
    named like ``model.0.weight``: the first module that the model is or reaches.

    Args:
        model: a Pyro model.
        guide: its guide, or ``None``.
        step: the step of training.
        scalars: numbers to keep beside the values.

    Raises:
        InputError: if they hold nothing yet.
    """
    live = live_tensors(model, guide)
    if not live:
        raise InputError(
            "model and guide hold no parameter yet: Pyro makes them when the two are first run; "
            "take the first checkpoint after a step of training"
        )
    numbers = {
        name: float(number.detach() if isinstance(number, Tensor) else number)
        for name, number in (scalars or {}).items()
    }
    return Checkpoint(operator.index(step), snapshot(live), numbers)


@dataclass(frozen=True)
class History(Sequence[Checkpoint]):
    """Checkpoints of a training, in order of their steps.

    Attributes:
        model: the Pyro model that they set.
        guide: its guide, or ``None``.
        checkpoints: with rising steps.
    """

    model: PyroFunction
    guide: PyroFunction | None
    checkpoints: tuple[Checkpoint, ...] = ()

    def __post_init__(self) -> None:
        steps = self.steps
        if any(later <= earlier for earlier, later in pairwise(steps)):
            raise InputError(f"checkpoints must have rising steps, got {list(steps)}")

    @classmethod
    def load(
        cls, path: str | PathLike[str], model: PyroFunction, guide: PyroFunction | None
    ) -> History:
        """Read the whole checkpoints in a directory, also while another process adds to it.

        No code is unpickled, and values are read from disk when they are used.

        Raises:
            InputError: if there is no such directory.
        """
        if not Path(path).is_dir():
            raise InputError(f"path must be a directory of checkpoints, and {path} is none")
        files = sorted(Path(path).glob("step-*.pt"))
        read = (
            torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in files
        )
        return cls(model, guide, tuple(Checkpoint(**content) for content in read))

    def save(self, path: str | PathLike[str]) -> None:
        """Write one file per checkpoint into a directory, which is made if need be."""
        Path(path).mkdir(parents=True, exist_ok=True)
        for checkpoint in self:
            checkpoint.save(path)

    @property
    def steps(self) -> tuple[int, ...]:
        """The step of each checkpoint."""
        return tuple(checkpoint.step for checkpoint in self.checkpoints)

    def appended(self, checkpoint: Checkpoint) -> History:
        """The history with one checkpoint more."""
        return replace(self, checkpoints=(*self.checkpoints, checkpoint))

    def values(self, name: str) -> Tensor:
        """One parameter along the training, unconstrained, shape ``(checkpoint, *its own)``.

        Raises:
            InputError: if a checkpoint does not hold it.
        """
        for checkpoint in self:
            if name not in checkpoint.values:
                raise InputError(
                    f"name must be a parameter of every checkpoint; step {checkpoint.step} has "
                    f"{sorted(checkpoint.values)}, not {name!r}"
                )
        return torch.stack([checkpoint.values[name] for checkpoint in self])

    def restore(self, index: int) -> None:
        """Set model and guide to a checkpoint, in place.

        Parameters that were made after it keep their values.

        Raises:
            InputError: if they lack a parameter that the checkpoint holds, or a shape differs.
        """
        checkpoint = self.checkpoints[index]
        live = live_tensors(self.model, self.guide)
        assign_tensors(live, checkpoint.values, f"the checkpoint of step {checkpoint.step}")

    @contextmanager
    def at(self, index: int) -> Iterator[Checkpoint]:
        """Hold model and guide at a checkpoint; afterwards they are as before.

        Raises:
            InputError: as `restore` does.
        """
        live = live_tensors(self.model, self.guide)
        before = snapshot(live)
        try:
            self.restore(index)
            yield self.checkpoints[index]
        finally:
            assign_tensors(live, before, "the state before")

    @overload
    def __getitem__(self, index: int) -> Checkpoint: ...

    @overload
    def __getitem__(self, index: slice) -> History: ...

    def __getitem__(self, index: int | slice) -> Checkpoint | History:
        """One checkpoint; of a slice, the history of those."""
        if isinstance(index, slice):
            return replace(self, checkpoints=self.checkpoints[index])
        return self.checkpoints[index]

    def __len__(self) -> int:
        return len(self.checkpoints)

    def __str__(self) -> str:
        names = sorted({name for checkpoint in self for name in checkpoint.scalars})
        rows = [
            [str(c.step), *(f"{c.scalars[n]:.3f}" if n in c.scalars else "" for n in names)]
            for c in self
        ]
        if len(rows) > _MOST_ROWS:
            half = _MOST_ROWS // 2
            rows = [*rows[:half], ["…"] * (1 + len(names)), *rows[-half:]]
        return "\n".join([f"{len(self)} checkpoints", text_table(["step", *names], rows)])

    def _repr_html_(self) -> str:
        return html_table(str(self))
