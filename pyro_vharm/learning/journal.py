"""A journal of long work: what is done survives a kill, and is not done again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from pyro_vharm.errors import InputError

__all__ = ["Journal", "open_journal", "random_state", "set_random_state"]

_SETTINGS = "settings"


@dataclass(frozen=True)
class Journal:
    """Pieces of work by name, each a file of plain tensors and numbers in one directory.

    A file is written under a temporary name and then renamed, so that under its own name it is
    always whole.

    Attributes:
        path: the directory; ``None`` keeps nothing.
        scope: put before every name.
    """

    path: Path | None = None
    scope: str = ""

    def within(self, scope: str) -> Journal:
        """The same journal, for pieces of one part of the work."""
        return Journal(self.path, f"{self.scope}{scope}-")

    def recall(self, name: str) -> dict[str, Any] | None:
        """What was written under a name, or ``None``."""
        file = self._file(name)
        if file is None or not file.exists():
            return None
        content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        return content

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write or replace what stands under a name."""
        file = self._file(name)
        if file is None:
            return
        temporary = file.with_suffix(".partial")
        torch.save(dict(content), temporary)
        temporary.replace(file)

    def once(self, name: str, work: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Do a piece of work and write its result down with the state of the random numbers.

        If it stands there already, it is not done again, and random numbers go on as after it.
        """
        known = self.recall(name)
        if known is not None:
            set_random_state(known.pop("random_state"))
            return known
        result = work()
        self.write(name, {**result, "random_state": random_state()})
        return result

    def _file(self, name: str) -> Path | None:
        return None if self.path is None else self.path / f"{self.scope}{name}.pt"


def random_state() -> list[torch.Tensor]:
    """Torch's random state, of the CPU and then of every CUDA device."""
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def set_random_state(state: Sequence[torch.Tensor]) -> None:
    """Put torch's random state back, of the devices that are there."""
    first, *others = state
    torch.set_rng_state(first)
    for device, other in zip(range(torch.cuda.device_count()), others, strict=False):
        torch.cuda.set_rng_state(other, device)


def open_journal(path: str | PathLike[str] | None, settings: str) -> Journal:
    """The journal in a directory, which is made if need be.

    Args:
        path: the directory; ``None`` for a journal that keeps nothing.
        settings: what the work depends on, as text.

    Raises:
        InputError: if the directory holds a journal of work with other settings.
    """
    if path is None:
        return Journal()
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    journal = Journal(directory)
    digest = hashlib.sha256(settings.encode()).hexdigest()
    known = journal.recall(_SETTINGS)
    if known is not None and known["digest"] != digest:
        raise InputError(
            f"checkpoint={str(path)!r} holds work that was begun with other settings, data or "
            f"parameters: {known['settings']}; pass those, or another directory"
        )
    journal.write(_SETTINGS, {"digest": digest, "settings": settings})
    return journal
