"""What every model of the zoo comes with."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A model, a guide that fits it imperfectly, the data, and log p(v_u) of each unit."""

    name: str
    model: Callable
    guide: Callable
    data: tuple
    exact: Tensor | None
    unit_plate: str | None = "units"
