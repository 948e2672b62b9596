"""A live view of a consortium's rounds: a table in a terminal, plain lines elsewhere."""

import json
import logging
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from worldloom.cli.console import answer, err, out
from worldloom.core.errors import WorldloomError
from worldloom.core.files import storage_errors
from worldloom.federation import Constitution, LedgerHistory, LedgerWatch, Round, duration, loss_change, size

_log = logging.getLogger(__name__)
_EVERY = 0.5  # seconds between reads of the ledger
_STYLES = {"waiting": "dim", "contributed": "green", "refused": "red", "left out": "yellow"}
_REASON = 160  # maximum characters of a reason in the table; lines and the report show all of it


def watch(rounds: Path, constitution: Constitution, *, once: bool = False, console: Console = out) -> None:
    """Show the rounds in a folder until the last round is done, or Ctrl-C; with `once`, show their state and return.

    Raises:
        StorageError: there is no ledger, and `once` is set.
        DataError: the ledger does not verify under the constitution.
    """
    watched = LedgerWatch(rounds, constitution)
    if once:
        with storage_errors(watched.ledger):
            watched.ledger.stat()
    with suppress(KeyboardInterrupt), _shown(watched, console) as look:
        look()
        if not console.is_terminal and not watched.ledger.exists():
            console.print(f"waiting for {watched.ledger}", markup=False, soft_wrap=True)
        while not once and not watched.history.done:
            time.sleep(_EVERY)
            look()


def watch_json(rounds: Path, constitution: Constitution, *, once: bool = False) -> None:
    """Print a JSON line for each change until the last round is done, or Ctrl-C; with `once`, print only the state.

    Raises:
        StorageError, DataError: see `watch`.
    """
    watched = LedgerWatch(rounds, constitution)
    if once:
        with storage_errors(watched.ledger):
            watched.ledger.stat()
        watched.look()
        answer(True, {**asdict(watched.history), "done": watched.history.done})
        return
    with suppress(KeyboardInterrupt):
        while not watched.history.done:
            for line in watched.look():
                sys.stdout.write(json.dumps({"event": line, "done": watched.history.done}) + "\n")
                sys.stdout.flush()
            time.sleep(0 if watched.history.done else _EVERY)


@contextmanager
def live(rounds: Path, constitution: Constitution, *, console: Console = err) -> Iterator[None]:
    """Show the rounds in a folder while the body of the `with` statement runs them; a thread reads the ledger.

    Earlier rounds appear as one line. The view never stops the work: read errors are logged. A terminal shows
    only one live view, so the body must not draw progress bars.

    Raises:
        DataError: the existing ledger does not verify under the constitution.
    """
    watched, stop = LedgerWatch(rounds, constitution), threading.Event()
    if watched.look() and not console.is_terminal:
        console.print(watched.history.headline(), markup=False, soft_wrap=True)

    def follow(look: Callable[[], None]) -> None:
        try:
            while not stop.wait(_EVERY):
                look()
            look()
        except (WorldloomError, OSError) as error:
            _log.warning("the view of %s stopped: %s", rounds, error)

    with _shown(watched, console) as look:
        thread = threading.Thread(target=follow, args=(look,), name="view of the rounds", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def picture(history: LedgerHistory, *, now: float, width: int) -> RenderableType:
    """Return the view of a history for a terminal of `width` columns at the time `now` (seconds since 1970)."""
    parts: list[RenderableType] = [Text(history.headline(), style="bold")]
    if history.current is not None:
        parts.append(_present(history, history.current, now))
    if any(round.median for round in history.rounds):
        parts.append(_past(history, width))
    return Group(*parts)


def _present(history: LedgerHistory, round: Round, now: float) -> Table:
    waiting = sum(round.state(name) == "waiting" for name in history.members)
    status = "done" if round.done else f"waiting for {waiting} of {len(history.members)}" if waiting else "judging"
    table = _table(f"round {round.number}: {status}")
    table.add_column("member", no_wrap=True)
    table.add_column("this round", overflow="fold", min_width=24)
    table.add_column("sent so far", justify="right", no_wrap=True)
    if history.private:
        budget = "" if history.budget is None else f" of {history.budget:g}"
        table.add_column(f"epsilon{budget}", justify="right", no_wrap=True)
    for name in history.members:
        state = round.state(name)
        cells = [Text(name), Text(_said(round, name, now), style=_STYLES[state]), Text(size(history.sent(name)))]
        table.add_row(*cells, *([Text(history.spent(name) or "-")] if history.private else []))
    return table


def _said(round: Round, name: str, now: float) -> str:
    state, one = round.state(name), round.contributions.get(name)
    if state == "contributed" and one is not None:
        return f"contributed {size(one.bytes)} after {duration(one.seconds)}"
    if state == "waiting":
        over = "" if round.began is None or round.done else f", {duration(now - round.began)}"
        return "did not answer" if round.done else f"waiting{over}"
    why = round.reason(name) or "no group of contributions passed the quality gate, so the base is unchanged"
    return textwrap.shorten(f"{state}: {why}", _REASON, placeholder=" ...")


def _past(history: LedgerHistory, width: int) -> Table:
    """Return the held-out losses of as many of the newest rounds as fit."""
    judged = [round for round in history.rounds if round.median]
    names = [name for name in history.members if any(name in round.losses for round in judged)]
    first = max(len(name) for name in ["median", *names])
    fit = max(1, (width - first - 4) // 16)
    shown = judged[-fit:]
    table = _table("held-out loss, before and after the round")
    table.add_column("member", no_wrap=True)
    for round in shown:
        table.add_column(f"round {round.number}", justify="right", no_wrap=True)
    for name in names:
        cells = [loss_change(*round.losses[name]) if name in round.losses else "-" for round in shown]
        table.add_row(Text(name), *map(Text, cells))
    if names:
        table.add_section()
    table.add_row("median", *(Text(loss_change(*round.median)) for round in shown if round.median))
    return table


def _table(title: str) -> Table:
    return Table(title=Text(title), title_justify="left", title_style="", header_style="bold")


@contextmanager
def _shown(watched: LedgerWatch, console: Console) -> Iterator[Callable[[], None]]:
    """Yield a function that reads the ledger and shows its new entries."""

    def draw() -> RenderableType:
        if not watched.history.rounds and not watched.ledger.exists():
            return Text(f"waiting for {watched.ledger}")
        return picture(watched.history, now=time.time(), width=console.width)

    if not console.is_terminal:

        def show() -> None:
            for line in watched.look():
                console.print(line, markup=False, soft_wrap=True)

        yield show
        return
    with Live(get_renderable=draw, console=console, refresh_per_second=2) as shown, _log_above():

        def look() -> None:
            if watched.look():
                shown.refresh()

        yield look


@contextmanager
def _log_above() -> Iterator[None]:
    """Write log lines above the live view."""
    handlers = [handler for handler in logging.getLogger().handlers if type(handler) is logging.StreamHandler]
    before = [handler.setStream(sys.stderr) for handler in handlers]
    try:
        yield
    finally:
        for handler, stream in zip(handlers, before, strict=True):
            if stream is not None:
                handler.setStream(stream)
