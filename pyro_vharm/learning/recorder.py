"""A recorder for any training loop: one line, and little time."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.learning.history import History, take_checkpoint
from pyro_vharm.model.tracing import PyroFunction

__all__ = ["Recorder"]


class Recorder:
    """Copies what model and guide hold, every so many steps of a training loop.

    The loop may be SVI's, torch's or any other that changes parameters in place. Model and guide
    are not run, and no random number is drawn: training goes as it would without.

    Args:
        model: the Pyro model that is trained.
        guide: its guide, or ``None``.
        every: steps between checkpoints.
        path: a directory to write checkpoints to, one file each; in memory if left out. What it
            holds already is continued. It can be read while training goes on, by `History.load`,
            and loses nothing that was whole when the process is killed.

    Raises:
        InputError: if `every` is less than 1.

    >>> import pyro, pyro.distributions as dist, torch
    >>> def model(x):
    ...     loc = pyro.param("loc", torch.tensor(0.0))
    ...     with pyro.plate("data", len(x)):
    ...         h = pyro.sample("h", dist.Normal(loc, 1.0))
    ...         pyro.sample("x", dist.Normal(h, 1.0), obs=x)
    >>> guide = pyro.infer.autoguide.AutoNormal(model)
    >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
    >>> recorder = Recorder(model, guide, every=10)
    >>> for step in range(21):
    ...     loss = svi.step(torch.ones(5))
    ...     recorder.record(step, loss=loss)
    >>> recorder.history.steps
    (0, 10, 20)
    >>> with recorder.history.at(0):
    ...     early = pyro.param("loc").item()
    >>> abs(early) < abs(pyro.param("loc").item())
    True
    """

    def __init__(
        self,
        model: PyroFunction,
        guide: PyroFunction | None,
        *,
        every: int = 100,
        path: str | PathLike[str] | None = None,
    ) -> None:
        if every < 1:
            raise InputError(f"every must be at least 1, not {every}")
        self.every = every
        self._path = None if path is None else Path(path)
        self._kept = History(model, guide)
        if self._path is not None:
            self._path.mkdir(parents=True, exist_ok=True)
        steps = self.history.steps
        self._last = steps[-1] if steps else -1

    @property
    def history(self) -> History:
        """The checkpoints up to now."""
        if self._path is None:
            return self._kept
        return History.load(self._path, self._kept.model, self._kept.guide)

    def record(self, step: int, **scalars: float | Tensor) -> None:
        """Take a checkpoint if the step is a multiple of `every`.

        Args:
            step: the number of the step that was just taken.
            scalars: numbers to keep beside it, such as ``loss=``.

        Raises:
            InputError: if a checkpoint is due, and the history reaches that step already.
        """
        if step % self.every == 0:
            self.checkpoint(step, **scalars)

    def checkpoint(self, step: int, **scalars: float | Tensor) -> None:
        """Take a checkpoint now, whatever the step.

        Raises:
            InputError: if the history reaches that step already.
        """
        if step <= self._last:
            where = "in memory" if self._path is None else f"at {self._path}"
            raise InputError(
                f"step must be later than {self._last}, the last of the history {where}, got "
                f"{step}; go on from there, or give the new training a recorder of its own"
            )
        taken = take_checkpoint(self._kept.model, self._kept.guide, step, scalars)
        if self._path is None:
            self._kept = self._kept.appended(taken)
        else:
            taken.save(self._path)
        self._last = taken.step
