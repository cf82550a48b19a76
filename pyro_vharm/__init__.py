"""Measure what variational inference did to a model trained in Pyro.

    import pyro_vharm as vh

    audit = vh.audit(model, guide, (x_train,), heldout=(x_test,), seed=0)
    print(audit)

All numbers are in nats.
"""

from pyro_vharm.auditing import audit
from pyro_vharm.diagnostics.activity import ActiveUnits
from pyro_vharm.diagnostics.audit_result import Audit
from pyro_vharm.diagnostics.candidate_training import compare_guides
from pyro_vharm.diagnostics.discrete_shape import DiscreteShape
from pyro_vharm.diagnostics.fulfilment import GapParts, SelfFulfilment, self_fulfilment
from pyro_vharm.diagnostics.gap import InferenceGap, inference_gap
from pyro_vharm.diagnostics.guide_comparison import CandidateRun, Difference, GuideComparison
from pyro_vharm.diagnostics.harm import LearningHarm, learning_harm
from pyro_vharm.diagnostics.local import LocalHarm, LocalPoint, Surroundings
from pyro_vharm.diagnostics.local_measurement import local_harm
from pyro_vharm.diagnostics.modes import Modes
from pyro_vharm.diagnostics.pull import Endpoint, Reachability
from pyro_vharm.diagnostics.pull_measurement import reachability
from pyro_vharm.diagnostics.shape import ContinuousShape, PosteriorShape
from pyro_vharm.diagnostics.shape_measurement import posterior_shape
from pyro_vharm.diagnostics.shifts import Shift
from pyro_vharm.diagnostics.trajectory import DiagnosedHistory, Diagnosis, diagnose
from pyro_vharm.diagnostics.verdict import Verdict
from pyro_vharm.diagnostics.weighted_moments import Measured
from pyro_vharm.errors import (
    InputError,
    JointUnitWarning,
    LoopedRunsWarning,
    NotTwiceDifferentiableError,
    UncompiledWarning,
    UnresolvedIntegralError,
)
from pyro_vharm.estimates import Bound, Estimate, Kind, UnitEstimates
from pyro_vharm.inference.agreement import Agreement, Confirmation
from pyro_vharm.inference.annealing import AnnealedImportanceSampling
from pyro_vharm.inference.bidirectional import Sandwich, bdmc
from pyro_vharm.inference.bridge import BridgeSampling
from pyro_vharm.inference.chains import HamiltonianMonteCarlo
from pyro_vharm.inference.enumeration import Enumeration
from pyro_vharm.inference.evidence import Evidence, log_evidence
from pyro_vharm.inference.hamiltonian import HamiltonianKernel
from pyro_vharm.inference.importance import (
    DefensiveMixture,
    GuideProposal,
    ImportanceSampling,
    MatchedGaussian,
)
from pyro_vharm.inference.quadrature import Quadrature
from pyro_vharm.inference.schedules import (
    AdaptiveSchedule,
    LinearSchedule,
    SigmoidSchedule,
    ThermodynamicLength,
)
from pyro_vharm.inference.sequential import SequentialMonteCarlo
from pyro_vharm.inference.start import MatchedStart, PriorStart
from pyro_vharm.learning.candidates import Candidate, guide_ladder
from pyro_vharm.learning.evidence_pair import EvidencePair
from pyro_vharm.learning.exact_learner import ExactLearner
from pyro_vharm.learning.expectation_maximization import ExpectationMaximization
from pyro_vharm.learning.gradient_learner import GradientLearner
from pyro_vharm.learning.guide_training import GuideTraining
from pyro_vharm.learning.history import Checkpoint, History
from pyro_vharm.learning.learners import ClimbingLearner
from pyro_vharm.learning.recorder import Recorder
from pyro_vharm.learning.reference import Attempt, Reference
from pyro_vharm.learning.reference_search import learn_reference
from pyro_vharm.learning.refit import Refit
from pyro_vharm.learning.svi_training import Trained, TrainingPoint
from pyro_vharm.learning.unit_families import FullRank, MeanField
from pyro_vharm.learning.unit_flows import Flow
from pyro_vharm.model.compilation import forget_compiled
from pyro_vharm.model.parameters import Parameters, capture_parameters
from pyro_vharm.model.simulation import Simulation, simulate
from pyro_vharm.model.unit_guides import AutoUnitNormal
from pyro_vharm.objectives.annealed import AnnealedELBO
from pyro_vharm.objectives.chain_starts import GuideChains, PersistentChains
from pyro_vharm.objectives.exact import ExactEvidence
from pyro_vharm.objectives.gradients import DoublyReparameterized, Pathwise, StickingTheLanding
from pyro_vharm.objectives.importance_weighted import ImportanceWeightedELBO
from pyro_vharm.objectives.markov_chain_em import MarkovChainEM
from pyro_vharm.objectives.objective import ObjectiveReport
from pyro_vharm.output.comparison_figures import plot_families, plot_shifts
from pyro_vharm.output.converters import from_mcmc, from_svi
from pyro_vharm.output.datatree import to_datatree
from pyro_vharm.output.html_report import report
from pyro_vharm.output.ledger_figure import plot_ledger
from pyro_vharm.output.training_figures import (
    plot_posteriors,
    plot_pull,
    plot_self_fulfilment,
    plot_shape,
)
from pyro_vharm.output.unit_figures import plot_units
from pyro_vharm.particles import Particles

