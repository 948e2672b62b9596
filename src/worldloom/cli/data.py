"""`worldloom data`: look into datasets."""

from pathlib import Path
from typing import Annotated

import typer

from worldloom.cli.options import Json

app = typer.Typer(help="Inspect, validate and preview datasets.", no_args_is_help=True)
Dataset = Annotated[Path, typer.Argument(help="The dataset's directory.")]


@app.command()
def inspect(path: Dataset, json: Json = False) -> None:
    """Say what a dataset holds."""
    from worldloom.cli.console import print_json, print_table
    from worldloom.data import EpisodeDataset, inspect

    summary = inspect(EpisodeDataset.open(path))
    if json:
        print_json(summary)
    else:
        print_table(str(path), ["", "value"], [[key, str(value)] for key, value in summary.items()])


@app.command()
def validate(path: Dataset, json: Json = False) -> None:
    """Check every episode; exit code 3 if anything is wrong."""
    from dataclasses import asdict

    from worldloom.cli.console import print_json, print_table, say
    from worldloom.core.errors import DataError
    from worldloom.data import validate

    problems = validate(path)
    if json:
        print_json([asdict(problem) for problem in problems])
    elif problems:
        rows = [[problem.where, problem.what, problem.remedy] for problem in problems]
        print_table(f"{len(problems)} problems in {path}", ["where", "what", "remedy"], rows)
    else:
        say(f"{path}: no problem found")
    if problems:
        raise typer.Exit(DataError.exit_code)


@app.command()
def preview(
    path: Dataset,
    out: Annotated[Path | None, typer.Option(help="Where to write; beside the dataset by default.")] = None,
) -> None:
    """Write a contact sheet (PNG) and a video (MP4)."""
    from worldloom.cli.console import say
    from worldloom.data import EpisodeDataset, contact_sheet, video

    dataset = EpisodeDataset.open(path)
    target = out or path.parent
    for write, name in ((contact_sheet, f"{path.name}.png"), (video, f"{path.name}.mp4")):
        write(dataset, target / name)
        say(f"wrote {target / name}")
