"""Time to a mean sandwich width on simulated images: ours beside the classical recipe.

The classical recipe starts at the prior, takes a sigmoid schedule and moves unwhitened; it is run
with more and more temperatures until the width is met: in this package's code with its upper bound,
which takes one run back, and with as many runs back as forward, as published; and the latter in
JAX. Ours starts at a Gaussian that is refitted, or left as the guide's draws give it. All is
included, pilots too, but for tracing and compiling, which are given apart. Time is the CPU time of
one thread, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyro
import torch
from torch import Tensor

from benchmarks.problems import vae_log_joint_jax
from benchmarks.tables import print_table
from benchmarks.vaes import VAES, TrainedVAE
from pyro_vharm import (
    AnnealedImportanceSampling,
    HamiltonianKernel,
    MatchedStart,
    PriorStart,
    SigmoidSchedule,
    bdmc,
)
from pyro_vharm.inference.bidirectional import simulate_densities
from pyro_vharm.inference.estimation import unit_widths
from pyro_vharm.model import compilation
from pyro_vharm.model.problem import prepare
from pyro_vharm.model.state import untouched
from pyro_vharm.particles import log_mean_exp

if find_spec("jax") is not None:
    import jax
    import jax.numpy as jnp

    from benchmarks.jax_annealing import JaxAnnealing, JaxStart

__all__ = [
    "CLASSICAL",
    "GUIDED",
    "JAX",
    "OURS",
    "PUBLISHED",
    "Point",
    "add_options",
    "run",
    "time_to_width",
]

OURS, GUIDED = "ours", "ours, start not refitted"
CLASSICAL, PUBLISHED = "classical, in this code", "the same, as many back"
JAX = "the same, in JAX"
_NUM_PARTICLES = 16
_SWEEPS, _GROWTH = 2, 4
_HEADER = ("VAE", "recipe", "temperatures", "mean width", "CPU s", "set-up s")
_SUMMARY = ("VAE", "recipe", "CPU s to the width", "times ours")


@dataclass(frozen=True)
class Point:
    """One run.

    Attributes:
        vae: name of the VAE.
        recipe: which method.
        setting: temperatures.
        width: mean over images, in nats.
        error: standard error of the mean.
        seconds: CPU time, without set-up.
        set_up: CPU time of tracing and compiling.
    """

    vae: str
    recipe: str
    setting: int
    width: float
    error: float
    seconds: float
    set_up: float


class _Clock:
    """CPU seconds spent in tracing and compiling."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its outermost calls timed."""

        def timed(*args: Any) -> Any:
            started, self._depth = time.process_time(), self._depth + 1
            try:
                return function(*args)
            finally:
                self._depth -= 1
                self.seconds += 0.0 if self._depth else time.process_time() - started

        timed.__name__ = function.__name__
        return timed


@contextmanager
def _set_up_clock() -> Iterator[_Clock]:
    clock = _Clock()
    with (
        patch.object(compilation, "traced", clock.wrap(compilation.traced)),
        patch.object(compilation, "compiled", clock.wrap(compilation.compiled)),
    ):
        yield clock


def _classical(num_steps: int) -> AnnealedImportanceSampling:
    return AnnealedImportanceSampling(
        _NUM_PARTICLES,
        num_steps=num_steps,
        start=PriorStart(),
        schedule=SigmoidSchedule(),
        kernel=HamiltonianKernel(whitened=False),
    )


def _ours(num_steps: int, *, refit: bool) -> AnnealedImportanceSampling:
    start = MatchedStart(refit=refit)
    return AnnealedImportanceSampling(_NUM_PARTICLES, num_steps=num_steps, start=start)


def _run_here(vae: TrainedVAE, method: AnnealedImportanceSampling, num_images: int) -> _Outcome:
    data = (vae.images[:num_images],)
    with _set_up_clock() as clock:
        started = time.process_time()
        sandwich = bdmc(vae.model, data, guide=vae.guide, method=method, progress=False)
        seconds = time.process_time() - started
    return sandwich.widths, seconds - clock.seconds, clock.seconds


def _run_as_published(
    vae: TrainedVAE, method: AnnealedImportanceSampling, num_images: int
) -> _Outcome:
    """As many runs back from the exact draw as forward, and the upper bound from those alone."""
    with _set_up_clock() as clock, untouched(0, vae.model, vae.guide):
        started = time.process_time()
        given = prepare(vae.model, vae.guide, (vae.images[:num_images],))
        ((simulated, exact),) = simulate_densities(given)
        run = method.run(simulated, exact=exact.expand(method.num_particles, -1, -1))
        widths = unit_widths(run)
        seconds = time.process_time() - started
    assert widths is not None, "runs back were asked for"
    return widths, seconds - clock.seconds, clock.seconds


type _Outcome = tuple[Tensor, float, float]


