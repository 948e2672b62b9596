"""How the library reports progress without printing: the caller passes a `Progress`."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable


@runtime_checkable
class ProgressTask(Protocol):
    """One piece of long work under way."""

    def advance(self, amount: int = 1, **figures: float) -> None:
        """Report `amount` more finished units, with figures to show beside the bar."""
        ...


@runtime_checkable
class Progress(Protocol):
    """Opens tasks; the CLI's draws bars with a rate and the time left."""

    def task(self, description: str, total: int, unit: str = "it") -> AbstractContextManager[ProgressTask]:
        """Open a task of `total` units."""
        ...


class _SilentTask:
    def advance(self, amount: int = 1, **figures: float) -> None:
        return None


class SilentProgress:
    """The default: says nothing."""

    def task(self, description: str, total: int, unit: str = "it") -> AbstractContextManager[ProgressTask]:
        """Open a task that says nothing."""
        return nullcontext(_SilentTask())


SILENT = SilentProgress()
