"""`worldloom train`: a world model, and what plans with it, from a dataset."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from worldloom.cli.options import Imports, Json, Overrides, Threads, import_modules, set_threads
from worldloom.core.errors import StorageError
from worldloom.core.processes import is_first


def train(
    data: Annotated[str, typer.Argument(help="The dataset's directory, or its URI, such as s3://bucket/logs.")],
    out: Annotated[Path, typer.Option(help="The run folder to make, or to take up with --resume.")],
    recipe: Annotated[str, typer.Option(help="A recipe's name; 'generic' fits any dataset.")] = "generic",
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Take up a run that was interrupted.")] = False,
    data_mode: Annotated[
        str, typer.Option(help="cache: decode all first; stream: read while training; auto: stream what is remote.")
    ] = "",
    cache_dir: Annotated[str, typer.Option(help="Where what is streamed is kept on the local disk.")] = "",
    cache_gib: Annotated[float, typer.Option(help="How much of it at most, in GiB; 0 keeps none.")] = -1.0,
    threads: Threads = 0,
    imports: Imports = None,
    json: Json = False,
) -> None:
    """Train a world model on a dataset, then its distance, its reactive policy and the baseline of the same data."""
    from worldloom import workflow
    from worldloom.cli.console import print_json, progress, say
    from worldloom.recipes import load_recipe

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it sets itself to INFO when it is imported
    import_modules(imports)
    set_threads(threads)
    options = {
        "mode": data_mode or None,
        "cache_dir": cache_dir or None,
        "cache_gib": cache_gib if cache_gib >= 0 else None,
    }
    reading = [f"data.{name}={value}" for name, value in options.items() if value is not None]
    config = load_recipe(recipe).override([*reading, *(overrides or [])])
    try:
        run = workflow.train(config, data, out, resume=resume, progress=progress())
    except StorageError as error:
        if "disk is full" in str(error) and not resume:
            raise StorageError(
                str(error).replace("the same command again", "the same command with --resume")
            ) from error
        raise
    if not is_first():  # the others of torchrun are silent
        return
    summary = run.summary()
    if json:
        print_json(summary)
    else:
        for name, value in summary.items():
            say(f"{name}: {value}")
