"""Progress reports: the library prints nothing itself; the caller passes a `Progress`."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable


@runtime_checkable
class ProgressTask(Protocol):
    """One long-running piece of work."""

    def advance(self, amount: int = 1, **figures: float) -> None:
        """Report that `amount` more units are finished; `figures` are shown beside the progress bar."""
        ...


@runtime_checkable
class Progress(Protocol):
    """Opens tasks. The CLI's implementation shows a progress bar with the rate and the remaining time."""

    def task(self, description: str, total: int, unit: str = "it") -> AbstractContextManager[ProgressTask]:
        """Open a task of `total` units."""
        ...


class _SilentTask:
    def advance(self, amount: int = 1, **figures: float) -> None:
        return None


class SilentProgress:
    """The default `Progress`, which reports nothing."""

    def task(self, description: str, total: int, unit: str = "it") -> AbstractContextManager[ProgressTask]:
        """Open a task that reports nothing."""
        return nullcontext(_SilentTask())


SILENT = SilentProgress()
