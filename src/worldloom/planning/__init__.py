"""Planning: objectives over predicted futures, solvers that search, and what search learns from frozen latents."""

from worldloom.planning.actions import Walk
from worldloom.planning.distance import DistanceConfig, TemporalDistance, fit_distance, rank_correlation
from worldloom.planning.episodes import LatentEpisodes, dream, encode_episodes
from worldloom.planning.geometry import (
    LatentGeometry,
    Reversibility,
    measure_geometry,
    measure_reversibility,
    predict_arrival,
)
from worldloom.planning.guardrails import (
    Agreed,
    Ball,
    Box,
    Custom,
    Familiar,
    KeepAway,
    KeepIn,
    KeepOut,
    Magnitude,
    Rail,
    Rate,
    Region,
    Returnable,
    Unlike,
)
from worldloom.planning.hierarchy import CoarseConfig, CoarseModel, fit_coarse
from worldloom.planning.inverse import InverseConfig, InverseDynamics, fit_inverse
from worldloom.planning.objectives import GoalObjective, LatentL2, Metric, WeightedSum
from worldloom.planning.planner import Planner
from worldloom.planning.probe import Probe, ProbeConfig, fit_probe
from worldloom.planning.problem import Deadline, PlanningProblem
from worldloom.planning.solvers import (
    CEM,
    ICEM,
    MPPI,
    SOLVERS,
    Adam,
    RandomShooting,
    Solution,
    Solver,
    SolverField,
    TreeSearch,
)

__all__ = [
    "CEM",
    "ICEM",
    "MPPI",
    "SOLVERS",
    "Adam",
    "Agreed",
    "Ball",
    "Box",
    "CoarseConfig",
    "CoarseModel",
    "Custom",
    "Deadline",
    "DistanceConfig",
    "Familiar",
    "GoalObjective",
    "InverseConfig",
    "InverseDynamics",
    "KeepAway",
    "KeepIn",
    "KeepOut",
    "LatentEpisodes",
    "LatentGeometry",
    "LatentL2",
    "Magnitude",
    "Metric",
    "Planner",
    "PlanningProblem",
    "Probe",
    "ProbeConfig",
    "Rail",
    "RandomShooting",
    "Rate",
    "Region",
    "Returnable",
    "Reversibility",
    "Solution",
    "Solver",
    "SolverField",
    "TemporalDistance",
    "TreeSearch",
    "Unlike",
    "Walk",
    "WeightedSum",
    "dream",
    "encode_episodes",
    "fit_coarse",
    "fit_distance",
    "fit_inverse",
    "fit_probe",
    "measure_geometry",
    "measure_reversibility",
    "predict_arrival",
    "rank_correlation",
]
