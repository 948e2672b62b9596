"""All errors that worldloom raises on purpose, with one base class.

Each message says what was expected, what was found, and what to do.
"""

from collections.abc import Sequence
from typing import Any


def one_line(error: BaseException) -> str:
    """Return the message of a library's error without line breaks."""
    return " ".join(str(error).split())


class WorldloomError(Exception):
    """Base class of all errors raised by worldloom; `exit_code` is the exit status of the CLI."""

    exit_code = 1


class ConfigError(WorldloomError):
    """A configuration, recipe name or override that cannot be used."""

    exit_code = 2


class DataError(WorldloomError):
    """A dataset, episode or observation that is truncated, inconsistent or not finite."""

    exit_code = 3


class StorageError(WorldloomError):
    """A read or write that failed: full disk, missing permission, missing file."""

    exit_code = 4


class CheckpointError(WorldloomError):
    """A checkpoint that is missing, incomplete, tampered with, or of an unsupported version."""

    exit_code = 5


class EnvironmentFailure(WorldloomError):
    """An environment that raised an error, or returned values that are not finite or have the wrong shape."""

    exit_code = 6


class TrainingError(WorldloomError):
    """Training that cannot continue, for example because the loss is not finite."""

    exit_code = 7


class PlanningError(WorldloomError):
    """An invalid planning problem, for example with bounds that exclude every action."""

    exit_code = 8


class NoFeasiblePlan(PlanningError):
    """No plan that satisfies every guardrail was found for the environments `rows` of the batch.

    The message gives the violated guardrails and the amount of each violation. `plan` contains the best plan found for
    every environment of the batch; do not follow the plans of the environments in `rows`.
    """

    exit_code = 9

    def __init__(self, message: str, *, rows: Sequence[int], plan: Any) -> None:
        super().__init__(message)
        self.rows, self.plan = tuple(rows), plan
