"""Training on two processes that talk over Gloo ends as training on one; compiled training too."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_blobs import MODEL

from worldloom.models import load_model
from worldloom.training import RunFolder, saved_steps

HERE = Path(__file__).parent
ALL_LOSSES = [f'losses.{name}={{"name": "{name}", "weight": 0.1}}' for name in ("straightening", "sigreg")] + [
    'losses.centred={"name": "variance", "weight": 0.5, "samples": "centred"}'
]

pytestmark = pytest.mark.slow


def start(path: Path, *options: str, ranks: int = 1) -> "subprocess.CompletedProcess[str]":
    """Train in processes of their own; see `train_ranks.py`."""
    # PyTorch's compiler warns about itself.
    strict = [] if "compile=true" in options else ["-W", "error::UserWarning"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    options = (*options, f"devices={ranks}")
    return subprocess.run(
        [sys.executable, *strict, *launcher, str(HERE / "train_ranks.py"), str(path), *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def train(path: Path, *options: str, ranks: int = 1) -> RunFolder:
    """Train to the end."""
    done = start(path, *options, ranks=ranks)
    assert done.returncode == 0, done.stderr[-4000:]
    return RunFolder.open(path)


def curves(run: RunFolder) -> dict[str, torch.Tensor]:
    """Return each figure that is minimised, and the gradient's norm, of every step."""
    lines = [line for line in run.metrics() if "loss" in line]
    names = [name for name in lines[0] if name.startswith("loss") or name == "gradient_norm"]
    return {name: torch.tensor([line[name] for line in lines], dtype=torch.float64) for name in names}


def assert_same_training(one: RunFolder, other: RunFolder) -> None:
    """Compare loss curves and final parameters: the tolerances that docs/scale.md states.

    Two steps say that data, losses and gradients are the same: there only the order of sums differs. Afterwards
    Adam, which turns a gradient of no size into a step of full size, and ReLU carry rounding on.
    """
    first, second = curves(one), curves(other)
    apart = {name: (first[name] - second[name]).abs() / first[name].abs().clamp_min(1e-3) for name in first}
    assert len(apart["loss"]) >= 30
    for name, relative in apart.items():
        assert relative[:2].max() < 1e-5, name
    assert apart["loss"].max() < 1e-3
    ours, theirs = (load_model(run.model_directory).state_dict() for run in (one, other))
    for name, tensor in ours.items():
        # Biases before a norm change nothing that is minimised: rounding alone moves them.
        if name.endswith("weight"):
            assert (tensor - theirs[name]).abs().mean() < 1e-4, name


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> RunFolder:
    """Return the training of one process with all losses."""
    return train(tmp_path_factory.mktemp("one") / "run", "--vit", *ALL_LOSSES)


def test_two_ranks_follow_the_curve_of_one_with_the_same_global_batch(one, tmp_path) -> None:
    # In parts, too: neither is part of what is trained.
    two = train(tmp_path / "two", "--vit", *ALL_LOSSES, "accumulate=2", "activation_checkpointing=true", ranks=2)
    assert saved_steps(two) == [20, 40]
    assert load_model(two.model_directory).spec.latent_dim == MODEL.latent_dim
    assert_same_training(one, two)


def test_a_rank_that_fails_ends_the_run_and_the_message_says_why(tmp_path) -> None:
    done = start(tmp_path / "run", "--fail-at=25", ranks=2)
    assert done.returncode
    assert "DataError: the data of this rank are damaged" in done.stderr
    run = RunFolder.open(tmp_path / "run")
    assert not run.model_directory.exists()
    assert saved_steps(run) == [20]
    train(run.path, "--resume", ranks=2)
    assert saved_steps(run) == [20, 40]


def test_a_rank_that_does_not_come_is_not_waited_for_without_end(tmp_path) -> None:
    done = start(tmp_path / "run", "--sleep-at=3", "timeout_minutes=0.1", ranks=2)
    assert done.returncode
    assert "rank 0 waited for another process, which failed" in done.stderr
    assert "training.timeout_minutes (0.1)" in done.stderr


def test_processes_that_were_started_differently_are_told_apart(tmp_path) -> None:
    done = start(tmp_path / "run", "--other-data", ranks=2)
    assert done.returncode
    assert "the 2 processes do not agree on data" in done.stderr


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_of_one_process_is_taken_up_by_two(strategy, tmp_path) -> None:
    options = ["--vit", *(["pool_windows=60"] if strategy == "ddp" else [])]  # and however windows are drawn
    one = train(tmp_path / "one", *options)
    assert start(tmp_path / "two", *options, "--stop-at=20").returncode
    two = RunFolder.open(tmp_path / "two")
    assert 0 < saved_steps(two)[-1] < 40
    train(two.path, *options, "--resume", f"strategy={strategy}", ranks=2)
    assert_same_training(one, two)


def test_shards_on_two_ranks_are_taken_up_whole_by_one(one, tmp_path) -> None:
    options = ("strategy=fsdp", "accumulate=2", "activation_checkpointing=true")
    stopped = start(tmp_path / "two", "--vit", *ALL_LOSSES, "--stop-at=20", *options, ranks=2)
    assert stopped.returncode
    two = RunFolder.open(tmp_path / "two")
    assert 0 < saved_steps(two)[-1] < 40, stopped.stderr[-3000:]
    train(two.path, "--vit", *ALL_LOSSES, "--resume")
    assert_same_training(one, two)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_it_follows_the_same_curve(tmp_path) -> None:
    plain = train(tmp_path / "plain")
    compiled = train(tmp_path / "compiled", "compile=true")
    assert_same_training(plain, compiled)
