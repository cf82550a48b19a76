"""What a training step costs with each objective, and how much of its gradient is noise.

Three tables: a step of `MarkovChainEM` with its transitions eager, as a graph and compiled, beside
the same algorithm written by hand in Pyro; a step of every objective beside Pyro's `Trace_ELBO`;
and the signal-to-noise ratio of the importance-weighted gradient against K. Run with
``python -m benchmarks.objectives``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import quantiles
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

import pyro_vharm as vh
from benchmarks.harmed_models import HARMED_MODELS
from benchmarks.timing import Timing, time_interleaved, use_one_core
from examples.digits_vae import load_images, make_vae
from pyro_vharm.inference.hamiltonian import HamiltonianMoves
from pyro_vharm.inference.start import StartDensity
from pyro_vharm.model.compilation import eager
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.problem import prepare
from pyro_vharm.objectives.gradients import BoundGradient
from pyro_vharm.objectives.importance_weighted import importance_weighted_bound
from pyro_vharm.objectives.objective import UnitObjective
from pyro_vharm.tables import text_table

__all__ = ["main", "signal_to_noise"]

_PARTICLES, _TRANSITIONS, _LEAPFROG = 8, 5, 5
_WORTH_ALL = 10**9  # calls ahead: more than compiling costs
_HAND = "Pyro, by hand"


@dataclass(frozen=True)
class Setting:
    """A model with one continuous site in one plate, its guide, and data.

    Attributes:
        model: the Pyro model.
        guide: its guide.
        data: their arguments.
        site: the latent.
    """

    model: Callable[..., None]
    guide: Callable[..., None]
    data: tuple[Tensor, ...]
    site: str


def _two_causes() -> Setting:
    harmed = HARMED_MODELS["two causes"]()
    harmed.install()
    return Setting(harmed.model, harmed.guide, harmed.data, "h")


def _digits() -> Setting:
    images, _ = load_images()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide = make_vae()
    return Setting(model, guide, (images[:100],), "latent")


SETTINGS: dict[str, Callable[[], Setting]] = {"two causes": _two_causes, "digits VAE": _digits}


@dataclass(frozen=True)
class EagerKernel(vh.HamiltonianKernel):
    """Runs the model by Pyro at every leapfrog step."""

    def moves(
        self,
        densities: UnitDensities,
        start: StartDensity,
        num_particles: int,
        num_calls: int,
        *,
        own_metric: bool = False,
    ) -> HamiltonianMoves:
        """Transitions that are never traced."""
        found = super().moves(densities, start, num_particles, 1, own_metric=own_metric)
        return replace(found, trajectory=eager(found.trajectory.function, densities))


@dataclass(frozen=True)
class CompiledKernel(vh.HamiltonianKernel):
    """Compiles its transitions whatever the work ahead."""

    def moves(
        self,
        densities: UnitDensities,
        start: StartDensity,
        num_particles: int,
        num_calls: int,
        *,
        own_metric: bool = False,
    ) -> HamiltonianMoves:
        """Compiled transitions."""
        return super().moves(densities, start, num_particles, _WORTH_ALL, own_metric=own_metric)


@dataclass(frozen=True)
class GraphKernel(CompiledKernel):
    """The same graphs, before they are compiled."""

    def moves(
        self,
        densities: UnitDensities,
        start: StartDensity,
        num_particles: int,
        num_calls: int,
        *,
        own_metric: bool = False,
    ) -> HamiltonianMoves:
        """Traced transitions."""
        found = super().moves(densities, start, num_particles, num_calls, own_metric=own_metric)
        graph = found.trajectory.graph
        assert graph is not None, "it was compiled from one"
        return replace(found, trajectory=replace(found.trajectory, call=graph, form="graph"))


def _chains(kernel: vh.HamiltonianKernel) -> vh.MarkovChainEM:
    return vh.MarkovChainEM(_PARTICLES, num_transitions=_TRANSITIONS, kernel=kernel)


def _step(objective: Any, setting: Setting) -> float:
    loss: float = objective.loss_and_grads(setting.model, setting.guide, *setting.data)
    return loss


def chain_peers(setting: Setting) -> dict[str, Callable[[], float]]:
    """A step of Markov chain EM in four ways, with the same number of gradients."""
    kernels = {
        "ours, eager": EagerKernel(num_leapfrog=_LEAPFROG),
        "ours, graph": GraphKernel(num_leapfrog=_LEAPFROG),
        "ours, compiled": CompiledKernel(num_leapfrog=_LEAPFROG),
    }
    _compare(setting)
    ours = {name: partial(_step, _chains(kernel), setting) for name, kernel in kernels.items()}
    return {_HAND: partial(_step_by_hand, setting, 0.3), **ours}


def _compare(setting: Setting) -> None:
    """Check that the log joint written by hand is that of this package."""
    densities = prepare(setting.model, setting.guide, setting.data).densities[0]
    with torch.no_grad(), pyro.validation_enabled(False):
        latents = densities.draw_latents(_PARTICLES)
        by_hand, ours = _log_joint(setting, latents), densities.log_joint(latents)
    if not torch.allclose(by_hand, ours, rtol=1e-4, atol=1e-4):
        raise ValueError(f"log joints differ by up to {float((by_hand - ours).abs().max())}")


def _log_joint(setting: Setting, latents: Tensor) -> Tensor:
    """What a user of Pyro would write: condition, trace under a plate of particles, sum."""
    conditioned = poutine.condition(setting.model, {setting.site: latents})
    return torch.stack(_log_probs(conditioned, setting.data)).sum(0)


def _log_probs(function: Callable[..., None], data: tuple[Tensor, ...]) -> list[Tensor]:
    with pyro.plate("particles", _PARTICLES, dim=-2):
        trace = prune_subsample_sites(poutine.trace(function).get_trace(*data))
    trace.compute_log_prob()
    sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
    return [site["unscaled_log_prob"] for site in sites]


def _step_by_hand(setting: Setting, step_size: float) -> float:
    """Guide draws, Hamiltonian transitions in the guide's scale, and the gradients there."""
    with pyro.validation_enabled(False):
        with torch.no_grad(), pyro.plate("particles", _PARTICLES, dim=-2):
            drawn = poutine.trace(setting.guide).get_trace(*setting.data).nodes[setting.site]
        latents, size = drawn["value"], step_size * drawn["fn"].base_dist.scale
        for _ in range(_TRANSITIONS):
            latents = _transition(partial(_log_joint, setting), latents, size)
        guide = poutine.condition(setting.guide, {setting.site: latents})
        log_guide = torch.stack(_log_probs(guide, setting.data)).sum(0)
        loss = -(_log_joint(setting, latents) + log_guide).mean(0).sum()
        loss.backward()
    return float(loss.detach())


