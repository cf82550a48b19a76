"""Every test, also in docstrings, starts with an empty param store."""

import pyro
import pytest


@pytest.fixture(autouse=True)
def empty_param_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()
