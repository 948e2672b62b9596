"""`worldloom demo`: the complete workflow with a built-in recipe, from random motion to goals."""

import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from worldloom.cli.console import answer, progress
from worldloom.cli.options import Json, Overrides, Threads, set_threads


def demo(
    out: Annotated[Path, typer.Option(help="The folder of the demo; existing parts are reused.")] = Path("runs/demo"),
    recipe: Annotated[str, typer.Option(help="A recipe with a world that worldloom includes.")] = "two-room",
    seed: Annotated[int, typer.Option(help="The training seed.")] = 0,
    episodes: Annotated[int | None, typer.Option(min=1, help="Evaluation episodes in each split.")] = None,
    overrides: Overrides = None,
    threads: Threads = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="First delete the data and run of an earlier demo.")] = False,
    json: Json = False,
) -> None:
    """Collect random motion in Two Rooms, learn a world model from it, and reach goals it was never trained for."""
    from worldloom import workflow
    from worldloom.cli.evaluate import shown
    from worldloom.recipes import load_recipe

    set_threads(threads)
    start = time.perf_counter()
    if fresh:
        for part in ("data", "run"):  # only what a demo writes; the folder may contain other files
            shutil.rmtree(out / part, ignore_errors=True)
    config = load_recipe(recipe)
    seeds = [f"{part}.seed={seed}" for part in ("training", "collection") if getattr(config, part) is not None]
    config = config.override([*seeds, *(overrides or [])])
    bars = progress()
    workflow.collect(config, out / "data", progress=bars)
    run = workflow.train(config, out / "data", out / "run", resume=True, progress=bars)
    results = workflow.evaluate(run, episodes=episodes, progress=bars)
    answer(
        json,
        results.to_json(),
        *shown(results),
        f"report: {workflow.report_path(run, results)}",
        f"the complete demo took {time.perf_counter() - start:.0f} s",
    )
