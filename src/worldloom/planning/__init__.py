"""Planning: objectives over predicted futures, and solvers that search for good actions."""

from worldloom.planning.objectives import (
    Avoid,
    Effort,
    Elapsed,
    GoalObjective,
    InformationGain,
    InOrder,
    LatentL2,
    RegionGoal,
    Smoothness,
    Unusual,
    VectorGoal,
    WeightedSum,
    as_objective,
)
from worldloom.planning.planner import Planner
from worldloom.planning.problem import Deadline, PlanningProblem, Watch, violations_of

__all__ = [
    "Avoid",
    "Deadline",
    "Effort",
    "Elapsed",
    "GoalObjective",
    "InOrder",
    "InformationGain",
    "LatentL2",
    "Planner",
    "PlanningProblem",
    "RegionGoal",
    "Smoothness",
    "Unusual",
    "VectorGoal",
    "Watch",
    "WeightedSum",
    "as_objective",
    "violations_of",
]
