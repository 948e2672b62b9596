"""`worldloom train`: a world model, and what plans with it, from a dataset."""

from pathlib import Path
from typing import Annotated

import typer

from worldloom.cli.options import Imports, Json, Overrides, Threads, import_modules, set_threads


def train(
    data: Annotated[Path, typer.Argument(help="The dataset's directory.")],
    out: Annotated[Path, typer.Option(help="The run folder to make, or to take up with --resume.")],
    recipe: Annotated[str, typer.Option(help="A recipe's name; 'generic' fits any dataset.")] = "generic",
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Take up a run that was interrupted.")] = False,
    threads: Threads = 0,
    imports: Imports = None,
    json: Json = False,
) -> None:
    """Train a world model on a dataset, then its distance, its reactive policy and the baseline of the same data."""
    from worldloom.cli.console import print_json, progress, say
    from worldloom.recipes import load_recipe, workflow

    import_modules(imports)
    set_threads(threads)
    config = load_recipe(recipe).override(overrides or [])
    run = workflow.train(config, data, out, resume=resume, progress=progress())
    summary = run.summary()
    if json:
        print_json(summary)
    else:
        for name, value in summary.items():
            say(f"{name}: {value}")
