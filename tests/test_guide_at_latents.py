"""The guide's density at latents it did not draw."""

import pyro
import pytest
import torch
from pyro.infer.autoguide import (
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)

from pyro_vharm.model.guide_at_latents import read_guide
from pyro_vharm.model.problem import prepare
from tests.zoo import ZOO, linear_gaussian

pytestmark = pytest.mark.filterwarnings("ignore::pyro_vharm.JointUnitWarning")

AUTO = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": AutoLowRankMultivariateNormal,
    "AutoIAFNormal": AutoIAFNormal,
}
MODELS = ("linear_gaussian", "normal_gamma", "dirichlet_multinomial", "matrix_latent")


def cases():
    makers = {make.__name__: make for make in ZOO}
    for name in MODELS:
        yield pytest.param(makers[name], None, id=name)
        for guide, kind in AUTO.items():
            yield pytest.param(makers[name], kind, id=f"{name}, {guide}")


@pytest.mark.parametrize(("make", "kind"), list(cases()))
def test_the_density_at_its_own_draws_is_the_one_they_were_drawn_with(make, kind):
    case = make()
    guide = case.guide
    if kind is not None:
        guide = kind(case.model)
        guide(*case.data)
    densities = prepare(case.model, guide, case.data).densities[0]
    drawn = densities.draw_guide(5)
    reading = read_guide(densities)
    at = reading(densities, drawn.latents)
    torch.testing.assert_close(at.log_guide, drawn.log_proposal)
    torch.testing.assert_close(at.log_joint, drawn.log_joint)
    moved = reading(densities, drawn.latents + 0.1)
    assert not torch.allclose(moved.log_guide, at.log_guide), "the test has no power"


def test_where_draws_cannot_be_read_off_it_says_so():
    makers = {make.__name__: make for make in ZOO}
    case = linear_gaussian()
    guide = AutoStructured(case.model)
    guide(*case.data)
    assert read_guide(prepare(case.model, guide, case.data).densities[0]) is None
    for name in ("class_in_guide", "loop_over_time", "class_above_latent"):
        pyro.clear_param_store()
        case = makers[name]()
        assert read_guide(prepare(case.model, case.guide, case.data).densities[0]) is None, name
    case = linear_gaussian()
    assert read_guide(prepare(case.model, None, case.data).densities[0]) is None
