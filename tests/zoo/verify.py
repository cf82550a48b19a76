"""Check every case of the zoo by plain Pyro: python -m tests.zoo.verify [MAKER ...]."""

import math
import sys
import traceback
import warnings
from contextlib import nullcontext
from dataclasses import dataclass

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO, TraceEnum_ELBO

from . import ONE_DRAW_AT_A_TIME, ZOO

NUM_PARTICLES = 200_000
NUM_DRAWS = 4_000
NUM_ELBO_DRAWS = 30
LARGEST_ERROR = 0.02
NUM_ERRORS = 5


def sites(trace):
    """The sample sites of a trace that have a density."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample"
    }


def plates(trace):
    """The vectorised plates of a trace, by name."""
    frames = [frame for site in sites(trace).values() for frame in site["cond_indep_stack"]]
    return {frame.name: frame for frame in frames}


def plate_nesting(trace):
    """How many dimensions the plates of a trace take."""
    return max((-plate.dim for plate in plates(trace).values()), default=0)


@dataclass(frozen=True)
class Layout:
    """Which dimensions hold the units and the particles (None: one unit, one particle)."""

    unit_dim: int | None
    particle_dim: int | None

    def log_density(self, site):
        """log p of a site without its scale, of shape (particle, unit)."""
        log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
        if self.particle_dim is None:
            log_prob = log_prob.unsqueeze(0)
        joint = self.unit_dim is None
        log_prob = log_prob.unsqueeze(-1) if joint else log_prob.movedim(self.unit_dim, -1)
        return log_prob.reshape(len(log_prob), -1, log_prob.shape[-1]).sum(1)


def log_weights(case, layout, given):
    """log p(v, h) − log q(h), shape (particle, unit); sites without a guide come from the prior."""
    particles = nullcontext()
    if layout.particle_dim is not None:
        particles = pyro.plate("particles", NUM_PARTICLES, dim=layout.particle_dim)
    with torch.no_grad(), particles, poutine.condition(data=given):
        guide = poutine.trace(case.guide).get_trace(*case.data)
        for name in given:
            guide.remove_node(name)
        model = poutine.trace(poutine.replay(case.model, trace=guide)).get_trace(*case.data)
    proposed = sites(guide)
    scored = [s for name, s in sites(model).items() if s["is_observed"] or name in proposed]
    log_p = sum(layout.log_density(site) for site in scored)
    return log_p - sum(layout.log_density(site) for site in proposed.values())


def subsamples(case, unit):
    """Indices that together cover the units, where the model subsamples its data itself."""
    if unit is None or unit.size == len(case.exact):
        return [slice(None)]
    return [torch.arange(i, i + unit.size) for i in (0, 3, 4)]


def estimate(case, trace, one_at_a_time):
    """log Ẑ and its standard error for every unit."""
    unit = plates(trace).get(case.unit_plate)
    particle_dim = None if one_at_a_time else -plate_nesting(trace) - 1
    layout = Layout(None if unit is None else unit.dim, particle_dim)
    value, error = torch.full((2, len(case.exact)), math.nan)
    for index in subsamples(case, unit):
        given = {} if isinstance(index, slice) else {case.unit_plate: index}
        repeats = NUM_DRAWS if one_at_a_time else 1
        log_w = torch.cat([log_weights(case, layout, given) for _ in range(repeats)]).double()
        largest = log_w.max(0).values
        w = (log_w - largest).exp()
        value[index] = w.mean(0).log() + largest
        error[index] = w.std(0) / w.mean(0) / math.sqrt(len(w))
    return value, error


def pyro_bound(case, trace):
    """What Pyro's own ELBO returns, and whether enumeration alone makes it exact."""
    latent = [site for site in sites(trace).values() if not site["is_observed"]]
    enumerated = [site for site in latent if site["infer"].get("enumerate")]
    elbo = TraceEnum_ELBO if enumerated else Trace_ELBO
    objective = elbo(num_particles=NUM_ELBO_DRAWS, max_plate_nesting=plate_nesting(trace))
    return -objective.loss(case.model, case.guide, *case.data), len(enumerated) == len(latent)


def check(maker):
    """A line for the table, and whether the case holds."""
    pyro.clear_param_store()
    pyro.set_rng_seed(11)
    state = torch.get_rng_state()
    case = maker()
    tests = {"the maker draws random numbers": torch.equal(state, torch.get_rng_state())}
    trace = poutine.trace(case.model).get_trace(*case.data)
    value, error = estimate(case, trace, maker in ONE_DRAW_AT_A_TIME)
    difference = (value - case.exact).abs()
    bound, all_enumerated = pyro_bound(case, trace)
    total = float(case.exact.sum())
    tests |= {
        "the exact value is not double": case.exact.dtype == torch.float64,
        "the exact value is off": bool((difference <= NUM_ERRORS * error + 1e-6).all()),
        "the check is too coarse": bool((error < LARGEST_ERROR).all()),
        "the ELBO is not finite": math.isfinite(bound),
        "enumeration disagrees": not all_enumerated or math.isclose(total, bound),
    }
    failures = [failure for failure, passed in tests.items() if not passed]
    line = (
        f"{case.name:26s} exact {total:8.3f}  |diff|/error"
        f" {float((difference / error.clamp(min=1e-7)).max()):5.2f}"
        f"  error {float(error.max()):.4f}  ELBO {bound:8.3f}  {'; '.join(failures) or 'ok'}"
    )
    return line, not failures


def main():
    """Check all, or those whose names are given."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.enable_validation(True)
    warnings.simplefilter("error")
    names = sys.argv[1:]
    chosen = [maker for maker in ZOO if not names or maker.__name__ in names]
    failed = 0
    for maker in chosen:
        try:
            line, holds = check(maker)
        except Exception:
            line, holds = f"{maker.__name__}\n{traceback.format_exc()}", False
        failed += not holds
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    sys.stdout.write(f"{len(chosen)} cases, {failed} bad\n")
    return failed


if __name__ == "__main__":
    sys.exit(bool(main()))
