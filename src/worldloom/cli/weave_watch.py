"""The rounds of a consortium as they run: a table that grows in a terminal, plain lines elsewhere."""

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
from worldloom.federation import Constitution, Round, Story, Watch, duration, loss_change, size

_log = logging.getLogger(__name__)
_EVERY = 0.5  # seconds between two looks at the ledger
_STYLES = {"waiting": "dim", "contributed": "green", "refused": "red", "left out": "yellow"}
_REASON = 160  # characters of a reason in the table; lines and the report have all of it


def watch(
    rounds: Path, constitution: Constitution | None = None, *, once: bool = False, console: Console = out
) -> None:
    """Show the rounds in a folder until the last is done, or Ctrl-C; with `once`, what there is now.

    Raises:
        StorageError: `once`, and there is no ledger.
        DataError: the ledger does not verify, or is of another constitution.
    """
    watched = Watch(rounds, constitution)
    if once:
        with storage_errors(watched.ledger):
            watched.ledger.stat()
    with suppress(KeyboardInterrupt), _shown(watched, console) as look:
        look()
        if not console.is_terminal and not watched.ledger.exists():
            console.print(f"waiting for {watched.ledger}", markup=False, soft_wrap=True)
        while not once and not watched.story.done:
            time.sleep(_EVERY)
            look()


def watch_json(rounds: Path, constitution: Constitution | None = None, *, once: bool = False) -> None:
    """Print one JSON line for each change until the last round is done, or Ctrl-C; with `once`, one present state.

    Raises:
        StorageError, DataError: see `watch`.
    """
    watched = Watch(rounds, constitution)
    if once:
        with storage_errors(watched.ledger):
            watched.ledger.stat()
        watched.look()
        answer(True, {**asdict(watched.story), "done": watched.story.done})
        return
    with suppress(KeyboardInterrupt):
        while not watched.story.done:
            for line in watched.look():
                sys.stdout.write(json.dumps({"event": line, "done": watched.story.done}) + "\n")
                sys.stdout.flush()
            time.sleep(0 if watched.story.done else _EVERY)


@contextmanager
def live(rounds: Path, constitution: Constitution | None = None, *, console: Console = err) -> Iterator[None]:
    """Show the rounds in a folder while the body, in this process, runs them; a thread looks at the ledger.

    What stood there before is told in one line. The view never stops the work: of what it cannot read, the log says so.
    Two live pictures do not share a terminal: hand the work no progress bars of its own.

    Raises:
        DataError: the ledger that is there does not verify, or is of another constitution.
    """
    watched, stop = Watch(rounds, constitution), threading.Event()
    if watched.look() and not console.is_terminal:
        console.print(watched.story.headline(), markup=False, soft_wrap=True)

    def follow(look: Callable[[], None]) -> None:
        try:
            while not stop.wait(_EVERY):
                look()
            look()
        except (WorldloomError, OSError) as error:
            _log.warning("the view of %s ends here: %s", rounds, error)

    with _shown(watched, console) as look:
        thread = threading.Thread(target=follow, args=(look,), name="view of the rounds", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def picture(story: Story, *, now: float, width: int) -> RenderableType:
    """Return what a terminal of so many columns shows of a story at a time (in seconds since 1970)."""
    parts: list[RenderableType] = [Text(story.headline(), style="bold")]
    if story.present is not None:
        parts.append(_present(story, story.present, now))
    if any(round.middle for round in story.rounds):
        parts.append(_past(story, width))
    return Group(*parts)


def _present(story: Story, round: Round, now: float) -> Table:
    waiting = sum(round.state(name) == "waiting" for name in story.members)
    how_far = "woven" if round.woven else f"waiting for {waiting} of {len(story.members)}" if waiting else "judging"
    table = _table(f"round {round.number}: {how_far}")
    table.add_column("member", no_wrap=True)
    table.add_column("this round", overflow="fold", min_width=24)
    table.add_column("sent so far", justify="right", no_wrap=True)
    if story.private:
        budget = "" if story.budget is None else f" of {story.budget:g}"
        table.add_column(f"epsilon{budget}", justify="right", no_wrap=True)
    for name in story.members:
        state = round.state(name)
        cells = [Text(name), Text(_said(round, name, now), style=_STYLES[state]), Text(size(story.sent(name)))]
        table.add_row(*cells, *([Text(story.spent(name) or "-")] if story.private else []))
    return table


def _said(round: Round, name: str, now: float) -> str:
    state, one = round.state(name), round.contributions.get(name)
    if state == "contributed" and one is not None:
        return f"contributed {size(one.bytes)} after {duration(one.seconds)}"
    if state == "waiting":
        over = "" if round.began is None or round.woven else f", {duration(now - round.began)}"
        return "did not answer" if round.woven else f"waiting{over}"
    why = round.reason(name) or "nothing that came was good enough, the base stays as it was"
    return textwrap.shorten(f"{state}: {why}", _REASON, placeholder=" ...")


def _past(story: Story, width: int) -> Table:
    """Return the held-out losses of the newest rounds, as many as fit side by side."""
    judged = [round for round in story.rounds if round.middle]
    names = [name for name in story.members if any(name in round.losses for round in judged)]
    first = max(len(name) for name in ["in the middle", *names])
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
    table.add_row("in the middle", *(Text(loss_change(*round.middle)) for round in shown if round.middle))
    return table


def _table(title: str) -> Table:
    return Table(title=Text(title), title_justify="left", title_style="", header_style="bold")


@contextmanager
def _shown(watched: Watch, console: Console) -> Iterator[Callable[[], None]]:
    """Yield a function that looks at the ledger and shows what is new."""

    def draw() -> RenderableType:
        if not watched.story.rounds and not watched.ledger.exists():
            return Text(f"waiting for {watched.ledger}")
        return picture(watched.story, now=time.time(), width=console.width)

    if not console.is_terminal:

        def tell() -> None:
            for line in watched.look():
                console.print(line, markup=False, soft_wrap=True)

        yield tell
        return
    with Live(get_renderable=draw, console=console, refresh_per_second=2) as shown, _log_above():

        def look() -> None:
            if watched.look():
                shown.refresh()

        yield look


@contextmanager
def _log_above() -> Iterator[None]:
    """Send the log's lines through the stream that a live picture put in place, which keeps itself below them."""
    handlers = [handler for handler in logging.getLogger().handlers if type(handler) is logging.StreamHandler]
    before = [handler.setStream(sys.stderr) for handler in handlers]
    try:
        yield
    finally:
        for handler, stream in zip(handlers, before, strict=True):
            if stream is not None:
                handler.setStream(stream)
