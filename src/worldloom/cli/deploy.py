"""`worldloom deploy`: use a run to control a plant that has its own clock."""

import signal
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.control import Control
from rich.segment import ControlType

from worldloom.cli.console import Shown, answer, err, table
from worldloom.cli.options import Audit, Imports, Json, Rules, Trust, Unsigned, open_session
from worldloom.core.errors import ConfigError
from worldloom.core.files import require_writable


def deploy(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    connect: Annotated[str, typer.Option(metavar="ADDRESS", help="The plant: tcp://HOST:PORT or unix:PATH.")],
    goal: Annotated[
        Path, typer.Option(help="The goal: a picture (PNG), or JSON with a 'vector' and/or the path of 'pixels'.")
    ],
    safe_action: Annotated[
        str,
        typer.Option(
            metavar="zero|hold|V1,V2,...",
            help="The action to send if no plan is ready in time: zero, hold (repeat the last one), or these values.",
        ),
    ],
    rate: Annotated[float, typer.Option(min=0.1, help="Periods per second; must equal the plant's rate.")] = 20.0,
    deadline_ms: Annotated[
        float, typer.Option(min=0.1, help="When an action is due, in ms after the start of its period.")
    ] = 40.0,
    late: Annotated[
        str,
        typer.Option(metavar="discard|use", help="Whether to discard or use a plan that is ready in a later period."),
    ] = "discard",
    duration: Annotated[float, typer.Option(min=0.0, help="Duration in seconds; 0 runs until Ctrl-C.")] = 0.0,
    method: Annotated[str | None, typer.Option(help="A method of the recipe; by default, the recipe's choice.")] = None,
    memory: Annotated[Path | None, typer.Option(help="The memory that the agent reads and writes.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The root of the planner's seed.")] = 0,
    rules: Rules = None,
    trust: Trust = None,
    unsigned: Unsigned = False,
    audit: Audit = None,
    threads: Annotated[
        int, typer.Option("--threads", min=1, help="CPU threads of the planner; leave one core to the control loop.")
    ] = 1,
    imports: Imports = None,
    json: Json = False,
) -> None:
    """Drive a real plant towards a goal at a fixed rate; a late plan is replaced by the declared safe action.

    Ctrl-C stops the control loop and applies the safe action. The report and its timeline are written into the run
    folder.
    """
    from worldloom.deploy import ControlLoop, SocketLink
    from worldloom.workflow import check_plant, read_goal, store_report

    if late not in ("discard", "use"):
        raise ConfigError(f"expected --late discard or use; got {late!r}")
    with open_session(run, threads, imports, rules, trust, unsigned, memory=memory, audit=audit) as session:
        require_writable(session.run.path / "deployments" / "report.json")
        target = read_goal(session.run, goal)
        agent = session.agent(method, seed=seed)
        with SocketLink(connect) as link:
            check_plant(session.run, link)
            loop = ControlLoop(
                agent,
                link,
                rate=rate,
                deadline=deadline_ms / 1e3,
                safe_action=_safe_action(safe_action, link.action.size),
                late="discard" if late == "discard" else "use if fresh",
                on_period=_Live(),
            )
            previous = signal.signal(signal.SIGTERM, lambda *_: loop.stop())
            try:
                loop.run(target, duration=duration or None)
            finally:
                signal.signal(signal.SIGTERM, previous)
                folder = store_report(session.run, loop.report)
    figures = loop.report.to_json()
    answer(json, figures, *shown(figures), f"report: {folder}")


def shown(figures: dict[str, Any]) -> list[Shown]:
    """Return the figures of a report as tables."""

    def row(name: str) -> list[str]:
        values = figures[name] or {}
        return [name, *(f"{values[key]:.2f}" if key in values else "" for key in ("p50", "p95", "p99", "max"))]

    times = table(
        f"{figures['periods']} periods, {figures['rate_held']} Hz held, {figures['misses']} deadlines missed, "
        f"{len(figures['watchdog_acts'])} watchdog actions; {figures['ended']}",
        ["milliseconds", "p50", "p95", "p99", "max"],
        [row(name) for name in ("jitter_ms", "plan_ms", "command_ms", "observation_age_ms")],
    )
    causes = [[name, str(count)] for name, count in figures["miss_causes"].items()]
    return [times, *([table("misses", ["cause", "periods"], causes)] if causes else [])]


class _Live:
    """A line of figures: every second in a terminal, every ten seconds in a file."""

    def __init__(self) -> None:
        self._every = 1.0 if err.is_terminal else 10.0
        self._next = self._every

    def __call__(self, report: Any) -> None:
        seconds = (report.periods[-1].number + 1) / report.rate
        if seconds < self._next:
            return
        self._next += self._every
        plan = f"plan {1e3 * report.plans[-1]:.1f} ms" if report.plans else "no plan yet"
        err.print(
            f"{seconds:6.0f} s  {report.periods.total} periods  {plan}  missed {report.misses.total}  "
            f"watchdog {report.watchdog.total}",
            end="" if err.is_terminal else "\n",
        )
        if err.is_terminal:
            err.control(Control(ControlType.CARRIAGE_RETURN))  # the next line of figures replaces this one


def _safe_action(text: str, size: int) -> Any:

    if text == "hold":
        return "hold"
    if text == "zero":
        return [0.0] * size
    try:
        return [float(value) for value in text.split(",")]
    except ValueError:
        raise ConfigError(f"expected --safe-action zero, hold or {size} comma-separated values; got {text!r}") from None
