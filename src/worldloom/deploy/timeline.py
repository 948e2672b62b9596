"""A figure of a control loop's report, with the time and the kind of each command."""

from pathlib import Path

import numpy as np

from worldloom.core.files import write_atomic
from worldloom.deploy.control import ControlReport

# The Okabe-Ito colours, which colour-blind readers can distinguish.
_KINDS = {
    "agent": ("#0072b2", "the agent's action"),
    "late": ("#56b4e9", "a late plan, still fresh"),
    "safe": ("#d55e00", "safe action (the loop)"),
    "watchdog": ("#cc79a7", "safe action (the watchdog)"),
}
_INK, _FAINT = "#1d2329", "#d5dade"


def draw_timeline(report: ControlReport, path: Path) -> None:
    """Write an SVG that shows, for each period, the time from its beginning to its command, and the deadline.

    Raises:
        StorageError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axis = figure.subplots()
    periods = np.array([period.number for period in report.periods])
    for kind, (colour, label) in _KINDS.items():
        chosen = [period for period in report.periods if period.kind == kind and period.sent is not None]
        if chosen:
            times = [period.number / report.rate for period in chosen]
            axis.scatter(times, [1e3 * (period.sent or 0.0) for period in chosen], s=5, color=colour, label=label)
    silent = [period.number / report.rate for period in report.periods if period.kind is None]
    if silent:
        axis.scatter(silent, np.full(len(silent), 1e3 / report.rate), s=12, marker="x", color=_INK, label="no command")
    axis.axhline(1e3 * report.deadline, color=_INK, linewidth=0.8, linestyle="--", label="deadline")
    axis.set_ylim(0, 1.1e3 / report.rate)
    axis.set_xlim(0, max(1.0, float(periods.max(initial=0) + 1) / report.rate))
    axis.set_xlabel("seconds since the start")
    axis.set_ylabel("ms after the\nbeginning of a period")
    axis.set_title(
        f"{report.periods.total} periods at {report.rate:g} Hz, {report.misses.total} deadlines missed", color=_INK
    )
    axis.grid(color=_FAINT, linewidth=0.5)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize="small")
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="svg", metadata={"Date": None}))
