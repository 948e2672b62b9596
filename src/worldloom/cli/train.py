"""`worldloom train`: train a world model and its heads on a dataset."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from worldloom.cli.console import answer, progress
from worldloom.cli.options import Imports, Json, Overrides, Threads, import_modules, set_threads
from worldloom.core.errors import StorageError
from worldloom.core.processes import is_first


def train(
    data: Annotated[str, typer.Argument(help="The directory of the dataset, or its URI, such as s3://bucket/logs.")],
    out: Annotated[Path, typer.Option(help="The run folder to create, or to continue with --resume.")],
    recipe: Annotated[str, typer.Option(help="The name of a recipe; 'generic' fits any dataset.")] = "generic",
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted training run.")] = False,
    data_mode: Annotated[
        str,
        typer.Option(
            help="cache decodes all frames first, stream reads them while training, auto streams remote datasets."
        ),
    ] = "",
    cache_dir: Annotated[str, typer.Option(help="The local folder that caches streamed frames.")] = "",
    cache_gib: Annotated[float, typer.Option(help="The maximum size of that cache in GiB; 0 disables it.")] = -1.0,
    threads: Threads = 0,
    imports: Imports = None,
    json: Json = False,
) -> None:
    """Train a world model on a dataset, then its heads, its reactive policy and a cloned baseline."""
    from worldloom import workflow
    from worldloom.recipes import load_recipe

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # importing it sets it to INFO
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
    if is_first():  # the other processes of torchrun print nothing
        summary = run.summary()
        answer(json, summary, *(f"{name}: {value}" for name, value in summary.items()))
