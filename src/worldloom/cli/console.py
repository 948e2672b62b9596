"""What the terminal shows: progress, tables and errors. Only the CLI prints."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from worldloom.core.progress import Progress, ProgressTask

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def progress() -> Progress:
    """Return bars for a terminal, and plain lines otherwise; both go to standard error."""
    return BarProgress() if err.is_terminal else LineProgress()


def say(text: str, style: str | None = None) -> None:
    """Print a line as it stands, neither wrapped nor read as markup: a path can be copied whole."""
    out.print(text, style=style, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print one JSON document for programs, to standard output."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; columns after the first are aligned to the right."""
    table = Table(title=escape(title), title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    # A file or a pipe has no width of its own: let no column be cut there.
    (out if out.is_terminal else Console(highlight=False, width=160)).print(table)


class _ProgressMeter:
    """Counts one task and formats its rate and figures."""

    def __init__(self, unit: str) -> None:
        self.unit, self.done, self.start = unit, 0, time.perf_counter()
        self.figures: dict[str, float] = {}

    def advance(self, amount: int, figures: dict[str, float]) -> str:
        self.done += amount
        self.figures.update(figures)
        rate = self.done / max(time.perf_counter() - self.start, 1e-9)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in self.figures.items())
        return f"{rate:,.{0 if rate >= 10 else 1}f} {self.unit}/s  {shown}".rstrip()


class BarProgress:
    """Bars with a count, a rate and the time left."""

    @contextmanager
    def task(self, description: str, total: int, unit: str = "it") -> Iterator[ProgressTask]:
        """Open a bar; it stays on the screen when it ends."""
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[figures]}"),
        )
        with RichProgress(*columns, console=err) as bars:
            yield _Bar(bars, bars.add_task(description, total=total, figures=""), unit)


class _Bar:
    def __init__(self, bars: RichProgress, task: TaskID, unit: str) -> None:
        self._bars, self._task, self._meter = bars, task, _ProgressMeter(unit)

    def advance(self, amount: int = 1, **figures: float) -> None:
        self._bars.update(self._task, advance=amount, figures=self._meter.advance(amount, figures))


class LineProgress:
    """A plain line at the start, every ten seconds and at the end."""

    interval = 10.0

    @contextmanager
    def task(self, description: str, total: int, unit: str = "it") -> Iterator[ProgressTask]:
        """Open a task that writes lines."""
        line = _Line(description, total, unit, self.interval)
        yield line
        line.end()


class _Line:
    def __init__(self, description: str, total: int, unit: str, interval: float) -> None:
        self._description, self._total, self._interval = description, total, interval
        self._meter = _ProgressMeter(unit)
        self._next = self._meter.start + interval
        self._text = ""

    def advance(self, amount: int = 1, **figures: float) -> None:
        self._text = self._meter.advance(amount, figures)
        now = time.perf_counter()
        if now >= self._next and self._meter.done < self._total:
            self._next = now + self._interval
            left = (self._total - self._meter.done) * (now - self._meter.start) / max(self._meter.done, 1)
            self._write(f"{self._meter.done}/{self._total}  {left:.0f} s left  {self._text}")

    def end(self) -> None:
        seconds = time.perf_counter() - self._meter.start
        self._write(f"{self._meter.done}/{self._total}  {seconds:.1f} s  {self._text}")

    def _write(self, text: str) -> None:
        err.print(f"{self._description}: {text}", markup=False, soft_wrap=True)
