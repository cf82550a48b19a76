"""A variational autoencoder on handwritten digits: train it with SVI, then audit it.

The images are scikit-learn's 8×8 digits, binarised once with a fixed seed. The guide is a Gaussian
mean field whose arguments an encoder computes. What it cannot express, the decoder learns to avoid.

Run with ``python examples/digits_vae.py``; see ``--help`` for budgets.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, SVI, Trace_ELBO
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm.auto import tqdm

import pyro_vharm as vh

LATENT_DIM, HIDDEN, PIXELS = 4, 64, 64
NUM_TRAIN, BATCH_SIZE = 1500, 100


def load_images() -> tuple[Tensor, Tensor]:
    """Binary images, 1,500 to train on and 297 held out."""
    intensities = torch.tensor(load_digits().data / 16.0, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(intensities), generator=generator)
    images = torch.bernoulli(intensities, generator=generator)[order]
    return images[:NUM_TRAIN], images[NUM_TRAIN:]


def make_vae() -> tuple[Callable[[Tensor], None], Callable[[Tensor], None]]:
    """A new, untrained model and guide."""
    decoder = nn.Sequential(nn.Linear(LATENT_DIM, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, PIXELS))
    encoder = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2 * LATENT_DIM))

    def model(images: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("images", len(images)):
            prior = dist.Normal(images.new_zeros(LATENT_DIM), 1.0).to_event(1)
            latent = pyro.sample("latent", prior)
            pixels = dist.Bernoulli(logits=decoder(latent)).to_event(1)
            pyro.sample("image", pixels, obs=images)

    def guide(images: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("images", len(images)):
            loc, log_scale = encoder(images).chunk(2, dim=-1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


def train(
    model: Callable[[Tensor], None],
    guide: Callable[[Tensor], None],
    images: Tensor,
    num_epochs: int,
    seed: int,
    objective: ELBO | None = None,
) -> None:
    """Ordinary SVI: Trace_ELBO or another, shuffled minibatches, Adam with a falling step size."""
    pyro.set_rng_seed(seed)
    steps_per_epoch = -(-len(images) // BATCH_SIZE)
    decay = 0.05 ** (1 / (num_epochs * steps_per_epoch))
    loss = Trace_ELBO() if objective is None else objective
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.005, "lrd": decay}), loss)
    for _ in tqdm(range(num_epochs), desc="training the VAE", disable=None):
        for batch in images[torch.randperm(len(images))].split(BATCH_SIZE):
            svi.step(batch)


def main() -> None:
    """Train, audit, print the ledger, and write the DataTree and the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=600, help="passes of SVI over the images")
    parser.add_argument("--reference-steps", type=int, default=3000, help="steps of the reference")
    parser.add_argument("--images", type=int, default=NUM_TRAIN, help="most to train and test on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()

    train_images, heldout_images = (part[: options.images] for part in load_images())
    pyro.clear_param_store()
    pyro.set_rng_seed(options.seed)
    model, guide = make_vae()
    train(model, guide, train_images, options.epochs, options.seed)

    audit = vh.audit(
        model,
        guide,
        (train_images,),
        heldout=(heldout_images,),
        fresh=make_vae,
        learner=vh.GradientLearner(
            vh.ImportanceWeightedELBO(50),
            num_steps=options.reference_steps,
            learning_rate=0.003,
            batch_size=BATCH_SIZE,
            max_rounds=1,
        ),
        seed=options.seed,
    )
    print(audit)

    tree = vh.to_datatree(audit)
    options.out.mkdir(parents=True, exist_ok=True)
    tree.to_zarr(options.out / "digits_audit.zarr", mode="w", consolidated=False)
    vh.plot_ledger(tree).savefig(options.out / "digits_ledger.png", dpi=150)
    print(f"\nwritten: {options.out / 'digits_audit.zarr'}, {options.out / 'digits_ledger.png'}")


if __name__ == "__main__":
    main()
