"""Mixtures of Gaussians: their algebra, their match to posteriors of several modes, annealing."""

import math
from unittest.mock import patch

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vharm as vh
from pyro_vharm.inference import mixture_matching, refitting
from pyro_vharm.inference.gaussians import UnitGaussian, UnitMixture, match_gaussian
from pyro_vharm.inference.hamiltonian import HamiltonianKernel
from pyro_vharm.inference.mixture_matching import match_mixture
from pyro_vharm.inference.refitting import Effort, match_by_scores, refit_start
from pyro_vharm.inference.start import StartDensity, match_start
from pyro_vharm.model.compilation import eager, traced
from pyro_vharm.model.problem import prepare
from tests.statistics import assert_mean, rejects
from tests.zoo import two_modes
from tests.zoo.hard import eight_schools, far_modes, funnel


def factors(count, dim, generator):
    """Cholesky factors of covariances with correlations and unequal widths."""
    noise = torch.randn(count, dim, dim, generator=generator)
    covariance = noise @ noise.mT / dim + 0.3 * torch.eye(dim)
    return torch.linalg.cholesky(covariance)


def mixture_of(num_components, num_units, dim, apart=3.0):
    generator = torch.Generator().manual_seed(dim)
    count = num_components * num_units
    mean = apart * torch.randn(count, dim, generator=generator)
    shares = torch.rand(num_components, num_units, generator=generator) + 0.2
    gaussians = UnitGaussian(mean, factors(count, dim, generator))
    return UnitMixture((shares / shares.sum(0)).log(), gaussians)


def by_torch(mixture):
    """Torch's own, with units in the batch."""
    mean, scale_tril = (
        field.unflatten(0, mixture.log_shares.shape).movedim(0, 1)
        for field in mixture.gaussians.fields
    )
    parts = dist.MultivariateNormal(mean, scale_tril=scale_tril)
    shares = torch.distributions.Categorical(logits=mixture.log_shares.T)
    return torch.distributions.MixtureSameFamily(shares, parts)


def test_density_and_moments_are_those_of_torch():
    mixture = mixture_of(3, 4, 2)
    own = by_torch(mixture)
    latents = 3 * torch.randn(50, 4, 2)
    assert torch.allclose(mixture.log_prob(latents), own.log_prob(latents))
    assert torch.allclose(mixture.moments.mean, own.mean)
    outer = mixture.moments.scale_tril @ mixture.moments.scale_tril.mT
    assert torch.allclose(outer.diagonal(dim1=1, dim2=2), own.variance)
    inner = mixture.within.scale_tril @ mixture.within.scale_tril.mT
    assert bool((torch.linalg.eigvalsh(outer - inner) > -1e-9).all()), "between means lies more"


def test_draws_have_the_density():
    mixture = mixture_of(2, 3, 2, apart=1.0)
    weights = (by_torch(mixture).log_prob(draws := mixture.sample(20_000))).exp()
    wide = UnitGaussian(mixture.moments.mean, 2 * mixture.moments.scale_tril)
    others = wide.sample(20_000)
    ratio = (by_torch(mixture).log_prob(others) - wide.log_prob(others)).exp()
    for unit in range(3):  # E over the mixture of its density, by two samplers
        expected = (ratio * by_torch(mixture).log_prob(others).exp())[:, unit]
        difference = weights[:, unit] - expected
        assert_mean(difference, 0.0)
    assert_mean(draws.mean(1) - mixture.moments.mean.mean(0), torch.zeros(2))
    assert rejects(draws.mean(1) - mixture.gaussians.mean[:3].mean(0), torch.zeros(2))


def test_units_with_fewer_components_have_the_same_density():
    three, one = mixture_of(3, 2, 4), UnitMixture.single(mixture_of(1, 5, 4).gaussians)
    places = torch.tensor([3, 1])
    joined = one.replaced(places, three)
    latents = 3 * torch.randn(30, 5, 4)
    expected = one.log_prob(latents)
    expected[:, places] = three.log_prob(latents[:, places])
    assert torch.allclose(joined.log_prob(latents), expected)
    again = joined.replaced(places, one.select(places))
    assert torch.allclose(again.log_prob(latents), one.log_prob(latents))
    picked = torch.tensor([4, 3, 0])
    assert torch.allclose(joined.select(picked).log_prob(latents[:, picked]), expected[:, picked])
    assert torch.allclose(joined.moments.mean[[0, 2, 4]], one.gaussians.mean[[0, 2, 4]])
    draws = joined.sample(200)
    assert bool(torch.isfinite(joined.log_prob(draws)).all())
    alone = one.gaussians.whiten(latents).norm(dim=-1)
    assert torch.allclose(joined.distance(latents)[:, [0, 2, 4]], alone[:, [0, 2, 4]])


