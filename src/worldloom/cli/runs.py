"""`worldloom runs`: what was trained, and how runs compare."""

from pathlib import Path
from typing import Annotated

import typer

from worldloom.cli.options import Json

app = typer.Typer(help="List, show and compare run folders.", no_args_is_help=True)


@app.command("list")
def list_runs(
    root: Annotated[Path, typer.Argument(help="The folder that holds run folders.")] = Path("runs"), json: Json = False
) -> None:
    """List the runs below a folder; a damaged one is named beside the others."""
    from worldloom.cli.console import print_json, print_table, say
    from worldloom.core.errors import WorldloomError
    from worldloom.workflow import find_runs

    summaries, damaged = [], []
    for run in find_runs(root):
        try:
            summaries.append(run.summary())
        except WorldloomError as error:
            damaged.append({"run": str(run.path), "error": str(error)})
    if json:
        print_json([*summaries, *damaged])
        return
    columns = ("run", "recipe", "steps", "prediction", "effective_rank", "success", "evaluation")
    rows = [[str(summary.get(column, "")) for column in columns] for summary in summaries]
    print_table(f"{len(rows)} runs below {root}", columns, rows)
    for entry in damaged:
        say(f"{entry['run']} is left out: {entry['error']}")


@app.command()
def show(run: Annotated[Path, typer.Argument(help="A run folder.")], json: Json = False) -> None:
    """Show a run's figures, configuration and provenance."""
    from worldloom.cli.console import print_json, print_table
    from worldloom.workflow import Run

    opened = Run.open(run)
    description = {"summary": opened.summary(), "config": opened.folder.config, "provenance": opened.folder.provenance}
    if json:
        print_json(description)
        return
    for title, values in description.items():
        print_table(title, ["", "value"], [[name, str(value)] for name, value in _flat(values)])


@app.command()
def compare(runs: Annotated[list[Path], typer.Argument(help="Two or more run folders.")], json: Json = False) -> None:
    """Show where runs differ: settings and figures side by side."""
    from worldloom.cli.console import print_json, print_table
    from worldloom.core.errors import ConfigError
    from worldloom.workflow import Run

    if len(runs) < 2:
        raise ConfigError(f"nothing to compare {runs[0]} with; name two or more run folders")
    columns = []
    for path in runs:
        opened = Run.open(path)
        columns.append(dict(_flat({"config": opened.folder.config, "summary": opened.summary()})))
    names = list(dict.fromkeys(name for column in columns for name in column))
    differing = [name for name in names if len({str(column.get(name, "-")) for column in columns}) > 1]
    if json:
        print_json({name: [column.get(name) for column in columns] for name in differing})
        return
    rows = [[name, *(str(column.get(name, "-")) for column in columns)] for name in differing]
    print_table("where the runs differ", ["", *map(str, runs)], rows)


def _flat(values: object, prefix: str = "") -> list[tuple[str, object]]:
    if isinstance(values, dict) and values:
        return [
            item for key, value in values.items() for item in _flat(value, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, values)]
