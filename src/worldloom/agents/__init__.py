"""Agents: model predictive control, a reactive policy, and the baselines that stand beside them."""

from worldloom.agents.behaviour_cloning import (
    BehaviourCloningAgent,
    CloningConfig,
    CloningPolicy,
    fit_behaviour_cloning,
)
from worldloom.agents.control import ControlLoop, ControlReport
from worldloom.agents.planning import PlanningAgent, Proposer
from worldloom.agents.random import RandomAgent
from worldloom.agents.reactive import PolicyProposer, ReactiveAgent, ReactiveConfig, ReactivePolicy, fit_reactive

__all__ = [
    "BehaviourCloningAgent",
    "CloningConfig",
    "CloningPolicy",
    "ControlLoop",
    "ControlReport",
    "PlanningAgent",
    "PolicyProposer",
    "Proposer",
    "RandomAgent",
    "ReactiveAgent",
    "ReactiveConfig",
    "ReactivePolicy",
    "fit_behaviour_cloning",
    "fit_reactive",
]
