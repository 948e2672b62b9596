"""Every error that worldloom raises on purpose, as one tree.

Each message says what was expected, what came, and what to do.
"""

from collections.abc import Sequence
from typing import Any


class WorldloomError(Exception):
    """Base of all errors raised by worldloom; `exit_code` is what the CLI returns for it."""

    exit_code = 1


class ConfigError(WorldloomError):
    """A configuration, recipe name or override that cannot be used."""

    exit_code = 2


class DataError(WorldloomError):
    """A dataset, episode or observation that is truncated, inconsistent or not finite."""

    exit_code = 3


class StorageError(WorldloomError):
    """A read or write that the storage refused: full disk, missing permission, missing file."""

    exit_code = 4


class CheckpointError(WorldloomError):
    """A checkpoint that is missing, incomplete, tampered with, or of another version."""

    exit_code = 5


class EnvironmentFailure(WorldloomError):
    """An environment that raised, or returned something that is not finite or of the wrong shape."""

    exit_code = 6


class TrainingError(WorldloomError):
    """Training that cannot go on, such as a loss that is not finite."""

    exit_code = 7


class PlanningError(WorldloomError):
    """A planning problem that is stated wrongly, such as bounds that exclude every action."""

    exit_code = 8


class NoFeasiblePlan(PlanningError):
    """No plan was found that keeps every guardrail: `rows` of the batch, and by which guardrail and how much each.

    `plan` is what came nearest, for all environments; for those in `rows` it must not be followed.
    """

    exit_code = 9

    def __init__(self, message: str, *, rows: Sequence[int], plan: Any) -> None:
        super().__init__(message)
        self.rows, self.plan = tuple(rows), plan
