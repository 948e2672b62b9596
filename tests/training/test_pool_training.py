"""Training that draws from a sliding pool: the same windows after a kill, over any number of ranks, from anywhere."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from blob_world import blob_cache
from train_blobs import CONFIG, MODEL

from worldloom.core.errors import CheckpointError, StorageError
from worldloom.data import WindowSampler
from worldloom.models import load_model
from worldloom.training import Ranks, RunFolder, fit
from worldloom.training.loop import _Training

POOL = CONFIG.override(["steps=30", "pool_windows=40", "accelerator=cpu", "checkpoint_every=6", "validate_every=10"])


@pytest.fixture(scope="module")
def cache():
    return blob_cache(episodes=10)


def drawn_in(cache: Any, path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int = -1) -> list[tuple[int, ...]]:
    """Train, or go on with training; return the batches."""
    batches: list[tuple[int, ...]] = []
    draw = WindowSampler.at

    def at(self: WindowSampler, windows: np.ndarray) -> Any:
        if len(batches) == fail_at:
            raise StorageError("the storage is gone")
        batches.append(tuple(windows.tolist()))
        return draw(self, windows)

    begun = path.exists()
    run = RunFolder.open(path) if begun else RunFolder.create(path, {}, {})
    with monkeypatch.context() as patch:
        patch.setattr(WindowSampler, "at", at)
        # Validation draws by `sample`, which comes through `at` too.
        patch.setattr(WindowSampler, "sample", lambda self, n, rng: draw(self, rng.integers(len(self), size=n)))
        try:
            fit(POOL, MODEL, cache, run, resume=begun)
        except StorageError:
            assert fail_at >= 0
    return batches


def test_broken_off_and_resumed_it_draws_and_ends_as_if_unbroken(cache, tmp_path, monkeypatch) -> None:
    unbroken = drawn_in(cache, tmp_path / "unbroken", monkeypatch)
    before = drawn_in(cache, tmp_path / "broken", monkeypatch, fail_at=15)
    after = drawn_in(cache, tmp_path / "broken", monkeypatch)
    assert before == unbroken[:15]
    assert after == unbroken[12:]  # from the checkpoint of step 12 on
    ours, theirs = (load_model(tmp_path / name / "model").state_dict() for name in ("unbroken", "broken"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_the_pool_belongs_to_the_identity_of_a_run(cache, tmp_path) -> None:
    run = RunFolder.create(tmp_path / "run", {}, {})
    fit(POOL, MODEL, cache, run)
    with pytest.raises(CheckpointError, match="pool_windows was 40, is None"):
        fit(POOL.override(["pool_windows=null"]), MODEL, cache, run, resume=True)


def test_the_batch_of_a_step_is_the_same_over_any_number_of_ranks(cache, tmp_path) -> None:
    def batch(rank: int, count: int, step: int) -> torch.Tensor:
        ranks = create_autospec(Ranks, instance=True)
        ranks.fabric = SimpleNamespace(world_size=count, global_rank=rank, device=torch.device("cpu"))
        return _Training(POOL, MODEL, cache, RunFolder(tmp_path), ranks)._batch(step).actions

    for step in (0, 17):
        whole = batch(0, 1, step)
        assert torch.cat([batch(rank, 4, step) for rank in range(4)]).equal(whole)
