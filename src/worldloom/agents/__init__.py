"""Agents: model predictive control, guides for far goals, a reactive policy, and baselines."""

from worldloom.agents.audit_entries import FORGED, AgentDescription, DecidedBody, EntryBody, WentOnBody, parse_body
from worldloom.agents.audit_log import (
    AuditLog,
    damaged_situations,
    happened_after,
    log_entries,
    log_path,
    read_situation,
    replay,
    unrecorded_situations,
)
from worldloom.agents.behaviour_cloning import (
    BehaviourCloningAgent,
    CloningConfig,
    CloningPolicy,
    fit_behaviour_cloning,
)
from worldloom.agents.goal_inverse import (
    GoalInverse,
    GoalInverseAgent,
    GoalInverseConfig,
    GoalInverseProposer,
    fit_goal_inverse,
)
from worldloom.agents.guides.curiosity import CuriosityConfig, CuriosityGuide
from worldloom.agents.guides.hierarchy import HierarchyConfig, HierarchyGuide
from worldloom.agents.guides.landmarks import Beyond, FollowConfig, LandmarkGuide, Outlook
from worldloom.agents.methods import (
    METHODS,
    AgentParts,
    CloningMethod,
    GoalInverseMethod,
    HierarchyMethod,
    LandmarkMethod,
    MethodConfig,
    PlanMethod,
    PlannedMethod,
    RandomMethod,
    ReactiveMethod,
    default_methods,
)
from worldloom.agents.mpc import ExploringAgent, Guide, PlanningAgent, Proposer
from worldloom.agents.random import RandomAgent
from worldloom.agents.reactive import PolicyProposer, ReactiveAgent, ReactiveConfig, ReactivePolicy, fit_reactive
from worldloom.agents.remembering import Rememberer, recall_landmarks
from worldloom.agents.situation import Situation

__all__ = [
    "FORGED",
    "METHODS",
    "AgentDescription",
    "AgentParts",
    "AuditLog",
    "BehaviourCloningAgent",
    "Beyond",
    "CloningConfig",
    "CloningMethod",
    "CloningPolicy",
    "CuriosityConfig",
    "CuriosityGuide",
    "DecidedBody",
    "EntryBody",
    "ExploringAgent",
    "FollowConfig",
    "GoalInverse",
    "GoalInverseAgent",
    "GoalInverseConfig",
    "GoalInverseMethod",
    "GoalInverseProposer",
    "Guide",
    "HierarchyConfig",
    "HierarchyGuide",
    "HierarchyMethod",
    "LandmarkGuide",
    "LandmarkMethod",
    "MethodConfig",
    "Outlook",
    "PlanMethod",
    "PlannedMethod",
    "PlanningAgent",
    "PolicyProposer",
    "Proposer",
    "RandomAgent",
    "RandomMethod",
    "ReactiveAgent",
    "ReactiveConfig",
    "ReactiveMethod",
    "ReactivePolicy",
    "Rememberer",
    "Situation",
    "WentOnBody",
    "damaged_situations",
    "default_methods",
    "fit_behaviour_cloning",
    "fit_goal_inverse",
    "fit_reactive",
    "happened_after",
    "log_entries",
    "log_path",
    "parse_body",
    "read_situation",
    "recall_landmarks",
    "replay",
    "unrecorded_situations",
]
