"""`worldloom runs`: list, show and compare run folders."""

from pathlib import Path
from typing import Annotated

import typer

from worldloom.cli.console import answer, table, values_table
from worldloom.cli.options import Json
from worldloom.core.errors import ConfigError, WorldloomError

app = typer.Typer(help="List, show and compare run folders.", no_args_is_help=True)


@app.command("list")
def list_runs(
    root: Annotated[Path, typer.Argument(help="The folder that contains run folders.")] = Path("runs"),
    json: Json = False,
) -> None:
    """List the runs below a folder, including damaged ones."""
    from worldloom.workflow import find_runs

    summaries, damaged = [], []
    for run in find_runs(root):
        try:
            summaries.append(run.summary())
        except WorldloomError as error:
            damaged.append({"run": str(run.path), "error": str(error)})
    columns = ("run", "recipe", "steps", "prediction", "effective_rank", "success", "evaluation")
    rows = [[str(summary.get(column, "")) for column in columns] for summary in summaries]
    left_out = [f"{entry['run']} is left out: {entry['error']}" for entry in damaged]
    answer(json, [*summaries, *damaged], table(f"{len(rows)} runs below {root}", columns, rows), *left_out)


@app.command()
def show(run: Annotated[Path, typer.Argument(help="A run folder.")], json: Json = False) -> None:
    """Show the figures, configuration and provenance of a run."""
    from worldloom.workflow import Run

    opened = Run.open(run)
    description = {"summary": opened.summary(), "config": opened.folder.config, "provenance": opened.folder.provenance}
    answer(json, description, *(values_table(title, dict(_flat(values))) for title, values in description.items()))


@app.command()
def compare(runs: Annotated[list[Path], typer.Argument(help="Two or more run folders.")], json: Json = False) -> None:
    """Show the settings and figures that differ between runs, side by side."""
    from worldloom.workflow import Run

    if len(runs) < 2:
        raise ConfigError(f"expected at least two run folders to compare; got only {runs[0]}. Add another run folder")
    columns = []
    for path in runs:
        opened = Run.open(path)
        columns.append(dict(_flat({"config": opened.folder.config, "summary": opened.summary()})))
    names = list(dict.fromkeys(name for column in columns for name in column))
    differing = [name for name in names if len({str(column.get(name, "-")) for column in columns}) > 1]
    rows = [[name, *(str(column.get(name, "-")) for column in columns)] for name in differing]
    answer(
        json,
        {name: [column.get(name) for column in columns] for name in differing},
        table("differences", ["", *map(str, runs)], rows),
    )


def _flat(values: object, prefix: str = "") -> list[tuple[str, object]]:
    if isinstance(values, dict) and values:
        return [
            item for key, value in values.items() for item in _flat(value, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, values)]
