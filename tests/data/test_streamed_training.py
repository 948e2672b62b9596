from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from s3_server import BUCKET, options_for, s3_server

import worldloom.envs
from worldloom.data import DataConfig, Frames, collect, load_cache, stream_frames, validate
from worldloom.models import JEPAConfig, load_model
from worldloom.training import RunFolder, TrainingConfig, fit

URI = f"s3://{BUCKET}/two-room"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with s3_server() as port:
        yield port


def parameters(frames: Frames, path: Path, pool: int | None) -> dict[str, torch.Tensor]:
    run = RunFolder.create(path, {}, {})
    config = TrainingConfig(steps=6, batch=16, horizon=4, validate_every=3, checkpoint_every=6, accelerator="cpu")
    config = config.override([f"pool_windows={'null' if pool is None else pool}"])
    fit(config, JEPAConfig(), frames, run)
    return load_model(run.model_directory).state_dict()


def test_training_from_s3_ends_in_the_parameters_of_training_from_disk(port: int, tmp_path: Path) -> None:
    worldloom.envs.register_envs()
    arguments = {"env_id": "worldloom/TwoRoom-v0", "episodes": 6, "steps": 40, "num_envs": 3, "seed": 0}
    local = collect(tmp_path / "logs", **arguments)
    # Broken off after the first batch, then completed.
    collect(URI, **{**arguments, "episodes": 3}, storage_options=options_for(port))
    remote = collect(URI, **arguments, storage_options=options_for(port))
    assert validate(URI, storage_options=options_for(port)) == []
    assert remote.fingerprint() == local.fingerprint()

    cache = load_cache(local, "ram")
    for pool in (None, 40):
        expected = parameters(cache, tmp_path / f"disk-{pool}", pool)
        config = DataConfig(cache_dir=str(tmp_path / f"chunks-{pool}"), chunk_mib=0.2)
        with stream_frames(remote, config) as frames:
            assert frames.pixels is not None
            streamed = parameters(frames, tmp_path / f"s3-{pool}", pool)
            assert frames.pixels.fetched >= 12
        assert expected.keys() == streamed.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, streamed[name]), name
