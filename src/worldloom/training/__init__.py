"""Training of world models, in run folders that can be resumed and reproduced."""

from worldloom.training.diagnostics import Alarm, alarms, diagnose, effective_rank
from worldloom.training.linear_probe import LinearProbe, ProbeScore
from worldloom.training.loop import Segment, fit, held_out_losses
from worldloom.training.provenance import describe_provenance, git_commit
from worldloom.training.ranks import Ranks, make_fabric
from worldloom.training.run_folder import RunFolder
from worldloom.training.state import saved_steps
from worldloom.training.training_config import FREE, TrainingConfig, default_losses

__all__ = [
    "FREE",
    "Alarm",
    "LinearProbe",
    "ProbeScore",
    "Ranks",
    "RunFolder",
    "Segment",
    "TrainingConfig",
    "alarms",
    "default_losses",
    "describe_provenance",
    "diagnose",
    "effective_rank",
    "fit",
    "git_commit",
    "held_out_losses",
    "make_fabric",
    "saved_steps",
]
