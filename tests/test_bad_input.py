"""Every refusal: raised before any long work, naming the argument, what was received, the mend."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoNormal,
)
from torch import nn

import pyro_vharm as vh
from pyro_vharm import auditing
from tests.zoo import normal_guide, normal_model

V = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


model, guide = normal_model, normal_guide(0.5, 0.7)


def learned_model(v):
    weight = pyro.param("weight", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
        pyro.sample("v", dist.Normal(weight * h, 1.0), obs=v)


def network_model(network):
    def with_network(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(1), 1.0).to_event(1))
            loc = network(h.reshape(-1, 1)).reshape(h.shape)
            pyro.sample("v", dist.Normal(loc.squeeze(-1), 1.0), obs=v)

    return with_network


def plates(name, size):
    def in_plate(v):
        with pyro.plate(name, size):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    return in_plate


def no_latent(v):
    with pyro.plate("units", len(v)):
        pyro.sample("v", dist.Normal(v.new_zeros(()), 1.0), obs=v)


def count(v):
    with pyro.plate("units", len(v)):
        k = pyro.sample("k", dist.Poisson(v.new_tensor(0.5)))
        pyro.sample("v", dist.Normal(k, 1.0), obs=v)


def angle(v):
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.VonMises(v.new_zeros(()), 1.0))
        pyro.sample("v", dist.Normal(h.cos(), 1.0), obs=v)


def improper(v):
    with pyro.plate("units", len(v)):
        flat = dist.ImproperUniform(dist.constraints.real, (), ())
        h = pyro.sample("h", flat, infer={"is_auxiliary": True})
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def point_in_model(v):
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
        twice = pyro.sample("twice", dist.Delta(2 * h))
        pyro.sample("v", dist.Normal(twice, 1.0), obs=v)


def masked_latent(v):
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0).mask(v > 0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def scaled_part(v):
    with pyro.plate("units", len(v)):
        with pyro.poutine.scale(scale=0.1):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def random_subsample(v):
    with pyro.plate("units", 2, dim=-2), pyro.plate("rows", 3, subsample_size=2, dim=-1) as index:
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v.reshape(2, 3)[:, index])


def mixed_dtypes(v):
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
        s = pyro.sample("s", dist.Normal(v.new_zeros((), dtype=torch.float32), 1.0))
        pyro.sample("v", dist.Normal(h + s, 1.0), obs=v)


def functional_dropout(v):
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
        loc = nn.functional.dropout(h, 0.5, training=True)
        pyro.sample("v", dist.Normal(loc, 1.0), obs=v)


def coupled(v):
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
        pyro.sample("v", dist.Normal(h.cumsum(-1), 1.0), obs=v)


def latent_outside(v):
    level = pyro.sample("level", dist.Normal(v.new_zeros(()), 1.0))
    with pyro.plate("units", len(v)):
        pyro.sample("v", dist.Normal(level, 1.0), obs=v)


def nowhere_finite(v):
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
        pyro.factor("wall", h * 0.0 - torch.inf)
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def no_bijection(v):
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.ProjectedNormal(v.new_ones(2)))
        pyro.sample("v", dist.Normal(h[..., 0], 1.0), obs=v)


def centred(v):
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
        pyro.sample("v", dist.Normal(h - h.mean(0), 1.0), obs=v)


DROPOUT, NORM = nn.Dropout(0.5), nn.BatchNorm1d(1).double()
MODELS = [
    (no_latent, "no latent sample site"),
    (count, r"latent 'k' \(Poisson\) is discrete and cannot be enumerated"),
    (angle, r"latent 'h' \(VonMises\) is an angle"),
    (point_in_model, "'twice' is a point mass .* pyro.deterministic"),
    (masked_latent, r"masked-out element of \['h'\] has a say"),
    (scaled_part, "scaled differently"),
    (random_subsample, r"plates \['rows'\] pick elements at random"),
    (mixed_dtypes, "the latents differ in dtype or device.*'s'.*float32"),
    (functional_dropout, "differs between two calls at the same latents"),
    (coupled, "are not independent units"),
    (nowhere_finite, r"not finite .* \['wall'\]"),
    (no_bijection, "torch knows no bijection"),
    (centred, "not independent units"),
    (plates("units", 4), "plate sizes equal the number of units"),
    (network_model(DROPOUT), r"Dropout in train mode.*\.eval\(\)"),
    (network_model(NORM), r"BatchNorm1d in train mode.*\.eval\(\)"),
]


@pytest.mark.filterwarnings("ignore:Encountered")
@pytest.mark.parametrize(("bad", "message"), MODELS, ids=lambda p: getattr(p, "__name__", None))
def test_models_that_are_refused(bad, message):
    running_mean = NORM.running_mean.clone()
    with pytest.raises(vh.InputError, match=f"(?s){message}"):
        vh.log_evidence(bad, (V,), progress=False)
    assert torch.equal(NORM.running_mean, running_mean), "buffers are left alone"


def missing(v):
    pass


def extra(v):
    guide(v)
    pyro.sample("other", dist.Normal(0.0, 1.0))


def masked_guide(v):
    with pyro.plate("units", len(v)), pyro.poutine.mask(mask=v > 0):
        pyro.sample("h", dist.Normal(0.5 * v, 0.7))


def half_a_point(v):
    with pyro.plate("units", len(v)):
        pyro.sample("h", dist.Delta(0.5 * v))


def random_guide(v):
    with pyro.plate("units", len(v)):
        noise = torch.randn_like(v)
        pyro.sample("h", dist.Normal(0.5 * v + noise, 0.7))


def auxiliary(v):
    noise = pyro.sample("noise", dist.Normal(0.0, 10.0), infer={"is_auxiliary": True})
    with pyro.plate("units", len(v)):
        pyro.sample("h", dist.Normal(0.5 * v + 0.0 * noise, 0.7))


def auxiliary_in_plate(v):
    with pyro.plate("units", len(v)):
        pyro.sample("noise", dist.Normal(0.0 * v, 10.0), infer={"is_auxiliary": True})
        pyro.sample("h", dist.Normal(0.5 * v, 0.7))


def factor_in_guide(v):
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(0.5 * v, 0.7))
        pyro.factor("bonus", h * 0.0 + 1.0, has_rsample=True)


GUIDES = [
    (auxiliary, "draws 7 numbers for 6 latent dimensions"),
    (auxiliary_in_plate, "draws 12 numbers for 6 latent dimensions"),
    (factor_in_guide, r"observed sites or factors \['bonus'\]"),
    (missing, r"misses \['h'\]"),
    (extra, r"has \['other'\] too many.*is_auxiliary"),
    (masked_guide, "masks out elements of 'h' that the model does not"),
    (half_a_point, "point masses"),
    (random_guide, "guide's density differs between two calls"),
]


@pytest.mark.parametrize(("bad", "message"), GUIDES, ids=lambda p: getattr(p, "__name__", None))
def test_guides_that_are_refused(bad, message):
    with pytest.raises(vh.InputError, match=f"(?s){message}"):
        vh.inference_gap(model, bad, (V,), progress=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [(AutoDelta, "point masses"), (AutoLaplaceApproximation, "point masses")],
)
def test_autoguides_that_are_refused(make, message):
    auto = make(model)
    auto(V)
    with pytest.raises(vh.InputError, match=message):
        vh.inference_gap(model, auto, (V,), progress=False)


def test_a_point_mass_beside_a_density_is_refused():
    def two_latents(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            s = pyro.sample("s", dist.LogNormal(v.new_zeros(()), 1.0))
            pyro.sample("v", dist.Normal(h, s), obs=v)

    guides = AutoGuideList(two_latents)
    guides.append(AutoNormal(pyro.poutine.block(two_latents, expose=["h"])))
    guides.append(AutoDelta(pyro.poutine.block(two_latents, expose=["s"])))
    guides(V)
    with pytest.raises(vh.InputError, match="point masses"):
        vh.inference_gap(two_latents, guides, (V,), progress=False)


def two_classes(v):
    with pyro.plate("units", len(v)):
        first = pyro.sample("first", dist.Categorical(v.new_tensor([0.7, 0.3])))
        second = pyro.sample("second", dist.Categorical(v.new_tensor([0.4, 0.6])))
        pyro.sample("v", dist.Normal(2.0 * first - second, 1.0), obs=v)


def assigning(*names, drawn=()):
    def guide(v):
        with pyro.plate("units", len(v)):
            for name in names:
                pyro.sample(name, dist.Delta((v > 0).long()))
            for name in drawn:
                pyro.sample(name, dist.Categorical(v.new_tensor([0.6, 0.4])))

    return guide


def test_weights_of_a_guide_that_draws_nothing_are_refused():
    """K of them are one. One is a bound, and so are many where something is drawn or summed out."""
    loss = vh.ImportanceWeightedELBO(2).loss
    before = torch.get_rng_state()
    for hard in (assigning("first", "second"), assigning("first")):
        with pytest.raises(vh.InputError, match=r"(?s)point masses .*use ExactEvidence"):
            loss(two_classes, hard, V)
    assert torch.equal(torch.get_rng_state(), before)
    vh.ImportanceWeightedELBO(1).loss(two_classes, assigning("first", "second"), V)
    for guide in (
        assigning("first", drawn=["second"]),
        assigning(drawn=["first", "second"]),
        assigning(drawn=["first"]),
        assigning(),
    ):
        loss(two_classes, guide, V)
    learner = vh.GradientLearner(vh.ImportanceWeightedELBO(50))
    options = {"guide": assigning("first", "second"), "progress": False}
    with pytest.raises(vh.InputError, match="are all the same"):
        vh.learn_reference(learned_classes, (V,), learner=learner, **options)


def learned_classes(v):
    pyro.param("nothing", v.new_tensor(1.0))
    two_classes(v)


def sharing_guide(v):
    weight = pyro.param("weight", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("units", len(v)):
        pyro.sample("h", dist.Normal(weight * v, 0.7))


DATA = [
    (V, r"bare Tensor.*write \(data,\)"),
    ([], "no batches"),
    (iter(()), "no batches"),
    (3, "must be a tuple"),
    ([(V,), 3], r"data\[1\] must be"),
    ((V[:0],), "empty tensor"),
    ((V.float().to(torch.int64), V), "the guide raised|the model raised"),
    ((V * torch.nan,), r"not finite .*'v'|raised when first run"),
]


@pytest.mark.filterwarnings("ignore:Encountered")
@pytest.mark.parametrize(("data", "message"), DATA)
def test_data_that_are_refused(data, message):
    with pytest.raises(vh.InputError, match=f"(?s){message}"):
        vh.log_evidence(model, data, progress=False)


def test_a_unit_plate_that_does_not_hold_a_latent():
    with pytest.raises(vh.InputError, match=r"unit_plate='units' does not hold .*'level'"):
        vh.log_evidence(latent_outside, (V,), unit_plate="units", progress=False)


@pytest.mark.filterwarnings("ignore::pyro_vharm.JointUnitWarning")
def test_one_joint_unit_refuses_batches_and_subsamples():
    with pytest.raises(vh.InputError, match="2 batches, but the data are one joint unit"):
        vh.log_evidence(latent_outside, [(V,), (V,)], progress=False)

    def subsampled(v):
        level = pyro.sample("level", dist.Normal(v.new_zeros(()), 1.0))
        with pyro.plate("units", 60, subsample_size=6):
            pyro.sample("v", dist.Normal(level, 1.0), obs=v)

    with pytest.raises(vh.InputError, match="scaled"):
        vh.log_evidence(subsampled, (V,), progress=False)


def test_audits_that_are_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(auditing, "measure_gap", None)

    def call(**options):
        return vh.audit(learned_model, guide, (V,), progress=False, **options)

    with pytest.raises(vh.InputError, match="material must not be negative"):
        call(material=-1.0)
    with pytest.raises(vh.InputError, match=r"missing \['weight'\], unknown \['w'\]"):
        call(reference={"w": 1.0})
    with pytest.raises(vh.InputError, match="breaks the constraint"):
        call(reference={"weight": -1.0})
    with pytest.raises(vh.InputError, match="unconstrained shape"):
        call(reference={"weight": [1.0, 2.0]})
    with pytest.raises(vh.InputError, match="reference must be a Reference or a mapping"):
        call(reference=3)
    for method in ("annealed", vh.Quadrature):
        with pytest.raises(vh.InputError, match="method must be 'auto' or an inference method"):
            call(method=method)
    with pytest.raises(vh.InputError, match="heldout is a bare Tensor"):
        call(heldout=V)
    with pytest.raises(vh.InputError, match="audit needs the guide"):
        vh.audit(learned_model, None, (V,))
    with pytest.raises(vh.InputError, match=r"shares the parameters \['weight'\]"):
        vh.audit(learned_model, sharing_guide, (V,), progress=False)


def test_settings_that_are_refused():
    for make, message in [
        (lambda: vh.ImportanceSampling(num_particles=1), "num_particles"),
        (lambda: vh.DefensiveMixture(prior_share=1.1), "prior_share"),
        (lambda: vh.AnnealedImportanceSampling(num_steps=0), "num_steps"),
        (lambda: vh.AnnealedImportanceSampling(num_particles=1), "num_particles"),
        (lambda: vh.MatchedStart(prior_share=-0.1), "prior_share"),
        (lambda: vh.AnnealedImportanceSampling(target_width=0.0), "target_width"),
        (lambda: vh.AnnealedImportanceSampling(max_steps=0), "max_steps"),
        (lambda: vh.AnnealedImportanceSampling(num_settling=-1), "num_settling"),
        (lambda: vh.HamiltonianKernel(num_leapfrog=0), "num_leapfrog"),
        (lambda: vh.HamiltonianKernel(target_acceptance=1.0), "target_acceptance"),
        (lambda: vh.HamiltonianKernel(jitter=1.0), "jitter"),
        (lambda: vh.SigmoidSchedule(steepness=0.0), "steepness"),
        (lambda: vh.AdaptiveSchedule(even_share=0.0), "even_share"),
        (lambda: vh.SequentialMonteCarlo(num_groups=1), "num_groups"),
        (lambda: vh.SequentialMonteCarlo(100, num_groups=8), "multiple of num_groups"),
        (lambda: vh.SequentialMonteCarlo(num_sweeps=0), "num_sweeps"),
        (lambda: vh.SequentialMonteCarlo(least_share=1.5), "least_share"),
        (lambda: vh.Confirmation(num_units=0), "num_units"),
        (lambda: vh.Confirmation(tolerance=0.0), "tolerance"),
        (lambda: vh.Quadrature(tolerance=0.0), "tolerance"),
        (lambda: vh.Quadrature(max_nodes=2), "max_nodes"),
        (lambda: vh.GradientLearner(objective="ELBO"), "objective must be one of this package's"),
        (lambda: vh.GradientLearner(num_steps=0), "num_steps"),
        (lambda: vh.GradientLearner(learning_rate=0.0), "learning_rate"),
        (lambda: vh.GradientLearner(batch_size=0), "batch_size"),
        (lambda: vh.GradientLearner(max_rounds=0), "max_rounds"),
        (lambda: vh.GuideTraining(num_steps=-1), "num_steps must not be negative"),
        (lambda: vh.GuideTraining(num_replicates=0), "num_replicates"),
        (lambda: vh.ExactLearner(max_iterations=0), "max_iterations"),
        (lambda: vh.ExactLearner(tolerance=0.0), "tolerance"),
        (lambda: vh.ExactLearner(objective=vh.MarkovChainEM()), "objective must be ExactEvidence"),
        (lambda: vh.ExpectationMaximization(num_steps=0), "num_steps"),
        (lambda: vh.ClimbingLearner(stages=()), "stages must hold at least one"),
        (lambda: vh.Refit(num_steps=0), "num_steps"),
        (lambda: vh.Refit(num_particles=1), "num_particles"),
    ]:
        with pytest.raises(vh.InputError, match=message):
            make()


def test_a_density_that_is_finite_at_some_draws_only():
    """A few draws leave some units without; more do not. Where none could, it is refused."""

    def model(v, highest):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            inside = torch.where(h < highest, 0.0, -torch.inf)
            pyro.factor("cut", inside)
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    v = torch.zeros(60)
    grid = vh.Quadrature(max_nodes=1000)
    evidence = vh.log_evidence(model, (v, 0.0), method=grid, progress=False)
    below = dist.Normal(0.0, 2**0.5).log_prob(v) + torch.tensor(0.5).log()
    assert float((evidence.per_unit.values - below).abs().max()) < 0.2
    with pytest.raises(vh.InputError, match="not finite at any of 17 draws"):
        vh.log_evidence(model, (v, -9.0), progress=False)
