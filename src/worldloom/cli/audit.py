"""`worldloom audit`: verify, show and replay the recorded decisions of an agent."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from worldloom.cli.console import answer, err, progress, table, values_table
from worldloom.cli.options import Imports, Json, import_modules
from worldloom.core import chain
from worldloom.core.errors import ConfigError, DataError
from worldloom.core.files import require_writable, write_atomic

app = typer.Typer(help="Verify, show and replay the decisions of an agent.", no_args_is_help=True)

Log = Annotated[Path, typer.Argument(help="An audit log: the directory that was given to --audit.")]


@app.command()
def verify(
    log: Log,
    kept: Annotated[
        str | None,
        typer.Option(metavar="LENGTH:HASH", help="The head that an earlier verify printed; detects truncation."),
    ] = None,
    json: Json = False,
) -> None:
    """Check every entry and situation; if one is missing or was changed, report the first one and exit with code 3.

    What this command cannot check is written to standard error.
    """
    from worldloom.agents import damaged_situations, log_path

    head = None if kept is None else _head(kept)
    bars = progress()
    verdict = chain.verify(log_path(log), kept=head, progress=bars)
    if verdict.broken is not None:
        raise DataError(f"{log}: entry {verdict.broken} {verdict.why}; restore the log from an intact copy")
    if damaged := damaged_situations(log, progress=bars):
        raise DataError(
            f"{log}: the recorded situation of entry {damaged[0]} is missing or was changed. "
            f"Restore the file in situations/ from a copy"
        )
    if not verdict.head.length:
        raise DataError(f"{log} has no entries; a complete log has at least one. Restore the log from an intact copy")
    unknown = _unknown(log, verdict.head, head)
    _tell_unchecked(unknown)
    answer(
        json,
        {"length": verdict.head.length, "hash": verdict.head.hash, "not checked": unknown},
        f"{log}: the {verdict.head.length} entries that are present are intact",
        f"keep {verdict.head.length}:{verdict.head.hash} in another place; 'verify --kept' detects truncation with it",
    )


def _tell_unchecked(lines: Sequence[str]) -> None:
    for line in lines:
        err.print(f"NOT CHECKED: {line}", style="bold yellow", markup=False, soft_wrap=True)


def _unknown(log: Path, head: chain.ChainHead, kept: chain.ChainHead | None) -> list[str]:
    """Return descriptions of what a verification cannot check."""
    from worldloom.agents import unrecorded_situations

    found = []
    if kept is None:
        found.append(
            "whether entries were cut off at the end, or the whole log was rewritten. A log alone cannot show that; "
            "pass --kept LENGTH:HASH, the head that an earlier verify printed"
        )
    elif kept.length < head.length:
        found.append(f"whether entries were cut off after entry {head.length - 1}; the kept head covers {kept.length}")
    if count := unrecorded_situations(log):
        found.append(
            f"{count} files in situations/ belong to no entry. Either the entries were removed, or the writing process "
            f"was killed between two writes"
        )
    found.append("whether the entries were true when they were written; 'worldloom audit replay' repeats a decision")
    return found


def _head(text: str) -> chain.ChainHead:
    parts = re.fullmatch("([1-9][0-9]{0,15}):([0-9a-f]{64})", text.strip().lower())
    if parts is None:
        raise ConfigError(
            f"expected --kept LENGTH:HASH, as an earlier 'worldloom audit verify' printed it; got {text!r}"
        )
    return chain.ChainHead(length=int(parts[1]), hash=parts[2])


@app.command()
def show(
    log: Log,
    entry: Annotated[
        int | None, typer.Option(min=0, help="Show this entry in full; by default, one line for each entry.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Write the frame that the agent observed at --entry (PNG).")
    ] = None,
    json: Json = False,
) -> None:
    """Show the decisions, entry by entry; each entry is verified."""
    from worldloom.agents import DecidedBody, log_entries, parse_body, read_situation

    if picture is not None:
        require_writable(picture)
    if picture is not None and entry is None:
        raise ConfigError("--picture needs an entry; add --entry NUMBER")
    chosen = [each for each in log_entries(log) if entry in (None, each.index)]
    if entry is not None and not chosen:
        raise DataError(f"{log} has no entry {entry}; run 'worldloom audit show' without --entry to list them")
    if picture is not None:
        from worldloom.data import encode_picture, to_rgb

        observations, _ = read_situation(log, chosen[0])
        if observations.pixels is None or not observations.pixels.numel():
            raise DataError(f"entry {entry} has no picture, because its observation has no pixels; leave out --picture")
        content = encode_picture(to_rgb(observations.pixels[0].numpy()))
        write_atomic(picture, lambda temporary: temporary.write_bytes(content))
    found = [{"index": each.index, "time": each.time, **each.body} for each in chosen]
    if entry is not None:
        answer(json, found, values_table(f"entry {entry}", chosen[0].body))
        return
    rows = []
    for each in chosen:
        margins = refused = ""
        if each.body["event"] == "decided":
            body = parse_body(each, DecidedBody)
            margins = ", ".join(
                f"{name} {values[0]:+.3g}"
                for name, values in body.violations.items()
                if values and values[0] is not None
            )
            refused = str(body.refused)
        rows.append([str(each.index), str(each.body["event"]), margins, refused])
    answer(json, found, table(str(log), ["entry", "event", "worst violation (first environment)", "refused"], rows))


@app.command("replay")
def replay_entry(
    log: Log,
    entry: Annotated[int, typer.Option(min=0, help="The entry of the decision.")],
    run: Annotated[Path | None, typer.Option(help="The run folder, if it was moved.")] = None,
    imports: Imports = None,
    json: Json = False,
) -> None:
    """Repeat a recorded decision; the exit code is 3 if the result differs."""
    from worldloom.workflow import replay_entry as again

    import_modules(imports)
    found = again(log, entry, run=run, progress=progress())
    _tell_unchecked(found.unchecked)
    if json or not found.differ:
        value = {"same": not found.differ, "differ": found.differ, "not checked": found.unchecked}
        first = {"first": found.plan.actions[:, 0].tolist(), "logged": found.body["first"]}
        line = f"entry {entry}: the repeated decision equals the entry bit for bit, and the observation fits its state"
        answer(json, value | first, line)
    if found.differ:
        raise DataError(
            f"{log}: the replay of entry {entry} differs in: {', '.join(found.differ)}. Repeat the replay on the same "
            f"machine, with the same versions and number of threads. If it still differs, the log's entry is false"
        )
