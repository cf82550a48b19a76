"""What each number of a report means, in a sentence."""

from __future__ import annotations

__all__ = ["KINDS", "MEANINGS"]

MEANINGS = {
    "log evidence at reference": "ℓ(θ_ref) = log p(v; θ_ref), at the better parameters that were "
    "found or handed in.",
    "− learning harm": "ℓ(θ_ref) − ℓ(θ̂): what learning lost. The true optimum may be better still, "
    "so it is a lower bound on the harm, up to the estimators' error.",
    "log evidence as learned": "ℓ(θ̂) = log p(v; θ̂), at the parameters that training ended at.",
    "= log evidence as learned": "ℓ(θ̂) = log p(v; θ̂), at the parameters that training ended at.",
    "− approximation gap": "What even the best guide of the family, refitted to each unit, lacks "
    "to ℓ(θ̂); an upper bound.",
    "− amortization gap": "What one guide per unit would gain over the guide as trained; a lower "
    "bound.",
    "= ELBO as learned": "L(θ̂, q̂), the bound that training maximised.",
    "− inference gap": "ℓ(θ̂) − L(θ̂, q̂), on units that training did not see.",
    "inference gap": "ℓ(θ̂) − L(θ̂, q̂): all of the approximation that is visible after training.",
    "reachability gap": "The approximation gap at θ_ref: how far the guide's family is from the "
    "posteriors of the better model.",
    "excess": "ELBO at θ_ref with the guide refitted per unit, less the ELBO as learned. If "
    "positive, the ELBO was not maximised.",
    "excess, encoder retrained": "The same with the guide retrained at θ_ref: if positive, the "
    "optimiser missed a better point of its own objective.",
    "excess, refitted at both ends": "The same with the guide refitted per unit at both ends: if "
    "positive, the encoder stood in the way and not the family.",
    "log evidence": "ℓ(θ) = log p(v; θ).",
    "predicted by the score": "½ sᵀ I⁻¹ s with s = ∇ℓ(θ̂) and I = −∇²ℓ(θ̂): what a step of exact "
    "learning would gain if ℓ were a parabola.",
    "more where log evidence hardly curves": "The same along directions in which I cannot be told "
    "from 0, with the complete data's information in its place: at the least.",
    "predicted by the ELBO's own gradient": "The same with ∇_θ L in place of ∇ℓ: large where "
    "training had not converged.",
    "− pull": "ℓ(θ_ref) less ℓ where your own training from there settles: the objective drives "
    "the model away.",
    "− path": "From there down to ℓ(θ̂): what training from your start did not reach.",
    "    of it, unconverged": "What training on from θ̂ gains.",
    "    of it, the rest": "The optimiser's where the objective is higher there, else the "
    "objective's own.",
}

KINDS = {
    "exact": "enumeration or algebra",
    "numerical": "quadrature, with an error estimate",
    "certified": "a stochastic bound that holds with the stated confidence",
    "estimated": "a Monte Carlo estimate with its standard error",
    "conditional": "holds if the chains it starts from reached the posterior",
}
