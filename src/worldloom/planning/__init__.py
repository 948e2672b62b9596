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
from worldloom.planning.hierarchy import CoarseConfig, CoarseModel, fit_coarse
from worldloom.planning.inverse import InverseConfig, InverseDynamics, fit_inverse
from worldloom.planning.objectives import GoalObjective, LatentL2, Metric, WeightedSum
from worldloom.planning.planner import Planner
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
    "CoarseConfig",
    "CoarseModel",
    "Deadline",
    "DistanceConfig",
    "GoalObjective",
    "InverseConfig",
    "InverseDynamics",
    "LatentEpisodes",
    "LatentGeometry",
    "LatentL2",
    "Metric",
    "Planner",
    "PlanningProblem",
    "RandomShooting",
    "Reversibility",
    "Solution",
    "Solver",
    "SolverField",
    "TemporalDistance",
    "TreeSearch",
    "Walk",
    "WeightedSum",
    "dream",
    "encode_episodes",
    "fit_coarse",
    "fit_distance",
    "fit_inverse",
    "measure_geometry",
    "measure_reversibility",
    "predict_arrival",
    "rank_correlation",
]