def _transition(log_joint: Callable[[Tensor], Tensor], latents: Tensor, size: Tensor) -> Tensor:
    """One Hamiltonian transition of all particles of all units."""
    momentum = torch.randn_like(latents)
    before, gradient = _value_and_gradient(log_joint, latents)
    energy, position, moving = before - 0.5 * momentum.square().sum(-1), latents, momentum
    for _ in range(_LEAPFROG):
        moving = moving + 0.5 * size * gradient
        position = position + size * moving
        after, gradient = _value_and_gradient(log_joint, position)
        moving = moving + 0.5 * size * gradient
    change = after - 0.5 * moving.square().sum(-1) - energy
    accepted = torch.rand_like(change) < change.exp()
    return torch.where(accepted[..., None], position, latents)


def _value_and_gradient(
    log_joint: Callable[[Tensor], Tensor], latents: Tensor
) -> tuple[Tensor, Tensor]:
    leaf = latents.detach().requires_grad_()
    value = log_joint(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def objective_peers(setting: Setting) -> dict[str, Callable[[], float]]:
    """A step of every objective, gradients included."""
    objectives: dict[str, UnitObjective] = {
        "ELBO": vh.ImportanceWeightedELBO(1),
        "importance weights, K = 10": vh.ImportanceWeightedELBO(10),
        "importance weights, K = 50": vh.ImportanceWeightedELBO(50),
        "importance weights, K = 50, pathwise": vh.ImportanceWeightedELBO(
            50, gradient=vh.Pathwise()
        ),
        "annealed bound, 1 × 5": vh.AnnealedELBO(1, num_steps=5, name="short_path"),
        "annealed bound, 4 × 10": vh.AnnealedELBO(4, num_steps=10),
        "Markov chain EM, 8 × 5, compiled": _chains(CompiledKernel()),
    }
    dim = prepare(setting.model, setting.guide, setting.data).densities[0].dim
    if dim <= 2:
        objectives["exact evidence"] = vh.ExactEvidence()
    peers = {name: partial(_step, objective, setting) for name, objective in objectives.items()}
    return {"Pyro's Trace_ELBO": partial(_step, Trace_ELBO(max_plate_nesting=1), setting), **peers}


@dataclass(frozen=True)
class SignalToNoise:
    """|mean| over standard deviation of a gradient, averaged over parameters.

    Attributes:
        model: of θ.
        guide: of φ.
    """

    model: float
    guide: float


def signal_to_noise(
    gradient: BoundGradient, num_particles: int, num_gradients: int
) -> SignalToNoise:
    """Of the K-particle bound of the two causes, a little off the optimum of the ELBO."""
    harmed = HARMED_MODELS["two causes"]()
    harmed.install()
    store = pyro.get_param_store()
    for name, factor in (("slopes", 0.7), ("scales", 1.3)):
        store[name] = factor * harmed.guide_values[name]
    problem = prepare(harmed.model, harmed.guide, harmed.data)
    groups = problem.model_parameters.trainable(), problem.guide_parameters.trainable()
    leaves = [leaf for group in groups for leaf in group]
    found = []
    for _ in range(num_gradients):
        loss = importance_weighted_bound(problem.densities[0], num_particles, 1, gradient).loss
        parts = torch.autograd.grad(loss, leaves)
        found.append(torch.cat([part.flatten() for part in parts]))
    ratios = torch.stack(found).mean(0).abs() / torch.stack(found).std(0)
    size = sum(leaf.numel() for leaf in groups[0])
    return SignalToNoise(float(ratios[:size].mean()), float(ratios[size:].mean()))


def _noise_table(counts: Sequence[int], num_gradients: int) -> str:
    gradients: dict[str, BoundGradient] = {
        "pathwise": vh.Pathwise(),
        "doubly reparameterized": vh.DoublyReparameterized(),
    }
    rows = []
    for name, gradient in gradients.items():
        pyro.set_rng_seed(0)
        found = [signal_to_noise(gradient, count, num_gradients) for count in counts]
        rows.append([f"φ, {name}", *(f"{part.guide:.2f}" for part in found)])
        rows.append([f"θ, {name}", *(f"{part.model:.2f}" for part in found)])
    return text_table(["signal / noise", *(f"K = {count}" for count in counts)], rows)


def _timing_table(title: str, timings: Mapping[str, Timing], base: str) -> str:
    rows = []
    for name, timing in timings.items():
        low, _, high = quantiles(timing.rounds, n=4)
        ratio = timing.milliseconds / timings[base].milliseconds
        cells = f"{timing.milliseconds:.3g}", f"{low:.3g}–{high:.3g}", f"{ratio:.2f}"
        rows.append([name, *cells, f"{1 / ratio:.2f}"])
    return text_table([title, "ms", "quartiles", "of the first", "times as fast"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description="Cost and noise of a training step.")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each peer (at least 2)")
    parser.add_argument("--gradients", type=int, default=400, help="for the signal-to-noise ratio")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, for the quartiles; got {options.rounds}")
    use_one_core()
    torch.set_num_threads(1)
    for name in options.settings:
        for title, peers in (("Markov chain EM", chain_peers), ("all objectives", objective_peers)):
            found = peers(SETTINGS[name]())
            timings = time_interleaved(found, num_rounds=options.rounds)
            print(_timing_table(f"{title}, {name}", timings, next(iter(found))), end="\n\n")
    print(_noise_table((1, 4, 16, 64, 256), options.gradients))


if __name__ == "__main__":
    main()
