"""`worldloom demo`: the main job on an embedded default, from aimless motion to goals."""

from pathlib import Path
from typing import Annotated

import typer

from worldloom.cli.options import Json, Overrides, Threads, set_threads


def demo(
    out: Annotated[Path, typer.Option(help="The run folder; what is there already is taken up.")] = Path("runs/demo"),
    recipe: Annotated[str, typer.Option(help="A recipe whose world ships with worldloom.")] = "two-room",
    seed: Annotated[int, typer.Option(help="The training seed.")] = 0,
    overrides: Overrides = None,
    threads: Threads = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the run folder first.")] = False,
    json: Json = False,
) -> None:
    """Collect aimless motion in Two Rooms, learn a world model from it, and reach goals it was never trained for."""
    import shutil
    import time

    from worldloom.cli.console import out as console
    from worldloom.cli.console import print_json, progress
    from worldloom.cli.evaluate import show
    from worldloom.recipes import load_recipe, workflow

    set_threads(threads)
    start = time.perf_counter()
    if fresh:
        shutil.rmtree(out, ignore_errors=True)
    config = load_recipe(recipe).override([f"training.seed={seed}", f"collection.seed={seed}", *(overrides or [])])
    bars = progress()
    workflow.collect(config, out / "data", progress=bars)
    run = workflow.train(config, out / "data", out / "run", resume=True, progress=bars)
    results = workflow.evaluate(run, progress=bars)
    if json:
        print_json(results.to_json())
        return
    show(results)
    console.print(f"report: {workflow.report_path(run, results)}")
    console.print(f"the whole demo took {time.perf_counter() - start:.0f} s")
