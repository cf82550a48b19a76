"""Two trained VAEs whose simulated images the sandwich is measured on.

There is no MNIST without a network: the larger one, 784-200-50, learns scikit-learn's 8×8 digits,
enlarged to 28×28 and binarised, so its weights and posteriors have a realistic scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import interpolate

from examples.digits_vae import NUM_TRAIN, load_images, make_vae, train

__all__ = ["VAES", "TrainedVAE"]

_LATENT_DIM, _HIDDEN, _SIDE = 50, 200, 28

type _Function = Callable[[Tensor], None]


class TrainedVAE(NamedTuple):
    """A model with its guide.

    Attributes:
        model: a decoder with one hidden layer and Bernoulli pixels.
        guide: a mean field by an encoder.
        latent_dim: dims of an image's latent.
        images: what it was trained on.
    """

    model: _Function
    guide: _Function
    latent_dim: int
    images: Tensor

    def weights(self) -> tuple[Tensor, ...]:
        """Weights and biases of the decoder, layer by layer."""
        store = pyro.get_param_store()
        names = [name for name in store if name.startswith("decoder$$$")]
        return tuple(store[name].detach() for name in names)


def _small(num_epochs: int) -> TrainedVAE:
    """The digits VAE of the examples, 64-64-4."""
    images, _ = load_images()
    torch.manual_seed(0)
    model, guide = make_vae()
    train(model, guide, images, num_epochs, seed=0)
    return TrainedVAE(model, guide, 4, images)


def _large(num_epochs: int) -> TrainedVAE:
    intensities = torch.tensor(load_digits().images / 16.0, dtype=torch.float32)[:NUM_TRAIN, None]
    enlarged = interpolate(intensities, size=(_SIDE, _SIDE), mode="bilinear").flatten(1)
    images = torch.bernoulli(enlarged, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model, guide = _make_large()
    train(model, guide, images, num_epochs, seed=0)
    return TrainedVAE(model, guide, _LATENT_DIM, images)


def _make_large() -> tuple[_Function, _Function]:
    pixels = _SIDE**2
    decoder = nn.Sequential(nn.Linear(_LATENT_DIM, _HIDDEN), nn.Tanh(), nn.Linear(_HIDDEN, pixels))
    encoder = nn.Sequential(
        nn.Linear(pixels, _HIDDEN), nn.Tanh(), nn.Linear(_HIDDEN, 2 * _LATENT_DIM)
    )

    def model(images: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("images", len(images)):
            prior = dist.Normal(images.new_zeros(_LATENT_DIM), 1.0).to_event(1)
            logits = decoder(pyro.sample("latent", prior))
            pyro.sample("image", dist.Bernoulli(logits=logits).to_event(1), obs=images)

    def guide(images: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("images", len(images)):
            loc, log_scale = encoder(images).chunk(2, dim=-1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


VAES: dict[str, Callable[[int], TrainedVAE]] = {"64-64-4": _small, "784-200-50": _large}
