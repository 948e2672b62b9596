import json
import os
from pathlib import Path

import pytest
import torch

from worldloom.core import files
from worldloom.core.errors import CheckpointError, StorageError
from worldloom.models import (
    JEPAConfig,
    build_jepa,
    delete_tensors,
    load_model,
    load_tensors,
    save_model,
    save_tensors,
)
from worldloom.models.encoders import ENCODERS, Fusion, PatchConv, VectorMLP
from worldloom.models.predictors import TransformerPredictor


@pytest.fixture
def model(odd_case):
    config = JEPAConfig(
        encoder=Fusion(pixels=PatchConv(patch=4, channels=(4,), hidden=8), vector=VectorMLP(hidden=(8,))),
        predictor=TransformerPredictor(depth=1, width=8, heads=2),
        latent_dim=4,
        block=2,
        context=2,
    )
    model = build_jepa(config, odd_case.observation, odd_case.action, odd_case.statistics, seed=0).train()
    model(odd_case.windows(8, 4, 2))  # running statistics of its own
    return model.eval()


def files_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_model_comes_back_whole(model, odd_case, tmp_path) -> None:
    fingerprint = save_model(tmp_path, model, {"steps": 7})
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    assert loaded.spec == model.spec
    assert loaded.spec.fingerprint == fingerprint == json.loads((tmp_path / "model.json").read_text())["digest"]
    assert not loaded.training
    assert json.loads((tmp_path / "model.json").read_text())["metadata"]["extra"] == {"steps": 7}
    observations = odd_case.observations(3, 2)
    assert torch.equal(loaded.encode(observations), model.encode(observations))


def test_the_fingerprint_names_the_weights_and_nothing_else(model, tmp_path) -> None:
    first = save_model(tmp_path / "a", model, {"note": 1})
    assert save_model(tmp_path / "b", model, {"note": 2}) == first
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    assert save_model(tmp_path / "c", model) != first


def test_saving_again_replaces_the_pair_and_leaves_no_rest(model, tmp_path) -> None:
    save_model(tmp_path, model)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    save_model(tmp_path, model)
    assert len(files_in(tmp_path)) == 2
    assert torch.equal(next(load_model(tmp_path).parameters()), next(model.parameters()))


@pytest.mark.parametrize("crash_at", [1, 2])
def test_a_crash_between_the_two_files_leaves_the_old_pair(monkeypatch, tmp_path, crash_at) -> None:
    save_tensors(tmp_path / "x", {"a": torch.zeros(3)}, kind="thing")
    calls = []
    rename = Path.replace

    def crash(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == crash_at:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(files.Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save_tensors(tmp_path / "x", {"a": torch.ones(3)}, kind="thing")
    assert len(calls) == crash_at
    monkeypatch.undo()
    tensors, _ = load_tensors(tmp_path / "x", kind="thing")
    assert torch.equal(tensors["a"], torch.zeros(3))
    save_tensors(tmp_path / "x", {"a": torch.full((3,), 2.0)}, kind="thing")
    assert len(files_in(tmp_path)) == 2  # what the crash left behind is gone


def test_a_full_disk_keeps_what_was_saved(monkeypatch, tmp_path) -> None:
    save_tensors(tmp_path / "x", {"a": torch.zeros(3)}, kind="thing")

    def full(self: Path, payload: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="disk is full"):
        save_tensors(tmp_path / "x", {"a": torch.ones(3)}, kind="thing")
    assert torch.equal(load_tensors(tmp_path / "x", kind="thing")[0]["a"], torch.zeros(3))


def tamper_tensors(directory: Path) -> None:
    (path,) = directory.glob("*.safetensors")
    payload = bytearray(path.read_bytes())
    payload[-1] ^= 1
    path.write_bytes(payload)


def truncate_tensors(directory: Path) -> None:
    (path,) = directory.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-4])


def lengthen_tensors(directory: Path) -> None:
    """Append a hole of any size, which a small archive can contain."""
    (path,) = directory.glob("*.safetensors")
    os.truncate(path, 2**30)


def remove_tensors(directory: Path) -> None:
    next(directory.glob("*.safetensors")).unlink()


def edit(**changes):
    def change(directory: Path) -> None:
        path = directory / "model.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def truncate_json(directory: Path) -> None:
    path = directory / "model.json"
    path.write_text(path.read_text()[:-20])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (tamper_tensors, "damaged or was changed"),
        (truncate_tensors, "damaged or was changed"),
        (lengthen_tensors, "it has 1073741824 bytes, and its header states"),
        (remove_tensors, "is missing; restore the file"),
        (truncate_json, "not valid JSON"),
        (edit(format=99), "has format 99; expected format 1"),
        (edit(metadata={}), "its checksum does not match"),
        (edit(tensors="../../elsewhere.safetensors"), "its checksum does not match"),
    ],
)
def test_damage_is_named(model, tmp_path, damage, message) -> None:
    save_model(tmp_path, model)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_a_missing_checkpoint_and_another_kind_are_told_apart(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no world-model checkpoint exists at"):
        load_model(tmp_path)
    save_tensors(tmp_path / "model", {"a": torch.zeros(1)}, kind="distance")
    with pytest.raises(CheckpointError, match="contains a distance; expected a world-model"):
        load_model(tmp_path)


def test_a_part_that_nobody_registered_asks_for_its_module(pixel_case, tmp_path, monkeypatch) -> None:
    class Foreign(PatchConv):
        name: str = "foreign"

    monkeypatch.setitem(ENCODERS._entries, "foreign", Foreign)
    config = JEPAConfig(encoder=Foreign(patch=4, channels=(4,), hidden=8), latent_dim=4)
    model = build_jepa(config, pixel_case.observation, pixel_case.action, pixel_case.statistics, seed=0)
    save_model(tmp_path, model)
    assert isinstance(load_model(tmp_path).config.encoder, Foreign)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="unknown encoder 'foreign'.*Import the modules"):
        load_model(tmp_path)


def test_deleting_leaves_others_alone(tmp_path) -> None:
    for name in ("step-1", "step-10"):
        save_tensors(tmp_path / name, {"a": torch.zeros(1)}, kind="thing")
    delete_tensors(tmp_path / "step-1")
    assert load_tensors(tmp_path / "step-10", kind="thing")[1] == {}
    assert len(files_in(tmp_path)) == 2
