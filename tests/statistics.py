"""Tolerances from one suite-wide failure rate: a true statement fails once in a thousand runs."""

import os

import torch
from scipy.stats import norm

SUITE_FAILURE_RATE, NUM_COMPARISONS = 1e-3, 200
Z = float(norm.isf(SUITE_FAILURE_RATE / NUM_COMPARISONS / 2))
SEED = int(os.environ.get("VHARM_TEST_SEED", "0"))


def z_score(samples, expected):
    """How many of its own standard errors the mean of independent samples is off."""
    samples = samples.double()
    error = samples.std(0) / len(samples) ** 0.5
    return (samples.mean(0) - torch.as_tensor(expected)) / error


def assert_mean(samples, expected):
    """The mean of independent samples is what it should be, within Z standard errors."""
    z = z_score(samples, expected).abs().max()
    assert z < Z, f"{float(z):.1f} standard errors off"


def rejects(samples, expected):
    """Whether `assert_mean` would fail."""
    return bool(z_score(samples, expected).abs().max() > Z)
