"""Checks of one batch's densities, and the choice of how to run model and guide for many."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_vharm.errors import InputError, LoopedRunsWarning
from pyro_vharm.model.data import Batch
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.guide_runs import GuideRun, run_guide
from pyro_vharm.model.minibatches import guided_selector
from pyro_vharm.model.model_runs import run_model
from pyro_vharm.model.sites import (
    Site,
    latent_sites,
    masked_where,
    observed_sites,
    own_log_prob,
)
from pyro_vharm.model.structure import Structure
from pyro_vharm.model.tracing import CALL_FAILURES, PyroFunction, UnconstrainedSites, trace_call
from pyro_vharm.model.vectorising import Vectorisation, by_loop, by_plate, by_vmap

__all__ = ["check_densities", "choose_guide_runs", "choose_model_runs"]

_MANY_PARTICLES, _FEW_PARTICLES = 17, 5  # primes, so as to equal no size in the model by accident
_MANY_UNITS = 5000  # with which few particles must do, as memory goes with their product
_UNITS_AT_ONCE = 1000  # where units can be cut
_NUM_COMPARED = 2
_MOST_CLASSES = 4
_FAST = (by_plate, by_vmap)


def check_densities(
    densities: UnitDensities, sites: Sequence[Site], checked: Structure | None = None
) -> UnitDensities:
    """Check that the densities are what they must be, and choose how to run model and guide.

    Args:
        densities: of one batch, run particle by particle.
        sites: the model's latent sites in one run.
        checked: the structure of another batch that was checked: where it is the same, this one is
            run in the same way, and only looked at for values that are not finite.

    Returns:
        the same with the fastest runs that give the same numbers.

    Raises:
        InputError: if the densities are random, never finite, or not independent between units.

    Warns:
        LoopedRunsWarning: if nothing but a Python loop gives the right numbers.
    """
    blocks = _blocks(densities)
    some = next(blocks)
    if checked is not None and _same_but_for_runs(checked, densities.structure):
        alike = replace(some, structure=checked)
        latents = alike.draw_latents(_FEW_PARTICLES)
        if _close(alike.log_joint(latents)[:1], alike.plain_log_joint(latents[:1])):
            _check_masked_out(densities, sites)
            _check_finite(alike, latents, blocks)
            return replace(densities, structure=checked)
    count = _FEW_PARTICLES if some.num_units > _MANY_UNITS else _MANY_PARTICLES
    latents = some.draw_latents(_NUM_COMPARED)
    _check_deterministic(some, latents)
    _check_masked_out(densities, sites)
    structure = densities.structure
    if some.has_guide_density:
        assert some.guide is not None
        runs = choose_guide_runs(some.guide, some.batch, structure, count)
        structure = replace(structure, guide_runs=runs)
    structure = replace(structure, model_runs=choose_model_runs(some, _repeated(latents, count)))
    chosen = replace(some, structure=structure)
    _check_finite(chosen, latents, blocks)
    _check_independent(chosen, latents)
    return replace(densities, structure=structure)


def _blocks(densities: UnitDensities) -> Iterator[UnitDensities]:
    """Many units in random blocks, so that memory does not grow with them; all where that fails.

    What holds for any units holds for those of the first: that some have the same densities alone
    as among all says that they depend on no others.
    """
    units = torch.arange(densities.num_units, device=densities.device)
    select = guided_selector(densities) if len(units) > _UNITS_AT_ONCE else None
    if select is None:
        yield densities
        return
    for part in units[torch.randperm(len(units))].tensor_split(-(-len(units) // _UNITS_AT_ONCE)):
        yield select(part)


def _repeated(few: Tensor, count: int) -> Tensor:
    """A few draws over and over, as many as are to be run at once: a loop need make no more."""
    return few.repeat(-(-count // len(few)), *(1,) * (few.dim() - 1))[:count]


def _same_but_for_runs(checked: Structure, structure: Structure) -> bool:
    runs = {"model_runs": by_loop, "guide_runs": by_loop}
    return replace(checked, **runs) == replace(structure, **runs)  # type: ignore[arg-type]


def choose_model_runs(densities: UnitDensities, latents: Tensor) -> Vectorisation:
    """The first way to run the model for many particles that gives what a loop gives."""
    expected = densities.plain_log_joint(latents[:_NUM_COMPARED])

    def agrees(runs: Vectorisation) -> bool:
        structure = replace(densities.structure, model_runs=runs)
        found = replace(densities, structure=structure).log_joint(latents)
        return _close(found[:_NUM_COMPARED], expected)

    return _first_that(agrees, "model")


def choose_guide_runs(
    guide: PyroFunction, batch: Batch, structure: Structure, num_particles: int
) -> Vectorisation:
    """The first way to run the guide for many particles that gives what a loop gives.

    Raises:
        InputError: if its density at fixed values is random.
    """
    looped = replace(structure, guide_runs=by_loop)
    drawn = run_guide(guide, batch, looped, _NUM_COMPARED)
    few = {name: drawn.values[name] for name in drawn.random}
    fixed = {name: _repeated(value, num_particles) for name, value in few.items()}
    expected = run_guide(guide, batch, looped, _NUM_COMPARED, few)
    if not _same_run(drawn, expected):
        raise InputError(
            "the guide's density differs between two calls at the same values: it has random "
            "operations outside pyro.sample (dropout in train mode, perhaps, or a plate that "
            "subsamples at random); make it deterministic given its latents and parameters"
        )

    def agrees(runs: Vectorisation) -> bool:
        tried = replace(structure, guide_runs=runs)
        found = run_guide(guide, batch, tried, num_particles, fixed)
        fresh = run_guide(guide, batch, tried, num_particles)
        distinct = all(len(fresh.values[name].unique(dim=0)) > 1 for name in drawn.random)
        discrete = all(not fresh.values[name].is_floating_point() for name in drawn.random)
        return (distinct or discrete) and _same_run(found, expected)

    return _first_that(agrees, "guide")


def _same_run(many: GuideRun, few: GuideRun) -> bool:
    return _close(many.log_guide[:_NUM_COMPARED], few.log_guide) and all(
        _close(many.values[name][:_NUM_COMPARED], value) for name, value in few.values.items()
    )


def _first_that(agrees: Callable[[Vectorisation], bool], what: str) -> Vectorisation:
    reasons = []
    for runs in _FAST:
        try:
            if agrees(runs):
                return runs
            reasons.append("other numbers than one particle at a time gives")
        except CALL_FAILURES as error:
            reasons.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    warnings.warn(
        f"the {what} runs one particle at a time, which is slow: an outermost plate of particles "
        f"gives {reasons[0]}; torch.vmap gives {reasons[1]}. For the first, count dims from the "
        "right and let every operation broadcast over an extra batch dim on the left.",
        LoopedRunsWarning,
        stacklevel=2,
    )
    return by_loop


def _close(found: Tensor, expected: Tensor) -> bool:
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    tolerance = 1e3 * torch.finfo(expected.dtype).eps
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def _check_deterministic(densities: UnitDensities, latents: Tensor) -> None:
    first, second = (densities.plain_log_joint(latents) for _ in range(2))
    if not _close(first, second):  # sums by atomic operations of a GPU differ in rounding
        raise InputError(
            "the model's log density differs between two calls at the same latents: it has random "
            "operations outside pyro.sample (dropout in train mode, perhaps); make it "
            "deterministic given its latents and parameters"
        )


def _check_finite(
    densities: UnitDensities, latents: Tensor, others: Iterable[UnitDensities]
) -> None:
    """Refuse a model whose log density is finite at no draw from guide or prior, for some unit.

    Args:
        densities: of some units.
        latents: a few draws for them.
        others: the other units, to be run in the same way.
    """
    _check_finite_at(densities, latents)
    for block in others:
        alike = replace(block, structure=densities.structure)
        _check_finite_at(alike, alike.draw_latents(len(latents)))


def _check_finite_at(densities: UnitDensities, latents: Tensor) -> None:
    """At a few draws, or at more where those leave a unit without."""
    if _all_finite_somewhere(densities, latents):
        return
    more = densities.draw_latents(_MANY_PARTICLES)
    if _all_finite_somewhere(densities, more):
        return
    substitute = UnconstrainedSites(
        densities.structure.continuous,
        densities.structure.unpad(densities.unpack(more[:1]), unconstrained=True),
    )
    trace = trace_call(densities.model, densities.batch, substitute)
    sites = [*latent_sites(trace), *observed_sites(trace)]
    bad = [s["name"] for s in sites if not bool(torch.isfinite(own_log_prob(s)).all())]
    raise InputError(
        f"the log density is not finite at any of {len(more)} draws for some units; the sites "
        f"to look at are {bad}. Check the data for NaN and values outside the support, and the "
        "parameters for NaN."
    )


def _all_finite_somewhere(densities: UnitDensities, latents: Tensor) -> bool:
    return bool(torch.isfinite(densities.log_joint(latents)).any(0).all())


def _check_independent(densities: UnitDensities, latents: Tensor) -> None:
    """Refuse a unit plate whose units influence each other.

    A random half of the units is moved, then the other half, and what was left alone compared.
    """
    if densities.num_units < 2 or densities.dim == 0:
        return
    half = torch.randperm(densities.num_units) % 2 == 0
    before = densities.log_joint(latents)
    coupled = False
    for kept in (half, ~half):
        moved = torch.where(kept[:, None].to(latents.device), latents, latents.roll(1, 0) + 0.5)
        after = densities.log_joint(moved)
        finite = torch.isfinite(before) & kept.to(latents.device)
        coupled = coupled or not _close(after[finite], before[finite])
    if coupled:
        raise InputError(
            f"the elements of plate {densities.layout.plate!r} are not independent units: changing "
            "the latents of some changes the density of others (batch norm in train mode, or a "
            "computation across the plate)"
        )


def _check_masked_out(densities: UnitDensities, sites: Sequence[Site]) -> None:
    """Refuse latents that are masked out of their own prior and still have a say elsewhere."""
    masked = [site for site in sites if isinstance(masked_where(site), Tensor | bool)]
    if not masked:
        return
    masks = {site["name"]: masked_where(site) for site in masked}
    structure = replace(densities.structure, model_runs=by_loop)
    model, batch = densities.model, densities.batch
    drawn = run_model(model, batch, structure, 2).values
    before = run_model(model, batch, structure, 2, values=drawn, masks=masks).log_joint
    for moved in _moved_where_masked(masked, drawn, structure):
        after = run_model(model, batch, structure, 2, values=moved, masks=masks).log_joint
        if not _close(after, before):
            raise InputError(
                f"a masked-out element of {sorted(masks)} has a say in the density of other sites, "
                "so its prior there is flat and improper; mask what depends on it too, or take the "
                "mask off the latent"
            )


def _moved_where_masked(
    masked: Sequence[Site], drawn: Mapping[str, Tensor], structure: Structure
) -> Iterator[dict[str, Tensor]]:
    """The draws with masked-out elements elsewhere: at other draws, at each of a few classes."""
    for turn in range(_MOST_CLASSES):
        moved = dict(drawn)
        for site in masked:
            name, value = site["name"], drawn[site["name"]]
            kept = torch.as_tensor(masked_where(site), device=value.device)
            kept = kept.reshape(kept.shape + (1,) * structure.dims[name].event_dim)
            other = value.roll(1, 0)
            if name in structure.discrete:
                support = site["fn"].enumerate_support(expand=False)
                other = support[turn % len(support)].expand_as(value)
            moved[name] = torch.where(kept, value, other)
        yield moved
