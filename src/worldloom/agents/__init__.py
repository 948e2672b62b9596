"""Agents: model predictive control, a reactive policy, and the baselines that stand beside them."""

from worldloom.agents.audit import AuditLog
from worldloom.agents.behaviour_cloning import (
    BehaviourCloningAgent,
    CloningConfig,
    CloningPolicy,
    fit_behaviour_cloning,
)
from worldloom.agents.control import ControlLoop, ControlReport
from worldloom.agents.curiosity import CuriosityConfig, CuriosityGuide, ExploringAgent, LandmarkAgent, planning_parts
from worldloom.agents.fallback import FALLBACKS, Fallback, FallbackField, Hold, Retreat, Stop
from worldloom.agents.hierarchy import HierarchyConfig, HierarchyGuide
from worldloom.agents.landmarks import Beyond, FollowConfig, LandmarkGuide, Outlook, arrival_check
from worldloom.agents.planning import Auditor, Decision, Guide, Observer, PlanningAgent, Proposer, Situation
from worldloom.agents.policy import Policy, PolicyConfig, read_policy
from worldloom.agents.random import RandomAgent
from worldloom.agents.reactive import PolicyProposer, ReactiveAgent, ReactiveConfig, ReactivePolicy, fit_reactive
from worldloom.agents.recalibration import Recalibration
from worldloom.agents.remembering import Rememberer, recall_landmarks

__all__ = [
    "FALLBACKS",
    "AuditLog",
    "Auditor",
    "BehaviourCloningAgent",
    "Beyond",
    "CloningConfig",
    "CloningPolicy",
    "ControlLoop",
    "ControlReport",
    "CuriosityConfig",
    "CuriosityGuide",
    "Decision",
    "ExploringAgent",
    "Fallback",
    "FallbackField",
    "FollowConfig",
    "Guide",
    "HierarchyConfig",
    "HierarchyGuide",
    "Hold",
    "LandmarkAgent",
    "LandmarkGuide",
    "Observer",
    "Outlook",
    "PlanningAgent",
    "Policy",
    "PolicyConfig",
    "PolicyProposer",
    "Proposer",
    "RandomAgent",
    "ReactiveAgent",
    "ReactiveConfig",
    "ReactivePolicy",
    "Recalibration",
    "Rememberer",
    "Retreat",
    "Situation",
    "Stop",
    "arrival_check",
    "fit_behaviour_cloning",
    "fit_reactive",
    "planning_parts",
    "read_policy",
    "recall_landmarks",
]
