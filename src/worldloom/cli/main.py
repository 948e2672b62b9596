"""The `worldloom` command: assembles the command groups and converts errors to messages and exit codes."""

import logging
import sys
import traceback
from types import TracebackType

import typer

from worldloom import __version__
from worldloom.cli import (
    audit,
    calibrate,
    collect,
    data,
    demo,
    deploy,
    doctor,
    evaluate,
    explore,
    memory,
    plan,
    rules,
    runs,
    train,
    weave,
)
from worldloom.cli.console import SafeFormatter
from worldloom.core.errors import StorageError, WorldloomError
from worldloom.core.processes import is_first
from worldloom.core.text import one_line, printable

app = typer.Typer(
    name="worldloom",
    help="Learn how a world works from reward-free logs, then plan in representation space.",
    epilog="Exit codes: 0 done, 1 other failure, 2 usage or configuration, 3 data, 4 storage, 5 checkpoint, "
    "6 environment, 7 training, 8 planning, 9 no plan that satisfies every guardrail, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(show: bool) -> bool:
    if show:
        typer.echo(f"worldloom {__version__}")
        raise typer.Exit
    return show


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Show the library's log."),
    debug: bool = typer.Option(False, "--debug", help="Show the full traceback of an error."),
) -> None:
    level = logging.INFO if verbose or debug else logging.WARNING
    # If torchrun starts several processes, only the first one logs below the level ERROR.
    logging.basicConfig(level=level if is_first() else logging.ERROR)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(SafeFormatter("%(levelname)s %(message)s"))
    if debug:
        logging.getLogger("worldloom").setLevel(logging.DEBUG)


app.command("demo")(demo.demo)
app.command("collect")(collect.collect)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("explore")(explore.explore)
app.command("plan")(plan.plan)
app.command("calibrate")(calibrate.calibrate)
app.command("deploy")(deploy.deploy)
app.command("doctor")(doctor.doctor)
app.add_typer(audit.app, name="audit")
app.add_typer(data.app, name="data")
app.add_typer(memory.app, name="memory")
app.add_typer(rules.app, name="rules")
app.add_typer(runs.app, name="runs")
app.add_typer(weave.app, name="weave")


def _unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(printable("".join(traceback.format_exception(kind, error, trace))))


def main() -> None:
    """Run the command line; each expected failure is one message on standard error and an exit code."""
    sys.excepthook = _unexpected
    try:
        app(prog_name="worldloom")
    except (WorldloomError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        typer.secho(f"error: {one_line(str(error))}", fg="red", err=True)
        sys.exit(error.exit_code if isinstance(error, WorldloomError) else StorageError.exit_code)
    except MemoryError as error:
        if "--debug" in sys.argv:
            raise
        typer.secho(
            f"error: there is not enough memory ({one_line(str(error))}); check that no file is larger "
            f"than it should be, or close other programs",
            fg="red",
            err=True,
        )
        sys.exit(StorageError.exit_code)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != 130:  # Typer's code for Ctrl-C
            raise
        typer.secho("interrupted: data and training progress so far are kept", fg="yellow", err=True)
        sys.exit(130)
