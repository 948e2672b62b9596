"""Terminal output: progress, tables and errors. Only the CLI prints."""

import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from worldloom.core.progress import Progress, ProgressTask
from worldloom.core.text import one_line, printable

_LONGEST_LINE = 10_000  # characters


class SafeConsole(Console):
    """A console that escapes control characters, so that no party's text can send commands to the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield the segments of an object, with control and invisible characters as escapes."""
        for segment in super().render(renderable, options):
            safe = segment.text if segment.control else printable(segment.text)
            yield segment if safe == segment.text else Segment(safe, segment.style)


class SafeFormatter(logging.Formatter):
    """Formats each record on one line, and its traceback below, with control and invisible characters as escapes."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the line; of a long line, which may quote another party, only the beginning."""
        return one_line(super().formatMessage(record)[:_LONGEST_LINE])

    def format(self, record: logging.LogRecord) -> str:
        """Return the line and the traceback."""
        return printable(super().format(record))


out = SafeConsole(highlight=False)
err = SafeConsole(stderr=True, highlight=False)

Shown = str | Text | Table
"""A part of a command's output for people."""


def progress() -> Progress:
    """Return progress bars for a terminal, else plain lines; both are written to standard error."""
    return BarProgress() if err.is_terminal else LineProgress()


def answer(as_json: bool, value: Any, *shown: Shown) -> None:
    """Print a command's result: `value` as one JSON document for programs, or `shown` for people."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")
    else:
        show(*shown)


def show(*shown: Shown) -> None:
    """Print tables and lines; lines are neither wrapped nor parsed as markup, so paths can be copied completely."""
    for part in shown:
        if isinstance(part, Table) and not out.is_terminal:
            SafeConsole(highlight=False, width=160).print(
                part
            )  # a pipe has no width of its own; do not cut columns there
        else:
            out.print(part, markup=False, soft_wrap=not isinstance(part, Table))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table; columns after the first are aligned to the right."""
    made = Table(title=escape(title), title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        made.add_column(escape(column), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*(escape(printable(cell)) for cell in row))
    return made


def values_table(title: str, values: Mapping[str, object]) -> Table:
    """Return a table of names and values."""
    return table(title, ["", "value"], [[name, str(value)] for name, value in values.items()])


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print one table."""
    show(table(title, columns, rows))


class _ProgressMeter:
    """Counts one task and formats its rate and figures.

    The rate leaves out the first advance, because that may be the work of an earlier process.
    """

    def __init__(self, unit: str) -> None:
        self.unit, self.done, self.start = unit, 0, time.perf_counter()
        self.rate = 0.0  # units per second
        self._first: tuple[int, float] | None = None
        self._figures: dict[str, float] = {}

    def advance(self, amount: int, figures: dict[str, float]) -> str:
        self.done += amount
        self._figures.update(figures)
        now = time.perf_counter()
        if self._first is None:
            self._first = self.done, now
        done, since = (0, self.start) if self.done == self._first[0] else self._first
        self.rate = (self.done - done) / max(now - since, 1e-9)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in self._figures.items())
        return f"{self.rate:,.{0 if self.rate >= 10 else 1}f} {self.unit}/s  {shown}".rstrip()


class BarProgress:
    """Progress bars with a count, a rate and the time left; the bar of a nested task is below the outer bar."""

    def __init__(self) -> None:
        self._bars: RichProgress | None = None

    @contextmanager
    def task(self, description: str, total: int, unit: str = "it") -> Iterator[ProgressTask]:
        """Open a bar. An outer bar stays on the screen when its task ends; a nested bar is removed."""
        if (bars := self._bars) is not None:
            task = bars.add_task(description, total=total, figures="")
            try:
                yield _Bar(bars, task, unit)
            finally:
                bars.remove_task(task)
            return
        columns = (
            TextColumn("{task.description:<28}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[figures]}"),
        )
        with RichProgress(*columns, console=err) as bars:
            self._bars = bars
            try:
                yield _Bar(bars, bars.add_task(description, total=total, figures=""), unit)
            finally:
                self._bars = None


class _Bar:
    def __init__(self, bars: RichProgress, task: TaskID, unit: str) -> None:
        self._bars, self._task, self._meter = bars, task, _ProgressMeter(unit)

    def advance(self, amount: int = 1, **figures: float) -> None:
        self._bars.update(self._task, advance=amount, figures=self._meter.advance(amount, figures))


class LineProgress:
    """Plain lines: one every ten seconds and one at the end. A nested task writes its last line
    only if it took at least ten seconds."""

    interval = 10.0

    def __init__(self) -> None:
        self._open = 0

    @contextmanager
    def task(self, description: str, total: int, unit: str = "it") -> Iterator[ProgressTask]:
        """Open a task that writes lines."""
        line = _Line(description, total, unit, self.interval)
        self._open += 1
        try:
            yield line
        finally:
            self._open -= 1
        line.end(always=not self._open)


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
            left = (self._total - self._meter.done) / max(self._meter.rate, 1e-9)
            self._write(f"{self._meter.done}/{self._total}  {left:.0f} s left  {self._text}")

    def end(self, *, always: bool) -> None:
        seconds = time.perf_counter() - self._meter.start
        if always or seconds >= self._interval:
            self._write(f"{self._meter.done}/{self._total}  {seconds:.1f} s  {self._text}")

    def _write(self, text: str) -> None:
        err.print(f"{self._description}: {text}", markup=False, soft_wrap=True)