def planted(num_units, shares, means, scale_trils, prior_scale=4.0):
    """A model whose posteriors are a given mixture: prior times what makes it so."""
    dim = means.shape[-1]

    def model(v):
        with pyro.plate("units", len(v)):
            prior = dist.Normal(v.new_zeros(dim), prior_scale).to_event(1)
            h = pyro.sample("h", prior)
            parts = dist.MultivariateNormal(means, scale_tril=scale_trils)
            found = parts.log_prob(h[..., None, :]) + shares.log()
            pyro.factor("v", torch.logsumexp(found, -1) - prior.log_prob(h) + v)

    return model, torch.linspace(-1, 1, num_units)


@pytest.mark.parametrize(("dim", "num_components"), [(2, 2), (2, 3), (4, 3), (20, 2)])
def test_a_mixture_is_found_with_its_shares(dim, num_components):
    """Of unequal shares, widths and correlations."""
    generator = torch.Generator().manual_seed(3)
    shares = torch.tensor([0.6, 0.3, 0.1][:num_components])
    shares = shares / shares.sum()
    turned = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    means = (
        6
        * turned[:2].repeat(2, 1)[:num_components]
        * torch.tensor([[1.0], [1.0], [-1.0]])[:num_components]
    )
    scale_trils = factors(num_components, dim, generator)
    model, v = planted(8, shares, means, scale_trils)
    densities = prepare(model, None, (v,)).densities[0]
    gaussian, alone = match_by_scores(
        densities, match_start(densities, 0.0).gaussian, Effort(5, 12)
    )
    mixture, good = match_mixture(densities, gaussian)
    assert not bool(alone.any()) and float(good.double().mean()) > 0.7
    draws = mixture.sample(4000)
    log_weights = densities.log_joint(draws) - mixture.log_prob(draws) - v
    assert float(log_weights.logsumexp(0).sub(math.log(4000))[good].abs().max()) < 0.1
    found = mixture.log_shares.exp().sort(0, descending=True).values[:num_components, good]
    assert float((found - shares[:, None]).abs().max()) < 0.05
    assert float(mixture.log_shares.exp()[:, good].sum(0).sub(1).abs().max()) < 1e-5


@pytest.mark.filterwarnings("ignore::pyro_vharm.JointUnitWarning")
@pytest.mark.parametrize(
    "case", [funnel(), eight_schools(True)], ids=["funnel", "centred eight schools"]
)
def test_what_is_no_mixture_of_gaussians_is_refused(case):
    densities = prepare(case.model, case.guide, case.data).densities[0]
    _, good = match_mixture(densities, match_start(densities, 0.0).gaussian)
    assert not bool(good.any())


def test_mass_without_a_peak_is_refused():
    """Two spikes, and a slab that holds half of the mass, its peak hidden by one of them."""

    def model(v):
        with pyro.plate("units", len(v)):
            prior = dist.Normal(v.new_zeros(2), 1.0).to_event(1)
            h = pyro.sample("h", prior)
            spikes = [
                dist.Normal(at, 0.02).to_event(1).log_prob(h)
                for at in (v.new_zeros(2), v.new_ones(2))
            ]
            found = torch.logaddexp(*spikes) - math.log(2) - prior.log_prob(h)
            pyro.factor("v", torch.logaddexp(found, torch.zeros_like(found)))

    densities = prepare(model, None, (torch.zeros(20),)).densities[0]
    _, good = match_mixture(densities, match_start(densities, 0.0).gaussian)
    assert float(good.double().mean()) < 0.2


def square_and_funnel(v):
    """By the sign of the last of `v`: one mode, two modes, or a funnel, unit by unit."""
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(5), 1.0).to_event(1))
        square = dist.Normal(h[..., 0].square(), 0.3).log_prob(v[:, 0])
        scale = (2.0 * h[..., 0]).exp()[..., None]
        neck = dist.Normal(0.0, scale).log_prob(h[..., 1:]).sum(-1)
        pyro.factor("v", torch.where(v[:, 1] > 0, 3 * neck, square))


def test_each_unit_takes_what_it_needs(monkeypatch):
    """One Gaussian, several, or a tempered population, whether units are many at a time or few."""
    one, two, neck = [-1.0, -1.0], [1.5, -1.0], [0.0, 1.0]
    v = torch.tensor([one, two, neck]).repeat(6, 1)
    densities = prepare(square_and_funnel, None, (v,)).densities[0]
    monkeypatch.setattr(refitting, "affordable_units", lambda dim: 5)
    tempered, original = [], refitting._match_by_tempering

    def spy(densities, *rest):
        tempered.append(densities.num_units)
        return original(densities, *rest)

    monkeypatch.setattr(refitting, "_match_by_tempering", spy)
    found = refit_start(densities, match_start(densities, 0.05), HamiltonianKernel(), 16)
    assert found.prior_share == 0.05 and found.mixture is not None
    several = torch.isfinite(found.mixture.log_shares[1:]).any(0)
    assert float(several[1::3].double().mean()) > 0.7
    assert not bool(several[0::3].any()) and not bool(several[2::3].any())
    assert len(tempered) == 1 and tempered[0] >= 6
    draws = found.mixture.sample(2000)
    share = (draws[:, several, 0] > 0).double().mean(0)
    assert float((share - 0.5).abs().max()) < 0.1
    alone = ~several
    single = found.gaussian.select(alone.nonzero().flatten())
    assert torch.allclose(found.mixture.log_prob(draws)[:, alone], single.log_prob(draws[:, alone]))


