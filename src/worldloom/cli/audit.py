"""`worldloom audit`: what an agent decided, that nobody has changed the record, and the decision made again."""

from pathlib import Path
from typing import Annotated

import typer

from worldloom.cli.options import Imports, Json, import_modules

app = typer.Typer(help="Verify, show and replay the decisions of an agent.", no_args_is_help=True)

Log = Annotated[Path, typer.Argument(help="An audit log: the directory that --audit named.")]


@app.command()
def verify(
    log: Log,
    kept: Annotated[
        str | None,
        typer.Option(
            metavar="LENGTH:HASH", help="The head that verify printed earlier: shows whether the end was cut."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Check every entry and every situation; the first that was changed is named, and the exit code is 3."""
    from worldloom.agents import damaged_situations, log_path
    from worldloom.cli.console import print_json, say
    from worldloom.core import chain
    from worldloom.core.errors import ConfigError, DataError

    head = None
    if kept is not None:
        length, colon, digest = kept.partition(":")
        if not colon or not length.isdigit():
            raise ConfigError(f"--kept is LENGTH:HASH, as verify prints it; got {kept!r}")
        head = chain.Head(length=int(length), hash=digest)
    verdict = chain.verify(log_path(log), kept=head)
    if verdict.broken is not None:
        raise DataError(f"{log}: entry {verdict.broken} {verdict.why}")
    if damaged := damaged_situations(log):
        raise DataError(f"{log}: what entry {damaged[0]} followed from is gone or was changed")
    if json:
        print_json({"length": verdict.length, "hash": verdict.head.hash})
        return
    say(f"{log}: all {verdict.length} entries are whole")
    say(f"to know later that none was cut off its end, keep {verdict.length}:{verdict.head.hash}")


@app.command()
def show(
    log: Log,
    entry: Annotated[int | None, typer.Option(min=0, help="One entry in full; by default a line for each.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Where to write what was seen at that entry (PNG).")] = None,
    json: Json = False,
) -> None:
    """Show what was decided, entry by entry, each verified as it is read."""
    from worldloom.agents import log_path, read_situation
    from worldloom.cli.console import print_json, print_table
    from worldloom.core.chain import entries
    from worldloom.core.errors import ConfigError, DataError

    if picture is not None and entry is None:
        raise ConfigError("--picture goes with --entry, whose picture it is")
    chosen = [each for each in entries(log_path(log)) if entry in (None, each.index)]
    if entry is not None and not chosen:
        raise DataError(f"{log} has no entry {entry}")
    if picture is not None:
        from PIL import Image

        observations, _ = read_situation(log, chosen[0])
        if observations.pixels is None:
            raise DataError(f"entry {entry} was decided without a picture")
        Image.fromarray(observations.pixels[0].numpy()).save(picture, format="PNG")
    if json:
        print_json([{"index": each.index, "time": each.time, **each.body} for each in chosen])
        return
    if entry is not None:
        print_table(f"entry {entry}", ["", "value"], [[name, str(value)] for name, value in chosen[0].body.items()])
        return
    rows = []
    for each in chosen:
        body = each.body
        worst = body.get("violations") or {}
        margins = ", ".join(
            f"{name} {values[0]:+.3g}" for name, values in worst.items() if values and values[0] is not None
        )
        rows.append([str(each.index), str(body["event"]), margins, str(body.get("refused", ""))])
    print_table(str(log), ["entry", "event", "worst violation (first environment)", "refused"], rows)


@app.command("replay")
def replay_entry(
    log: Log,
    entry: Annotated[int, typer.Option(min=0, help="Which decision.")],
    run: Annotated[Path | None, typer.Option(help="The run, where it has been moved since.")] = None,
    imports: Imports = None,
    json: Json = False,
) -> None:
    """Make a past decision again, as the log says it was made; the exit code is 3 where it is not the same."""
    from worldloom.cli.console import print_json, say
    from worldloom.core.errors import DataError
    from worldloom.workflow import replay_entry as again

    import_modules(imports)
    plan, same, body = again(log, entry, run=run)
    first = plan.actions[:, 0].tolist()
    if json:
        print_json({"same": same, "first": first, "logged": body["first"]})
    if not same:
        raise DataError(
            f"{log}: entry {entry} comes out otherwise: first actions {first}, logged {body['first']}. It was made on "
            f"another machine, with another number of threads or another version, or is not what was done"
        )
    if not json:
        say(f"entry {entry}: the same bit for bit: actions, predictions and violations")
