"""Functions of a batch's densities, traced to a graph and compiled where the work ahead pays."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from pyro_vharm.errors import UncompiledWarning
from pyro_vharm.model.clock import now
from pyro_vharm.model.data import Batch
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.parameters import capture_parameters
from pyro_vharm.model.state import current_call

__all__ = [
    "Accelerated",
    "accelerate",
    "batch_signature",
    "compiled",
    "eager",
    "forget_compiled",
    "traced",
]

_WORTH_TRACING, _WORTH_COMPILING = 2.0, 60.0  # seconds of eager work ahead
_FEW_CALLS = 32  # tracing and checking the graph take longer than all of them can save
_MOST_KEPT = 16

type Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Accelerated:
    """A function of a batch's densities and further tensors, in one of three forms.

    Attributes:
        call: takes the further tensors, then those of the batch.
        batch_tensors: the tensors of the batch.
        form: ``"eager"``, ``"graph"`` or ``"compiled"``.
        function: what it is a form of.
        is_best: whether nothing faster can be had, so that more work ahead changes nothing.
        graph: what was traced.
        call_number: the public call it was last known to be right in.
    """

    call: Callable[..., tuple[Tensor, ...]]
    batch_tensors: tuple[Tensor, ...]
    form: str
    function: Function
    is_best: bool = False
    graph: GraphModule | None = None
    call_number: int = 0

    def on(self, densities: UnitDensities) -> Accelerated:
        """The same for another batch whose arguments have the same `batch_signature`."""
        if self.form == "eager":
            return replace(eager(self.function, densities), is_best=self.is_best)
        return replace(self, batch_tensors=_batch_tensors(densities.batch))

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The function's values; nothing is recorded for differentiation."""
        if self.form != "eager":  # a graph holds for the strides that it was traced with
            inputs = _contiguous(inputs)
        with torch.no_grad():
            return tuple(self.call(*inputs, *self.batch_tensors))


def eager(function: Function, densities: UnitDensities) -> Accelerated:
    """Run the model by Pyro at every call."""
    return Accelerated(lambda *inputs: function(densities, *inputs), (), "eager", function)


