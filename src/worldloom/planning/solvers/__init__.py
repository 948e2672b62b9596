"""Solvers: searches for good actions. To add one, write one file here that registers a `Solver`."""

from worldloom.planning.solvers.adam import Adam
from worldloom.planning.solvers.cem import CEM
from worldloom.planning.solvers.icem import ICEM
from worldloom.planning.solvers.mppi import MPPI
from worldloom.planning.solvers.random_shooting import RandomShooting
from worldloom.planning.solvers.solver import SOLVERS, Solution, Solver, SolverField
from worldloom.planning.solvers.tree_search import TreeSearch

__all__ = [
    "CEM",
    "ICEM",
    "MPPI",
    "SOLVERS",
    "Adam",
    "RandomShooting",
    "Solution",
    "Solver",
    "SolverField",
    "TreeSearch",
]
