"""Guardrails: hard limits on plans, as rule sets that their owners sign, with calibrated margins."""

from worldloom.guardrails.action_limits import ActionLimits
from worldloom.guardrails.bound_rules import BoundRules
from worldloom.guardrails.consistency import check_consistent
from worldloom.guardrails.fallback import FALLBACKS, Fallback, Hold, Infeasible, Retreat, Stop
from worldloom.guardrails.margins import (
    AdaptiveMargin,
    Margins,
    conformal_quantile,
    level_after,
    margin_shape,
    refusing,
    tolerance_quantile,
    write_margins,
)
from worldloom.guardrails.objective_configs import OBJECTIVES, ObjectiveConfig, build_objective
from worldloom.guardrails.rails import (
    GUARDRAILS,
    Agreed,
    BoundRail,
    Custom,
    Familiar,
    KeepAway,
    KeepIn,
    KeepOut,
    Magnitude,
    Rail,
    Rate,
    Returnable,
    Unlike,
)
from worldloom.guardrails.recalibration import Recalibration, errors_seen, seen_violations
from worldloom.guardrails.regions import REGIONS, Ball, Box, Region
from worldloom.guardrails.rule_set import RuleLayer, RuleSet, read_rules, sign_rules

__all__ = [
    "FALLBACKS",
    "GUARDRAILS",
    "OBJECTIVES",
    "REGIONS",
    "ActionLimits",
    "AdaptiveMargin",
    "Agreed",
    "Ball",
    "BoundRail",
    "BoundRules",
    "Box",
    "Custom",
    "Fallback",
    "Familiar",
    "Hold",
    "Infeasible",
    "KeepAway",
    "KeepIn",
    "KeepOut",
    "Magnitude",
    "Margins",
    "ObjectiveConfig",
    "Rail",
    "Rate",
    "Recalibration",
    "Region",
    "Retreat",
    "Returnable",
    "RuleLayer",
    "RuleSet",
    "Stop",
    "Unlike",
    "build_objective",
    "check_consistent",
    "conformal_quantile",
    "errors_seen",
    "level_after",
    "margin_shape",
    "read_rules",
    "refusing",
    "seen_violations",
    "sign_rules",
    "tolerance_quantile",
    "write_margins",
]