def traced(function: Function, densities: UnitDensities, inputs: Sequence[Tensor]) -> Accelerated:
    """Run the model once and keep the graph of tensor operations.

    The tensors of the batch are inputs of the graph, so that batches of one shape share it.
    Parameters stay the same tensors: changes in place are seen, replacements are not.

    Raises:
        RuntimeError: if control flow depends on values, or an operation is random.
    """
    leaves, spec = pytree.tree_flatten(_content(densities.batch))
    lifted = _batch_tensors(densities.batch)

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        further, batch_tensors = tensors[: len(inputs)], iter(tensors[len(inputs) :])
        filled = [next(batch_tensors) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        batch = _with_content(densities.batch, pytree.tree_unflatten(filled, spec))
        return function(replace(densities, batch=batch), *further)

    with torch.no_grad(), pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own code
        graph = make_fx(lambda *tensors: flat(*tensors))(*_apart(inputs), *_apart(lifted))
    graph.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    graph.recompile()
    _refuse_random(graph)
    return Accelerated(graph, lifted, "graph", function, graph=graph, call_number=current_call())


def compiled(function: Function, densities: UnitDensities, inputs: Sequence[Tensor]) -> Accelerated:
    """The same graph, compiled by torch's inductor for the shapes of these inputs.

    Raises:
        Exception: whatever torch raises where there is no working compiler.
    """
    found = traced(function, densities, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call = torch.compile(found.call, dynamic=False, fullgraph=True)
        faster = replace(found, call=call, form="compiled", is_best=True)
        faster(*inputs)
    return faster


def accelerate(
    function: Function, densities: UnitDensities, inputs: Sequence[Tensor], num_calls: int
) -> Accelerated:
    """The form of a function that the number of calls ahead pays for.

    Eager for few calls or little work; a graph for seconds of it; compiled from a minute on. What
    was traced or compiled is kept by model, shapes and identity of parameters, and used whatever
    the work. Between two public calls anything that the model closes over may change, so graphs
    do not outlive one; compiled code does, where tracing anew gives the same graph.

    Args:
        function: takes densities and tensors, returns tensors; differentiates inside if at all.
            Everything else that it depends on must be in its identity and equality.
        densities: of one batch.
        inputs: an example of the further tensors.
        num_calls: how often it will be called.

    Warns:
        UncompiledWarning: once for each function and model, if it cannot be traced or compiled.
    """
    plain = eager(function, densities)
    key = _key(function, densities, inputs)
    if num_calls < _FEW_CALLS and key not in _GRAPHS:
        return plain
    started = now()
    expected = plain(*inputs)
    work = num_calls * (now() - started)
    if work >= _WORTH_TRACING:  # the first call is slower by what it sets up
        started = now()
        plain(*inputs)
        work = num_calls * (now() - started)
    if _is_new_to_this_call(key) and work < _WORTH_TRACING:
        return plain
    kept = _kept(key, plain, function, densities, inputs, expected)
    if kept is not None and (kept.is_best or work < _WORTH_COMPILING):
        return kept
    if work < _WORTH_TRACING:
        return plain
    make = compiled if work >= _WORTH_COMPILING else traced
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        return _keep(key, _first_that_works(make, function, densities, inputs, expected))


def forget_compiled() -> None:
    """Drop every graph that is kept, and the models and parameters it holds on to."""
    _GRAPHS.clear()


_GRAPHS: OrderedDict[Hashable, Accelerated] = OrderedDict()


def _first_that_works(
    make: Callable[..., Accelerated],
    function: Function,
    densities: UnitDensities,
    inputs: Sequence[Tensor],
    expected: tuple[Tensor, ...],
) -> Accelerated:
    reasons = []
    for form in (make, traced) if make is not traced else (traced,):
        try:
            found = form(function, densities, inputs)
            if _same(found(*inputs), expected):
                break
            reasons.append(f"{form.__name__} gives other numbers")
        except Exception as error:  # torch raises of every kind here, and eager always works
            reasons.append(f"{form.__name__} fails: {type(error).__name__}: {_first_line(error)}")
    else:
        found = eager(function, densities)
    if reasons:
        found = replace(found, is_best=True)
        warnings.warn(
            f"a long computation runs {found.form}, as {'; '.join(reasons)}. The numbers are the "
            "same; a C++ compiler on PATH, and a model without control flow that depends on "
            "tensors' values, make it faster.",
            UncompiledWarning,
            stacklevel=4,
        )
    return found


def _key(function: Function, densities: UnitDensities, inputs: Sequence[Tensor]) -> Hashable:
    """What a graph depends on beside the values of its inputs; ``None`` if that has no hash."""
    parameters = capture_parameters(densities.model, densities.batch).leaves.values()
    structure = densities.structure
    key = (
        function,
        densities.model,
        structure.layout,
        structure.model_runs,
        densities.sites,
        densities.num_units,
        tuple(id(leaf) for leaf in parameters),
        tuple(map(_signature, inputs)),
        batch_signature(densities.batch),
    )
    try:
        hash(key)
    except TypeError:
        return None
    return key


def batch_signature(batch: Batch) -> Hashable:
    """What a graph depends on of a batch: all but the values of its tensors."""
    leaves, spec = pytree.tree_flatten(_content(batch))
    return repr(spec), tuple(map(_signature, leaves))


def _signature(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return (tuple(leaf.shape), leaf.dtype, leaf.device)
    return leaf  # type: ignore[no-any-return]


def _kept(
    key: Hashable,
    plain: Accelerated,
    function: Function,
    densities: UnitDensities,
    inputs: Sequence[Tensor],
    expected: tuple[Tensor, ...],
) -> Accelerated | None:
    kept = _GRAPHS.get(key)
    if kept is None:
        return None
    if kept.form == "eager":
        return replace(plain, is_best=True)
    if _is_new_to_this_call(key) and not _still_holds(kept, function, densities, inputs):
        del _GRAPHS[key]
        return None
    again = replace(kept.on(densities), call_number=current_call())
    _GRAPHS[key] = again
    elsewhere = tuple(_moved(tensor) for tensor in inputs)
    if not (_same(again(*inputs), expected) and _same(again(*elsewhere), plain(*elsewhere))):
        del _GRAPHS[key]  # a tensor that the model closes over was replaced
        return None
    _GRAPHS.move_to_end(key)
    return again


def _is_new_to_this_call(key: Hashable) -> bool:
    """Whether a graph is kept that must be traced anew before it may be used."""
    kept = _GRAPHS.get(key)
    return kept is not None and kept.form != "eager" and kept.call_number != current_call()


def _still_holds(
    kept: Accelerated, function: Function, densities: UnitDensities, inputs: Sequence[Tensor]
) -> bool:
    """Whether compiled code is that of the graph which the model gives now."""
    if kept.form != "compiled" or kept.graph is None:
        return False
    try:
        now = traced(function, densities, inputs).graph
    except RuntimeError:
        return False
    return now is not None and now.code == kept.graph.code and _same_constants(now, kept.graph)


def _same_constants(first: GraphModule, second: GraphModule) -> bool:
    names = [str(node.target) for node in first.graph.nodes if node.op == "get_attr"]
    pairs = [(getattr(first, name), getattr(second, name)) for name in names]
    return all(a is b or _equal(a, b) for a, b in pairs)


def _equal(a: Tensor, b: Tensor) -> bool:
    learned = a.requires_grad or b.requires_grad  # must be the same tensor, not an equal one
    return not learned and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _moved(tensor: Tensor) -> Tensor:
    """Another point, as a graph may be right at one by accident."""
    ramp = torch.linspace(0.05, 0.15, tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    return tensor + ramp.reshape(tensor.shape)


def _keep(key: Hashable, found: Accelerated) -> Accelerated:
    if key is not None:
        _GRAPHS[key] = found
        while len(_GRAPHS) > _MOST_KEPT:
            _GRAPHS.popitem(last=False)
    return found


def _batch_tensors(batch: Batch) -> tuple[Tensor, ...]:
    leaves = pytree.tree_leaves(_content(batch))
    return _contiguous([leaf for leaf in leaves if isinstance(leaf, Tensor)])


def _contiguous(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(_with_usual_strides(tensor) for tensor in tensors)


def _with_usual_strides(tensor: Tensor) -> Tensor:
    """Contiguous; dims of size 1 may still have any stride, and each makes code compile anew."""
    tensor = tensor.contiguous()
    return tensor.view(-1).view(tensor.shape) if 1 in tensor.shape else tensor


def _apart(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Contiguous copies: of one tensor given twice a trace would make one input."""
    return tuple(_with_usual_strides(tensor).clone() for tensor in tensors)


def _content(batch: Batch) -> tuple[Any, ...]:
    return batch.args, dict(batch.kwargs), dict(batch.subsample)


def _with_content(batch: Batch, content: tuple[Any, ...]) -> Batch:
    args, kwargs, subsample = content
    return replace(batch, args=args, kwargs=kwargs, subsample=subsample)


def _same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(
        torch.allclose(a, b, rtol=_tolerance(b), atol=_tolerance(b), equal_nan=True)
        for a, b in zip(found, expected, strict=True)
    )


def _tolerance(like: Tensor) -> float:
    return 1e4 * torch.finfo(like.dtype).eps


def _refuse_random(graph: GraphModule) -> None:
    for node in graph.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            raise RuntimeError(f"{node.target} is random")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")
