"""Small variational autoencoders, exact by quadrature over one or two latents."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from .case import Case
from .quadrature import log_expectation, normal_nodes


class Autoencoder(nn.Module):
    """z ~ N(0, I), v | z ~ Bernoulli(decoder(z)); the guide's encoder returns loc, log scale."""

    def __init__(self, encoder, decoder, latent_dim):
        super().__init__()
        self.encoder, self.decoder, self.latent_dim = encoder, decoder, latent_dim

    def likelihood(self, z, event_dim):
        return dist.Bernoulli(logits=self.decoder(z)).to_event(event_dim)

    def model(self, v):
        pyro.module("decoder", self.decoder)
        with pyro.plate("units", len(v)):
            z = pyro.sample("z", dist.Normal(v.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("v", self.likelihood(z, v.dim() - 1), obs=v)

    def guide(self, v):
        pyro.module("encoder", self.encoder)
        loc, log_scale = self.encoder(v).chunk(2, -1)
        with pyro.plate("units", len(v)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class Reshape(nn.Module):
    """Gives every tensor the same trailing shape and rank: no plate of particles passes."""

    def __init__(self, *shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return x.reshape(-1, *self.shape)


def randomize(layer, scale=0.9):
    """Gives a layer random weights, by default so large that the latent matters."""
    nn.init.normal_(layer.weight, std=scale)
    nn.init.normal_(layer.bias, std=scale / 3)
    return layer


def encoder(num_pixels, latent_dim):
    """Posteriors near the prior: a small slope, and a log scale about zero."""
    last = randomize(nn.Linear(5, 2 * latent_dim), 0.1)
    return nn.Sequential(nn.Flatten(), nn.Linear(num_pixels, 5), nn.Tanh(), last)


def autoencoder_case(name, make_decoder, latent_dim, v, seed) -> Case:
    """A case from networks of random weights, which leaves the global generator alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = make_decoder()
        networks = Autoencoder(encoder(v[0].numel(), latent_dim), decoder, latent_dim).eval()
    nodes, log_weights = normal_nodes(latent_dim)
    with torch.no_grad():
        likelihoods = [networks.likelihood(nodes, v.dim() - 1).log_prob(image) for image in v]
        exact = log_expectation(torch.stack(likelihoods, -1), log_weights)
    return Case(name, networks.model, networks.guide, (v,), exact)


def binary(*rows):
    """Rows of 0 and 1 written as strings."""
    return torch.tensor([[float(pixel) for pixel in row] for row in rows])


def multilayer_decoder() -> Case:
    """Two latents, a perceptron, seven pixels."""
    v = binary("1101001", "0010110", "1111000", "0000011")

    def decoder():
        return nn.Sequential(randomize(nn.Linear(2, 6)), nn.Tanh(), randomize(nn.Linear(6, 7)))

    return autoencoder_case("multilayer decoder", decoder, 2, v, seed=9)


def reshaping_decoder() -> Case:
    """As `multilayer_decoder`, but z.reshape(−1, 2) and so always two-dimensional."""
    v = binary("110100", "001010", "111100")

    def decoder():
        first, last = randomize(nn.Linear(2, 6)), randomize(nn.Linear(6, 6))
        return nn.Sequential(Reshape(2), first, nn.Tanh(), last)

    return autoencoder_case("reshaping decoder", decoder, 2, v, seed=5)


def convolutional_decoder() -> Case:
    """One latent, a transposed convolution over (batch, channel, height, width), 4 × 4 pixels."""
    v = binary("1100110000110011", "0000011001101111", "1001000000001001")

    def decoder():
        return nn.Sequential(
            randomize(nn.Linear(1, 2 * 2 * 2)),
            nn.Tanh(),
            Reshape(2, 2, 2),
            randomize(nn.ConvTranspose2d(2, 1, kernel_size=2, stride=2)),
            randomize(nn.Conv2d(1, 1, kernel_size=3, padding=1), 0.5),
        )

    images = v.reshape(-1, 1, 4, 4)
    return autoencoder_case("convolutional decoder", decoder, 1, images, seed=7)


MAKERS = (multilayer_decoder, reshaping_decoder, convolutional_decoder)

ONE_DRAW_AT_A_TIME = (reshaping_decoder, convolutional_decoder)
"""Makers of models that cannot run under a plate of particles."""
