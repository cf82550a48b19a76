"""Measuring the shape of posteriors from weighted particles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_vharm.diagnostics.discrete_shape import join_discrete, measure_discrete
from pyro_vharm.diagnostics.even_grid import MOST_GRID_DIMS, even_grid
from pyro_vharm.diagnostics.marginals import (
    dips,
    marginal_negentropies,
    quantiles,
    with_principal_axes,
)
from pyro_vharm.diagnostics.modes import find_modes
from pyro_vharm.diagnostics.shape import (
    IN_NATS,
    OF_COORDINATES,
    ContinuousShape,
    PosteriorShape,
    join_shapes,
)
from pyro_vharm.diagnostics.weighted_moments import (
    Blocks,
    Measured,
    Weighted,
    grid_blocks,
    measure_moments,
    random_blocks,
    standardise,
)
from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Kind, UnitEstimates
from pyro_vharm.inference.annealing import AnnealedImportanceSampling
from pyro_vharm.inference.choice import Choice, InferenceMethod, choose_method
from pyro_vharm.inference.gaussians import match_gaussian
from pyro_vharm.model.configurations import MOST_CONFIGURATIONS, list_configurations
from pyro_vharm.model.data import Data
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.minibatches import unit_blocks
from pyro_vharm.model.problem import Problem, prepare
from pyro_vharm.model.state import untouched
from pyro_vharm.model.tracing import PyroFunction
from pyro_vharm.particles import Particles, effective_sample_size, resample

__all__ = ["choose_for_shape", "measure_shape", "posterior_shape"]

_PARTICLES, _PARTICLES_PER_DIM, _FEWEST_STEPS = 256, 8, 5
_FEWEST_GROUPS, _UNITS_PER_BLOCK = 4, 256
_ROWS_PER_PASS = 2**17
_DRAWS, _CLIMBS = 1000, 32
_SIZE_OF_GRID = 1000.0


def posterior_shape(
    model: PyroFunction,
    data: Data,
    *,
    guide: PyroFunction | None = None,
    method: InferenceMethod | None = None,
    unit_plate: str | None = None,
    parameters: Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> PosteriorShape:
    """The shape of the true posterior of each unit, at the parameters that the model holds now.

    Weighted particles are handled as weighted. As log Ẑ is known, so is log p(h | v) at each
    particle, and with it the entropy: what is in nats needs no estimate of a joint density. The
    posterior of discrete latents is exact given the continuous ones.

    Args:
        model: a Pyro model.
        data: positional arguments as a tuple, keyword arguments as a Mapping, or an iterable of
            batches.
        guide: a trained guide; its draws say where to look. Without one, the prior does.
        method: where particles come from. By default `Quadrature` for units of one or two
            dimensions, else `AnnealedImportanceSampling` with at least 256 particles of about
            equal weights.
        unit_plate: name of the plate of independent units; found if left out.
        parameters: sites that the guide holds as point masses (as AutoDelta does) and that count
            as θ.
        seed: of all random numbers used.
        progress: show bars on long work.

    Raises:
        InputError: where model, guide or data break a constraint, before any long work; where all
            latents are discrete with too many configurations; and where there are too few
            particles for so many dimensions.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         h = pyro.sample("h", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...         pyro.sample("x", dist.Normal(h.sum(-1), 1.0), obs=x)
    >>> shape = posterior_shape(model, (torch.tensor([0.5, -3.0]),), progress=False)
    >>> abs(shape.continuous.non_gaussianity.total().value) < 1e-4  # the posterior is Gaussian
    True
    >>> round(shape.continuous.gaussian_dependence.total().per_unit.value, 2)  # ½ log (4/3)
    0.14
    >>> shape.continuous.modes.counts
    tensor([1, 1])
    """
    with untouched(seed, model, guide):
        problem = prepare(model, guide, data, unit_plate=unit_plate, parameters=parameters)
        return measure_shape(problem, choose_for_shape(problem, method), progress=progress)


def choose_for_shape(problem: Problem, method: InferenceMethod | None) -> Choice:
    """The user's method, or one whose particles have weights of about equal size."""
    choice = choose_method(problem.densities, method)
    dim = problem.densities[0].dim
    if method is not None or dim == 0:
        return choice
    count = max(_PARTICLES, 32 * math.ceil(_PARTICLES_PER_DIM * dim / 32))
    annealed = AnnealedImportanceSampling(count, num_steps=_FEWEST_STEPS, target_width=1.0 / count)
    if choice.otherwise is None or dim > MOST_GRID_DIMS:
        return Choice(annealed)
    return replace(choice, otherwise=annealed)


def measure_shape(problem: Problem, choice: Choice, *, progress: bool) -> PosteriorShape:
    """`posterior_shape` for a problem that is prepared, at the parameters it holds now."""
    listed = _can_list(problem)
    runs = [choice.method.run(part, progress=progress) for part in problem.densities]
    method = choice.method
    if choice.otherwise is not None and not all(_converged(run) for run in runs):
        method = choice.otherwise
        runs = [method.run(part, progress=progress) for part in problem.densities]
    continuous = problem.densities[0].dim > 0
    if continuous:
        _check_number(runs[0])
    shapes, discrete = [], []
    for densities, run in zip(problem.densities, runs, strict=True):
        for units, block in unit_blocks(densities, _UNITS_PER_BLOCK):
            part = _of_units(run, units)
            if continuous:
                shapes.append(_shape_of_block(block, part, str(method)))
            configurations = list_configurations(block) if listed else None
            if configurations is not None:
                discrete.append(measure_discrete(block, part, configurations))
    return PosteriorShape(
        join_shapes(shapes) if shapes else None, join_discrete(discrete) if discrete else None
    )


def _can_list(problem: Problem) -> bool:
    """Whether there are discrete latents, in few enough configurations.

    Raises:
        InputError: if there are too many, and no other latents.
    """
    first = problem.densities[0]
    if not first.structure.discrete:
        return False
    if list_configurations(first) is not None:
        return True
    if first.dim == 0:
        raise InputError(
            f"all latents of the model are discrete, in more than {MOST_CONFIGURATIONS} "
            "configurations of one unit, which are not listed; log_evidence sums over them"
        )
    return False


def _converged(run: Particles) -> bool:
    error = run.numerical_error
    return error is None or bool(torch.isfinite(error).all())


def _check_number(run: Particles) -> None:
    count, _, dim = run.unconstrained.shape
    if count < 4 * (dim + 1):
        raise InputError(
            f"method must give at least {4 * (dim + 1)} particles for units of {dim} dimensions, "
            f"not {count}; raise num_particles"
        )
    if run.kind <= Kind.NUMERICAL and dim > MOST_GRID_DIMS:
        raise InputError(
            f"method may be Quadrature for units of at most {MOST_GRID_DIMS} dimensions, not "
            f"{dim}: a shape needs an even grid; use AnnealedImportanceSampling"
        )
    num_groups = count // run.group_size
    if run.kind > Kind.NUMERICAL and num_groups < _FEWEST_GROUPS:
        raise InputError(
            f"method must give at least {_FEWEST_GROUPS} independent groups of particles, whose "
            f"differences are the errors, not {num_groups}; raise num_groups or num_chains"
        )


def _of_units(run: Particles, units: Tensor) -> Particles:
    """What the shape of some of the units needs."""
    evidence, sizes = run.log_evidence, run.chain_sizes
    return Particles(
        run.unconstrained[:, units],
        run.log_weights[:, units],
        run.kind,
        group_size=run.group_size,
        log_evidence=None if evidence is None else evidence.take(units),
        chain_sizes=None if sizes is None else sizes[units],
    )


def _shape_of_block(densities: UnitDensities, run: Particles, method: str) -> ContinuousShape:
    on_grid = run.kind <= Kind.NUMERICAL
    run = even_grid(densities, run) if on_grid else run
    count, _, dim = run.unconstrained.shape
    known = run.log_evidence
    particles = standardise(
        run.unconstrained,
        run.log_weights,
        _log_joint(densities, run.unconstrained),
        None if known is None else known.values,
    )
    blocks = grid_blocks(count, dim) if on_grid else random_blocks(count, run.group_size)
    sizes = _effective_sizes(run, on_grid)
    found = _measures(particles, blocks, sizes)
    draws = _draws(run, on_grid)
    points = _marginals(particles, draws if on_grid else None, sizes)
    statistics, p_values = dips(points)
    climbers = _draws(run, on_grid)[:_CLIMBS]
    in_nats = {name: _in_nats(found[name], run.kind, on_grid, known) for name in IN_NATS}
    return ContinuousShape(
        **in_nats,
        coordinates={name: found[name] for name in OF_COORDINATES},
        effective_rank=found["effective_rank"],
        dips=statistics,
        dip_p_values=p_values,
        modes=find_modes(densities, climbers, match_gaussian(draws)),
        draws=draws,
        quantiles=points[..., :dim] * particles.scale + particles.mean,
        labels=densities.labels,
        effective_sizes=sizes,
        method=method,
    )


def _log_joint(densities: UnitDensities, latents: Tensor) -> Tensor:
    passes = latents.split(max(_ROWS_PER_PASS // densities.num_units, 1))
    with torch.no_grad():
        return torch.cat([densities.log_joint(part) for part in passes])


def _effective_sizes(run: Particles, on_grid: bool) -> Tensor:
    if on_grid:
        return torch.full_like(run.log_weights[0], _SIZE_OF_GRID)
    sizes = effective_sample_size(run.log_weights)
    return sizes if run.chain_sizes is None else torch.minimum(sizes, run.chain_sizes)


def _marginals(particles: Weighted, draws: Tensor | None, sizes: Tensor) -> Tensor:
    """Quantiles along coordinates and principal axes; of a grid, those of draws in its cells."""
    if draws is not None:
        standard = (draws.double() - particles.mean) / particles.scale
        weights = torch.full_like(standard[..., 0], 1 / len(draws))
        particles = particles._replace(standard=standard, weights=weights)
        sizes = torch.full_like(sizes, len(draws))
    return quantiles(with_principal_axes(particles), particles.weights, sizes)


def _measures(particles: Weighted, blocks: Blocks, sizes: Tensor) -> dict[str, Measured]:
    versions = measure_moments(particles, blocks)
    bound = versions["gaussian_dependence"] + versions["non_gaussianity"]
    dim = particles.standard.shape[-1]
    if dim == 1:
        versions["total_correlation"] = torch.zeros_like(bound)
    else:
        marginals = marginal_negentropies(particles, blocks, sizes)
        versions["total_correlation"] = bound - marginals.sum(-1)
    squares = {"gaussian_dependence": dim * (dim - 1) // 2}  # of correlations
    return {name: blocks.measured(versions[name], squares.get(name)) for name in versions}


def _in_nats(
    measured: Measured, kind: Kind, on_grid: bool, evidence: UnitEstimates | None
) -> UnitEstimates:
    values, errors = measured
    if on_grid:
        return UnitEstimates(values, torch.zeros_like(values), kind, errors)
    if evidence is not None:
        errors = torch.hypot(errors, evidence.errors)
    return UnitEstimates(values, errors, kind)


def _draws(run: Particles, on_grid: bool) -> Tensor:
    """Unweighted draws; of a grid, spread over the cells of its nodes."""
    draws = resample(run.unconstrained, run.log_weights)[:_DRAWS]
    if not on_grid:
        return draws
    nodes, dim = run.unconstrained, run.unconstrained.shape[-1]
    count = round(len(nodes) ** (1 / dim))
    for axis in range(dim):
        step = nodes[count**axis] - nodes[0]
        draws = draws + (torch.rand_like(draws[..., :1]) - 0.5) * step
    return draws
