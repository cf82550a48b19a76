import warnings

import matplotlib
import pyro
import pytest
import torch

from tests.statistics import SEED

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def clean_state():
    """Double precision, fixed random numbers and validation for each test."""
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(SEED)
    pyro.enable_validation(True)
    yield
    torch.set_default_dtype(torch.float32)  # what a fixture of a module found is no measure


@pytest.fixture(autouse=True)
def no_third_party_deprecations():
    """Warnings of our own are errors; deprecations inside the host libraries are not ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(pyro|torch)\.")
        yield
