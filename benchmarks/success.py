"""Measures the zero-shot success of a recipe with several training seeds, each collected and trained from scratch.

    python benchmarks/success.py two-room [--seeds 0 1 2] [--protocol NAME] [--methods NAME ... --name NAME]
        [--set KEY=VALUE ...]

Writes benchmarks/results/success-RECIPE.json; with `--protocol` success-PROTOCOL.json, and for some of the methods
success-NAME.json. The file contains the rows pooled over seeds (with 95% intervals, and the range over the models), the
seconds of each stage, and the hardware. Existing datasets and runs are reused, and interrupted ones are resumed.
"""

import argparse
import itertools
import json
import shlex
import time
from pathlib import Path

from worldloom import workflow
from worldloom.cli.console import print_table, progress
from worldloom.core.files import write_json
from worldloom.core.hardware import set_threads
from worldloom.data import EpisodeDataset
from worldloom.evaluation import Results, pool, table_rows
from worldloom.recipes import load_recipe

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--protocol", help="a protocol instead of the recipe's, such as two-room-25@1")
    parser.add_argument("--methods", nargs="+", help="methods of the recipe; all by default")
    parser.add_argument("--name", help="the name of the results, with --methods")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], help="override of the recipe")
    arguments = parser.parse_args()
    if bool(arguments.methods) != bool(arguments.name):
        parser.error("--methods and --name go together")
    set_threads(arguments.threads)
    all_results, seconds, heads, training, frames = [], [], [], [], []
    for seed in arguments.seeds:
        overrides = [f"training.seed={seed}", f"collection.seed={seed}", *arguments.set]
        recipe = load_recipe(arguments.recipe).override(overrides)
        folder = arguments.runs / f"{arguments.recipe}-{seed}"
        clock = [time.perf_counter()]
        workflow.collect(recipe, folder / "data", progress=progress())
        clock.append(time.perf_counter())
        run = workflow.train(recipe, folder / "data", folder / "run", resume=True, progress=progress())
        clock.append(time.perf_counter())
        there = run.path / "evaluation" / str(arguments.protocol or run.recipe.protocol) / "results.json"
        if there.is_file() and not arguments.methods:
            all_results.append(Results.read(there))
        else:
            options = {"protocol": arguments.protocol, "methods": arguments.methods}
            all_results.append(workflow.evaluate(run, **options, progress=progress()))
        clock.append(time.perf_counter())
        stages = [round(after - before, 1) for before, after in itertools.pairwise(clock)]
        seconds.append(dict(zip(("collect", "train", "evaluate"), stages, strict=True)))
        written = [(run.path / name).stat().st_mtime for name in ("provenance.json", "heads.json")]
        training.append(round((written[1] - written[0]) / 60, 1))
        frames.append(EpisodeDataset.open(folder / "data").frames)
        heads.append({name: value for name, value in run.figures.items() if name != "held_out"})
    pooled = pool(all_results)
    values = {
        "command": f"python benchmarks/success.py {arguments.recipe} --seeds {' '.join(map(str, arguments.seeds))}"
        + (f" --protocol {arguments.protocol}" if arguments.protocol else "")
        + (f" --methods {shlex.join(arguments.methods)} --name {arguments.name}" if arguments.methods else "")
        + "".join(f" --set {each}" for each in arguments.set),
        "planner": recipe.default_method,
        "seconds": seconds,
        "heads": heads,
        "training_minutes": training,
        "frames": frames,
        "table": table_rows(pooled),
        "hardware": all_results[0].hardware,
        "results": pooled.to_json(),
    }
    title = arguments.name or (arguments.protocol.split("@")[0] if arguments.protocol else arguments.recipe)
    write_json(RESULTS / f"success-{title}.json", json.loads(json.dumps(values, default=str)))
    header, *rows = table_rows(pooled)
    print_table(f"{arguments.recipe}: {len(arguments.seeds)} training seeds", header, rows)


if __name__ == "__main__":
    main()
