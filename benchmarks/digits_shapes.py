"""The true posteriors of a digits VAE after three ways of learning from one start.

The model of ``examples/digits_vae.py`` is trained on the ELBO, on the importance-weighted bound and
by Markov chain EM: the same first weights, minibatches and optimiser, the same number of steps.
Then the shape of its true posteriors and its log evidence are measured on the same images. Run with
``python -m benchmarks.digits_shapes``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO

import pyro_vharm as vh
from benchmarks.tables import print_table
from examples.digits_vae import load_images, make_vae, train
from pyro_vharm.estimates import UnitEstimates

__all__ = ["main"]

_OBJECTIVES: dict[str, Callable[[], ELBO]] = {
    "ELBO": Trace_ELBO,
    "importance weights, K = 50": lambda: vh.ImportanceWeightedELBO(50),
    "Markov chain EM, 8 × 5": lambda: vh.MarkovChainEM(8),
}
_MEASURES = ("non_gaussianity", "total_correlation")


def _shown(units: UnitEstimates) -> str:
    mean = units.total().per_unit
    return f"{mean.value:.3f} ± {mean.mc_error:.3f}"


def _row(name: str, objective: ELBO, *, epochs: int, num_images: int, seed: int) -> list[str]:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, guide = make_vae()
    images, _ = load_images()
    train(model, guide, images, epochs, seed, objective)
    probe = (images[:num_images],)
    shape = vh.posterior_shape(model, probe, guide=guide, seed=seed).continuous
    assert shape is not None, "the latents are continuous"
    evidence = vh.log_evidence(model, probe, guide=guide, seed=seed).per_unit
    share, error = shape.modes.share_with_several
    return [
        name,
        _shown(evidence),
        *(_shown(getattr(shape, measure)) for measure in _MEASURES),
        f"{share:.0%} ± {error:.0%}",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train three times, and print one table."""
    parser = argparse.ArgumentParser(description="Posterior shapes after three ways of learning.")
    parser.add_argument("--epochs", type=int, default=200, help="passes over the images")
    parser.add_argument("--images", type=int, default=100, help="whose posteriors are measured")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [
        _row(
            name,
            make_objective(),
            epochs=options.epochs,
            num_images=options.images,
            seed=options.seed,
        )
        for name, make_objective in _OBJECTIVES.items()
    ]
    header = ["trained by", "log evidence", "non-Gaussianity", "dependence", "several modes"]
    print_table(header, rows)


if __name__ == "__main__":
    main()
