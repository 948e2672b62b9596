"""`worldloom demo`: the main job on an embedded default, from aimless motion to goals."""

import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from worldloom.cli.console import answer, progress
from worldloom.cli.options import Json, Overrides, Threads, set_threads


def demo(
    out: Annotated[Path, typer.Option(help="The folder of the demo; existing parts are reused.")] = Path("runs/demo"),
    recipe: Annotated[str, typer.Option(help="A recipe whose world ships with worldloom.")] = "two-room",
    seed: Annotated[int, typer.Option(help="The training seed.")] = 0,
    episodes: Annotated[int | None, typer.Option(min=1, help="Evaluation episodes in each split.")] = None,
    overrides: Overrides = None,
    threads: Threads = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="First delete what an earlier demo wrote there.")] = False,
    json: Json = False,
) -> None:
    """Collect aimless motion in Two Rooms, learn a world model from it, and reach goals it was never trained for."""
    from worldloom import workflow
    from worldloom.cli.evaluate import shown
    from worldloom.recipes import load_recipe

    set_threads(threads)
    start = time.perf_counter()
    if fresh:
        for part in ("data", "run"):  # what a demo makes, and nothing else that may lie there
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
        f"the whole demo took {time.perf_counter() - start:.0f} s",
    )
