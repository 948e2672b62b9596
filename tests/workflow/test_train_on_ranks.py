"""The whole `worldloom train` on two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from worldloom import workflow
from worldloom.core.files import read_json, write_json
from worldloom.recipes import load_recipe
from worldloom.workflow import Run, collect

TINY = [
    "collection.episodes=12",
    "collection.steps=40",
    "training.steps=6",
    "training.log_every=1",
    "training.validation_windows=16",
    "training.validation_share=0.2",
    "training.accelerator=cpu",
    "inverse.steps=4",
    "distance.steps=4",
    "reactive.steps=4",
    "reactive.problems=16",
    'goal_inverse={"steps": 4}',
    "cloning.steps=4",
]

pytestmark = pytest.mark.slow


def torchrun(
    data: Path, out: Path, *options: str, overrides: tuple[str, ...] = ()
) -> "subprocess.CompletedProcess[str]":
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    values = [part for value in (*TINY, "training.devices=2", *overrides) for part in ("--set", value)]
    command = ["-m", "worldloom", "train", str(data), "--recipe", "two-room", "--out", str(out), *values, *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *command], env=environment, capture_output=True, text=True, timeout=100, check=False
    )


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in run.folder.metrics() if "loss" in line]


def test_two_processes_make_one_run_that_can_be_taken_up(tmp_path: Path) -> None:
    recipe = load_recipe("two-room").override(TINY)
    data, out = tmp_path / "data", tmp_path / "run"
    collect(recipe, data)

    done = torchrun(data, out)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("recipe: two-room") == 1
    assert done.stderr.count("training: 6/6") == 1
    run = Run.open(out)
    assert run.figures["complete"]
    assert run.recipe.training.devices == 2
    alone = workflow.train(recipe, data, tmp_path / "alone")
    assert losses(run) == pytest.approx(losses(alone), rel=1e-3)

    again = torchrun(data, out)
    assert again.returncode
    assert again.stderr.count("already contains a run; resume it (--resume)") == 1
    assert "exitcode  : 4" in again.stderr

    # As if it had been killed while the last part beside the world model was learned; a free setting changes.
    figures = read_json(out / "heads.json")
    unfinished = {name: value for name, value in figures.items() if name not in ("complete", "cloning_seconds")}
    write_json(out / "heads.json", unfinished)
    (out / "heads" / "cloning.json").unlink()
    resumed = torchrun(data, out, "--resume", overrides=("training.log_every=2",))
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert run.figures["complete"]
    assert run.figures.keys() == figures.keys()
    assert run.figures["distance_seconds"] == figures["distance_seconds"]
    assert Run.open(out).recipe.training.log_every == 2
