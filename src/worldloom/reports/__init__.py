"""Reports: pages, figures and films of evaluations and consortia."""

from worldloom.reports.consortium_report import find_owners, write_consortium_report
from worldloom.reports.evaluation_report import ReportData, write_report
from worldloom.reports.figures import DistanceMap, LatentMap, PredictedPaths
from worldloom.reports.film import episodes_gif
from worldloom.reports.plan_figure import CandidatePaths, PlanFigure, PlanFrame, draw_plan

__all__ = [
    "CandidatePaths",
    "DistanceMap",
    "LatentMap",
    "PlanFigure",
    "PlanFrame",
    "PredictedPaths",
    "ReportData",
    "draw_plan",
    "episodes_gif",
    "find_owners",
    "write_consortium_report",
    "write_report",
]