__all__ = [
    "ActiveUnits",
    "AdaptiveSchedule",
    "Agreement",
    "AnnealedELBO",
    "AnnealedImportanceSampling",
    "Attempt",
    "Audit",
    "AutoUnitNormal",
    "Bound",
    "BridgeSampling",
    "Candidate",
    "CandidateRun",
    "Checkpoint",
    "ClimbingLearner",
    "Confirmation",
    "ContinuousShape",
    "DefensiveMixture",
    "DiagnosedHistory",
    "Diagnosis",
    "Difference",
    "DiscreteShape",
    "DoublyReparameterized",
    "Endpoint",
    "Enumeration",
    "Estimate",
    "Evidence",
    "EvidencePair",
    "ExactEvidence",
    "ExactLearner",
    "ExpectationMaximization",
    "Flow",
    "FullRank",
    "GapParts",
    "GradientLearner",
    "GuideChains",
    "GuideComparison",
    "GuideProposal",
    "GuideTraining",
    "HamiltonianKernel",
    "HamiltonianMonteCarlo",
    "History",
    "ImportanceSampling",
    "ImportanceWeightedELBO",
    "InferenceGap",
    "InputError",
    "JointUnitWarning",
    "Kind",
    "LearningHarm",
    "LinearSchedule",
    "LocalHarm",
    "LocalPoint",
    "LoopedRunsWarning",
    "MarkovChainEM",
    "MatchedGaussian",
    "MatchedStart",
    "MeanField",
    "Measured",
    "Modes",
    "NotTwiceDifferentiableError",
    "ObjectiveReport",
    "Parameters",
    "Particles",
    "Pathwise",
    "PersistentChains",
    "PosteriorShape",
    "PriorStart",
    "Quadrature",
    "Reachability",
    "Recorder",
    "Reference",
    "Refit",
    "Sandwich",
    "SelfFulfilment",
    "SequentialMonteCarlo",
    "Shift",
    "SigmoidSchedule",
    "Simulation",
    "StickingTheLanding",
    "Surroundings",
    "ThermodynamicLength",
    "Trained",
    "TrainingPoint",
    "UncompiledWarning",
    "UnitEstimates",
    "UnresolvedIntegralError",
    "Verdict",
    "audit",
    "bdmc",
    "capture_parameters",
    "compare_guides",
    "diagnose",
    "forget_compiled",
    "from_mcmc",
    "from_svi",
    "guide_ladder",
    "inference_gap",
    "learn_reference",
    "learning_harm",
    "local_harm",
    "log_evidence",
    "plot_families",
    "plot_ledger",
    "plot_posteriors",
    "plot_pull",
    "plot_self_fulfilment",
    "plot_shape",
    "plot_shifts",
    "plot_units",
    "posterior_shape",
    "reachability",
    "report",
    "self_fulfilment",
    "simulate",
    "to_datatree",
]
