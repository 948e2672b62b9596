"""Progress reports: the library prints nothing itself; the caller passes a `Progress`."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
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

    @contextmanager
    def task(self, description: str, total: int, unit: str = "it") -> Iterator[ProgressTask]:
        """Open a task that reports nothing."""
        yield _SilentTask()


SILENT = SilentProgress()
