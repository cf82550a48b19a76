"""The log evidence itself as an objective, for models small enough to sum or to integrate."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyro_vharm.errors import InputError, UnresolvedIntegralError
from pyro_vharm.estimates import Kind, UnitEstimates
from pyro_vharm.inference.estimation import estimate_units
from pyro_vharm.inference.quadrature import MOST_DIMENSIONS, Quadrature
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.objectives.objective import UnitObjective, UnitTerms
from pyro_vharm.particles import heaviest

__all__ = ["ExactEvidence"]

_DEFAULT_QUADRATURE = Quadrature()
_ELEMENTS_PER_PASS = 2**22


class ExactEvidence(UnitObjective):
    """The loss −Σ_u log p(v_u; θ) itself, in nats, for `SVI` or as a loss module.

    Discrete latents are summed out, whether or not the guide has their sites. Where no other
    latents are left the value is exact. Up to three continuous dimensions of a unit are
    integrated by quadrature, with the error of each unit in `latest`, and the gradient is Fisher's
    identity on the nodes,

        ∇ log p(v; θ) = E_{p(h|v;θ)}[∇ log p(v, h; θ)] ≈ Σ_i w̃_i ∇ log p(v, h_i; θ),

    without those whose share w̃_i of the posterior is below 1e-12. It is the gold standard for
    other objectives. Under subsampling each unit's term is multiplied by the plate's scale.

    The guide says where quadrature looks first and may hold latents as point masses (Delta); they
    are integrated over all the same. It gets no gradient: its parameters stay as they are.

    Args:
        quadrature: its tolerance and largest grid.
        unit_plate: name of the plate of independent units. Left out, it is the outermost plate
            that holds every site; without one, all data are one unit.

    Raises:
        InputError: on the first call, if a unit has more than three continuous dimensions.
        UnresolvedIntegralError: if quadrature can say nothing of a unit.

    Source: "Finding the Observed Information Matrix when Using the EM Algorithm", Louis (1982).

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer import SVI
    >>> def model(x):
    ...     weights = pyro.param("weights", torch.ones(2) / 2, constraint=dist.constraints.simplex)
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
    ...         pyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)
    >>> objective = ExactEvidence()
    >>> svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.1}), objective)
    >>> x = torch.tensor([0.0, 2.0, 1.0])
    >>> density = dist.Normal(torch.tensor([0.0, 2.0]), 1.0).log_prob(x[:, None]).exp()
    >>> abs(svi.step(x) + float(density.mean(1).log().sum())) < 1e-5
    True
    >>> print(objective.latest.per_unit.kind, objective.latest.side)
    exact exact
    """

    side = "exact"
    needs_guide_density = False

    def __init__(
        self, *, quadrature: Quadrature = _DEFAULT_QUADRATURE, unit_plate: str | None = None
    ) -> None:
        super().__init__(unit_plate=unit_plate)
        self.quadrature = quadrature

    def check(self, densities: UnitDensities) -> None:
        """Refuse units with too many continuous dimensions to integrate over."""
        super().check(densities)
        if densities.dim > MOST_DIMENSIONS:
            raise InputError(
                f"ExactEvidence takes units of at most {MOST_DIMENSIONS} continuous latent "
                f"dimensions, not {densities.dim}; train on a bound, such as "
                "ImportanceWeightedELBO or AnnealedELBO, or give the latents a plate that splits "
                "them into smaller units"
            )

    def evaluate(self, densities: UnitDensities) -> UnitTerms:
        """Log p(v_u; θ) of each unit, by enumeration or quadrature."""
        if densities.dim == 0:
            return _enumerated(densities)
        run = self.quadrature.run(densities)
        per_unit = estimate_units(run)
        _check_resolved(per_unit)
        expected, scale = _expected_log_joint(densities, *heaviest(run))
        return UnitTerms(per_unit, expected.detach() - expected - per_unit.values.sum(), scale)


def _enumerated(densities: UnitDensities) -> UnitTerms:
    shape = (1, densities.num_units, 0)
    at = densities.run_at(torch.empty(shape, dtype=densities.dtype, device=densities.device))
    log_evidence = densities.counted(at.log_joint)[0]
    values = log_evidence.detach()
    per_unit = UnitEstimates(values, torch.zeros_like(values), Kind.EXACT)
    return UnitTerms(per_unit, -log_evidence.sum(), at.scale)


def _check_resolved(per_unit: UnitEstimates) -> None:
    failed = (~torch.isfinite(per_unit.errors)).nonzero().flatten()
    if len(failed):
        raise UnresolvedIntegralError(
            f"quadrature did not resolve the integral over the latents of {len(failed)} of "
            f"{len(per_unit.values)} units (the first is unit {int(failed[0])} of the batch), so "
            "their log evidence is not known; pass quadrature=Quadrature(max_nodes=...) with more "
            "nodes, check that the posteriors are proper and no narrower than rounding resolves, "
            "or train on a bound, such as ImportanceWeightedELBO"
        )


def _expected_log_joint(
    densities: UnitDensities, nodes: Tensor, shares: Tensor
) -> tuple[Tensor, float]:
    """Σ_u Σ_i w̃_ui log p(v_u, h_ui; θ), differentiable in θ, and the factor from subsampling.

    More nodes than fit one pass are run again in the backward pass, so that memory is that of one.
    """

    def expect(nodes: Tensor, shares: Tensor) -> tuple[Tensor, float]:
        at = densities.run_at(nodes)
        return (shares * densities.counted(at.log_joint)).sum(), at.scale

    per_pass = densities.affordable(1, len(nodes), _ELEMENTS_PER_PASS)
    if per_pass == len(nodes):
        return expect(nodes, shares)
    parts = zip(nodes.split(per_pass), shares.split(per_pass), strict=True)
    found = [checkpoint(expect, *part, use_reentrant=False) for part in parts]
    return torch.stack([expected for expected, _ in found]).sum(), found[0][1]