def _run_jax(vae: TrainedVAE, num_steps: int, num_images: int) -> _Outcome:
    """The classical recipe in JAX: two tuning sweeps, forward from the prior, back from h*."""
    generator = torch.Generator().manual_seed(1)
    weights, dim = vae.weights(), vae.latent_dim
    exact = torch.randn(num_images, dim, generator=generator)
    hidden = (exact @ weights[0].T + weights[1]).tanh()
    chance = (hidden @ weights[2].T + weights[3]).sigmoid()
    signs = 2 * torch.bernoulli(chance, generator=generator) - 1
    arrays = tuple(jnp.asarray(tensor.numpy()) for tensor in (signs, *weights))
    annealing = JaxAnnealing(vae_log_joint_jax, whitened=False)
    start = JaxStart(jnp.zeros((num_images, dim)), jnp.ones(()), jnp.ones(()))
    ramp = 1 / (1 + np.exp(-4.0 * (2 * np.arange(num_steps + 1) / num_steps - 1)))
    ramp = (ramp - ramp[0]) / (ramp[-1] - ramp[0])
    temperatures = jnp.asarray(np.tile(ramp[:, None], num_images), jnp.float32)
    latents = jnp.tile(jnp.asarray(exact.numpy()), (_NUM_PARTICLES, 1, 1))

    def sandwich(key: Any, temperatures: Any, latents: Any, arrays: Any) -> tuple[Any, Any]:
        keys = jax.random.split(key, 3)
        plan = start, temperatures
        sizes = annealing.tune(keys[0], _NUM_PARTICLES, *plan, _SWEEPS, arrays)
        forward = annealing.forward(keys[1], _NUM_PARTICLES, *plan, sizes, arrays)
        return forward, annealing.backward(keys[2], latents, *plan, sizes, arrays)

    inputs = jax.random.key(0), temperatures, latents, arrays
    started = time.process_time()
    call = jax.jit(sandwich).lower(*inputs).compile()
    compiling = time.process_time() - started
    started = time.process_time()
    forward, backward = (torch.tensor(np.asarray(found)) for found in call(*inputs))
    seconds = time.process_time() - started
    return -log_mean_exp(-backward) - log_mean_exp(forward), seconds, compiling


def _points(name: str, vae: TrainedVAE, options: argparse.Namespace) -> Iterator[Point]:
    num_images = options.images

    def point(recipe: str, setting: int, outcome: _Outcome) -> Point:
        widths, seconds, set_up = outcome
        mean, error = float(widths.mean()), float(widths.std()) / len(widths) ** 0.5
        return Point(name, recipe, setting, mean, error, seconds, set_up)

    for recipe, refit in ((OURS, True), (GUIDED, False)):
        _run_here(vae, _ours(1, refit=refit), num_images)  # what a first run sets up
        for steps in options.steps:
            method = _ours(steps, refit=refit)
            yield point(recipe, steps, _run_here(vae, method, num_images))
    recipes: dict[str, Callable[[int], _Outcome]] = {
        CLASSICAL: lambda steps: _run_here(vae, _classical(steps), num_images),
        PUBLISHED: lambda steps: _run_as_published(vae, _classical(steps), num_images),
    }
    if find_spec("jax") is not None:
        recipes[JAX] = lambda steps: _run_jax(vae, steps, num_images)
    for recipe, outcome in recipes.items():
        steps = options.first_steps
        while True:
            found = point(recipe, steps, outcome(steps))
            yield found
            if found.width <= options.width or steps * _GROWTH > options.most_steps:
                break
            steps *= _GROWTH


def time_to_width(points: Sequence[Point], width: float) -> float:
    """CPU seconds at which a width is met, between two runs on logarithmic scales.

    The first run's, if that meets it already; ∞ if none does.
    """
    ordered = sorted(points, key=lambda point: point.seconds)
    for before, after in zip([None, *ordered], ordered, strict=False):
        if after.width > width:
            continue
        if before is None:
            return after.seconds
        low = max(after.width, 1e-3 * width)  # by chance a width may be negative
        share = math.log(before.width / width) / math.log(before.width / low)
        return float(before.seconds * (after.seconds / before.seconds) ** share)
    return math.inf


def _summary(name: str, points: Sequence[Point], width: float) -> list[tuple[str, ...]]:
    recipes = list(dict.fromkeys(point.recipe for point in points))
    of = {recipe: [point for point in points if point.recipe == recipe] for recipe in recipes}
    times = {recipe: time_to_width(of[recipe], width) for recipe in recipes}
    rows: list[tuple[str, ...]] = []
    for recipe in recipes:
        longest = max(point.seconds for point in of[recipe])
        met = math.isfinite(times[recipe])
        seconds, sign = (times[recipe], "") if met else (longest, "> ")
        ratio = f"{sign}{seconds / times[OURS]:.1f}" if math.isfinite(times[OURS]) else "?"
        rows.append((name, recipe, f"{sign}{seconds:.3g}", ratio))
    return rows


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--vaes", nargs="+", choices=VAES, default=list(VAES), help="which to run")
    parser.add_argument("--images", type=int, default=32, help="simulated images")
    parser.add_argument("--epochs", type=int, default=60, help="passes of training")
    parser.add_argument("--width", type=float, default=0.1, help="nats, the width to meet")
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 3, 5], help="of ours")
    parser.add_argument("--first-steps", type=int, default=10, help="of the classical recipe")
    parser.add_argument("--most-steps", type=int, default=2560, help="to end with")
    parser.add_argument("--save", type=Path, help="where to write the points, as JSON")


def run(options: argparse.Namespace) -> None:
    """Run every recipe on every VAE, and print all runs and the time each takes to the width."""
    points: list[Point] = []
    summary = []
    for name in options.vaes:
        pyro.clear_param_store()
        found = []
        for point in _points(name, VAES[name](options.epochs), options):
            found.append(point)
            shown = str(point.setting), f"{point.width:.3f} ± {point.error:.3f}"
            print("#", name, point.recipe, *shown, f"{point.seconds:.3g} s", flush=True)
        points += found
        summary += _summary(name, found, options.width)
    rows = [
        (
            point.vae,
            point.recipe,
            str(point.setting),
            f"{point.width:.3f} ± {point.error:.3f}",
            f"{point.seconds:.3g}",
            f"{point.set_up:.2g}",
        )
        for point in points
    ]
    print(f"\n{options.images} simulated images, {_NUM_PARTICLES} chains forward\n")
    print_table(_HEADER, rows)
    print(f"\nto a mean width of {options.width:g} nat per image\n")
    print_table(_SUMMARY, summary)
    if options.save is not None:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(json.dumps([asdict(point) for point in points], indent=1) + "\n")