def exact_start(case, dim, num_units=4):
    """The posterior of `far_modes`: likelihood modes of variance 1 times a prior of variance 25."""
    variance = 25 / 26
    mode = torch.zeros(num_units, dim)
    mode[:, 0] = 4.0 * variance
    scale_tril = variance**0.5 * torch.eye(dim).expand(2 * num_units, dim, dim)
    shares = torch.tensor([[0.3], [0.7]]).expand(2, num_units)
    mixture = UnitMixture(shares.log(), UnitGaussian(torch.cat([mode, -mode]), scale_tril))
    return StartDensity(mixture.within, 0.0, mixture)


@pytest.mark.parametrize("dim", [2, 6])
@pytest.mark.parametrize(
    "method",
    [
        vh.AnnealedImportanceSampling(8, num_steps=3, start=vh.MatchedStart(refit=False)),
        vh.AnnealedImportanceSampling(
            8,
            num_steps=3,
            start=vh.MatchedStart(refit=False),
            kernel=vh.HamiltonianKernel(whitened=False),
        ),
        vh.SequentialMonteCarlo(64, start=vh.MatchedStart(refit=False)),
        vh.ImportanceSampling(100),
    ],
    ids=["annealing", "annealing, not whitened", "sequential", "importance"],
)
def test_law_1_from_a_posterior_of_two_modes(method, dim):
    case = far_modes(dim)
    densities = prepare(case.model, case.guide, case.data).densities[0]
    start = exact_start(case, dim)
    run = method.run(densities, start=start)
    assert float((run.log_weights - case.exact).abs().max()) < 1e-9
    if run.reverse_log_weights is not None:
        assert float((run.reverse_log_weights - case.exact).abs().max()) < 1e-9
    wrong = UnitMixture(start.mixture.log_shares.flip(0), start.mixture.gaussians)
    run = method.run(densities, start=StartDensity(start.gaussian, 0.0, wrong))
    assert float((run.log_weights - case.exact).abs().max()) > 0.1, "a wrong twin"


@pytest.mark.parametrize("dim", [2, 6])
@pytest.mark.parametrize("own_metric", [True, False])
def test_transitions_are_the_same_as_a_graph(dim, own_metric):
    case = far_modes(dim)
    densities = prepare(case.model, case.guide, case.data).densities[0]
    start = exact_start(case, dim)
    start = StartDensity(start.gaussian, 0.05, start.mixture)

    def ended(form):
        with patch("pyro_vharm.inference.hamiltonian.accelerate", form):
            moves = HamiltonianKernel().moves(densities, start, 8, 0, own_metric=own_metric)
        torch.manual_seed(0)
        state = moves.draw_start(8)
        metric = torch.eye(dim).expand(4, dim, dim) if own_metric else None
        for _ in range(3):
            state, _ = moves(state, torch.full((4,), 0.5), torch.full((4,), 0.4), metric)
        return state

    plain = ended(lambda function, densities, inputs, calls: eager(function, densities))
    graph = ended(lambda function, densities, inputs, calls: traced(function, densities, inputs))
    for a, b in zip(plain, graph, strict=True):
        assert torch.allclose(a, b)


def annealed(case, seed):
    method = vh.AnnealedImportanceSampling(num_steps=5)
    return vh.log_evidence(
        case.model,
        case.data,
        guide=case.guide,
        method=method,
        confirmation=None,
        progress=False,
        seed=seed,
    )


def test_far_modes_in_many_dims_keep_their_shares(monkeypatch):
    """From one wide Gaussian, the larger mode is lost: log(1/0.3) nats of each unit."""
    case = far_modes(20)
    for seed in range(3):
        evidence = annealed(case, seed)
        assert float((evidence.per_unit.values - case.exact).abs().max()) < 0.3
        assert float(evidence.widths.mean()) < 0.2

    def refuse(densities, gaussian):
        mixture = UnitMixture.single(gaussian)
        return mixture, torch.zeros_like(gaussian.mean[:, 0], dtype=torch.bool)

    monkeypatch.setattr(refitting, "match_mixture", refuse)
    lost = annealed(case, 0)
    assert float((lost.per_unit.values - case.exact).mean()) < -0.6, "a wrong twin"


def test_climbs_end_where_they_have_come_to_rest(monkeypatch):
    """Two modes of each unit take few steps."""
    case = two_modes()
    densities = prepare(case.model, case.guide, (torch.full((20,), 2.0),)).densities[0]
    ascents, original = [], mixture_matching.ascend

    def spy(*args, **options):
        ascents.append(original(*args, **options))
        return ascents[-1]

    monkeypatch.setattr(mixture_matching, "ascend", spy)
    _, good = match_mixture(densities, match_gaussian(densities.draw_prior(64)))
    assert float(good.double().mean()) > 0.7
    assert bool(ascents[0].settled.all())
