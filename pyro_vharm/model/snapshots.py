"""All that training changes in a model and a guide, found without running them."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import torch
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.model.state import reachable_modules
from pyro_vharm.model.tracing import PyroFunction

__all__ = ["assign_tensors", "live_tensors", "snapshot"]


def live_tensors(model: PyroFunction, guide: PyroFunction | None) -> dict[str, Tensor]:
    """The unconstrained parameters and the buffers of model and guide: the tensors themselves.

    Those in Pyro's param store are named as there; the store does not know whose they are, so all
    of it is taken. Those of modules are also named ``model.0.weight``: role, which of the modules
    that the callable reaches, path in it; they enter the store when the model is first run.
    """
    found: dict[str, Tensor] = dict(pyro.get_param_store().get_state()["params"])
    for role, function in (("model", model), ("guide", guide)):
        for index, root in enumerate(reachable_modules(function)):
            for path, tensor in (*root.named_parameters(), *root.named_buffers()):
                found.setdefault(f"{role}.{index}.{path}", tensor)
    return found


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached copies in main memory, each tensor once, by the first of its names."""
    taken: dict[int, str] = {}
    for name, tensor in tensors.items():
        taken.setdefault(id(tensor), name)
    return {name: tensors[name].detach().to("cpu", copy=True) for name in taken.values()}


def assign_tensors(live: Mapping[str, Tensor], values: Mapping[str, Tensor], where: str) -> None:
    """Copy values into live tensors, in place.

    Raises:
        InputError: if a name is not live, or a shape differs; nothing is changed then.
    """
    missing = sorted(values.keys() - live.keys())
    if missing:
        raise InputError(
            f"{where} holds {missing}, which model and guide do not have; if they are made by "
            "pyro.param, run model and guide once on data first, so that Pyro's store has them"
        )
    for name, value in values.items():
        if live[name].shape != value.shape:
            raise InputError(
                f"{where} holds {name!r} with shape {tuple(value.shape)}, model and guide have it "
                f"with {tuple(live[name].shape)}"
            )
    with torch.no_grad():
        for name, value in values.items():
            live[name].copy_(value)
