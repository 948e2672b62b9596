"""Checkpoints: tensors as safetensors, all else as JSON; reading one runs no code from it.

`STEM.json` names its tensor file and the digest of it, and is written last: a crash at any moment leaves the old
pair or the new one.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from worldloom.core.errors import CheckpointError, ConfigError, StorageError
from worldloom.core.files import read_json, storage_errors, write_atomic, write_json
from worldloom.core.types import ActionSpec, ObservationSpec
from worldloom.data import Statistics
from worldloom.models.jepa import JEPA, JEPAConfig, build_jepa

FORMAT = 1
_MODEL = "world-model"


def save_tensors(
    stem: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None, *, kind: str
) -> str:
    """Write `STEM.json` and `STEM-<digest>.safetensors`; return the tensors' blake2 digest.

    `kind` says what the file is, so that one thing is not read as another; `metadata` is JSON.

    Raises:
        StorageError: the disk is full or refuses; what was saved before under this stem is untouched.
    """
    stem = Path(stem)
    payload = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    digest = _digest(payload)
    path = stem.with_name(f"{stem.name}-{digest[:16]}.safetensors")
    write_atomic(path, lambda temporary: temporary.write_bytes(payload))
    body = {"format": FORMAT, "kind": kind, "tensors": path.name, "digest": digest, "metadata": dict(metadata or {})}
    write_json(_json_path(stem), {**body, "checksum": _checksum(body)})
    for old in stem.parent.glob(f"{stem.name}-{'[0-9a-f]' * 16}.safetensors"):
        if old != path:
            old.unlink(missing_ok=True)
    return digest


def load_tensors(
    stem: Path | str, *, kind: str, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: the tensors and the metadata.

    Raises:
        CheckpointError: missing, damaged, tampered with, of another version or of another kind.
    """
    tensors, body = _read(Path(stem), kind)
    return {name: tensor.to(device) for name, tensor in tensors.items()}, body["metadata"]


def delete_tensors(stem: Path | str) -> None:
    """Delete what `save_tensors` wrote, the JSON first, so that no half of it is ever read."""
    stem = Path(stem)
    with storage_errors(stem):
        _json_path(stem).unlink(missing_ok=True)
        for path in stem.parent.glob(f"{stem.name}-{'[0-9a-f]' * 16}.safetensors"):
            path.unlink(missing_ok=True)


def save_model(directory: Path | str, model: JEPA, extra: Mapping[str, Any] | None = None) -> str:
    """Write the model into `directory` and give it its fingerprint, which is returned; `extra` is JSON."""
    metadata = {
        "config": model.config.model_dump(mode="json"),
        "observation": asdict(model.spec.observation),
        "action": asdict(model.spec.action),
        "extra": dict(extra or {}),
    }
    fingerprint = save_tensors(Path(directory) / "model", model.state_dict(), metadata, kind=_MODEL)
    model.set_fingerprint(fingerprint)
    return fingerprint


def load_model(directory: Path | str, device: torch.device | str = "cpu") -> JEPA:
    """Read a model, ready for evaluation.

    Raises:
        CheckpointError: see `load_tensors`; or a part of the model is not registered under its name.
    """
    stem = Path(directory) / "model"
    tensors, body = _read(stem, _MODEL)
    metadata = body["metadata"]
    try:
        config = JEPAConfig.parse(metadata["config"])
    except ConfigError as error:
        raise CheckpointError(
            f"{_json_path(stem)} cannot be built: {error}. If a part comes from a module of yours, import the module "
            f"that registers it first (--import MODULE)"
        ) from None
    observation = ObservationSpec.from_json(metadata["observation"])
    action = ActionSpec.from_json(metadata["action"])
    # The statistics are buffers and come with the tensors; only their shapes matter here.
    model = build_jepa(config, observation, action, Statistics.unit(observation, action), seed=0)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(
            f"{stem} does not fit the model that its configuration describes: {error}. It was made by another "
            f"version of a part; install that version"
        ) from None
    model.set_fingerprint(body["digest"])
    return model.to(device).eval()


def _read(stem: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    body = _read_body(stem, kind)
    path = stem.parent / body["tensors"]
    try:
        payload = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; restore it or use an earlier checkpoint") from None
    if _digest(payload) != body["digest"]:
        raise CheckpointError(
            f"{path} is damaged or was changed: its digest is not the one in {_json_path(stem)}; restore it or train "
            f"again"
        )
    try:
        return safetensors.torch.load(payload), body
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from None


def _read_body(stem: Path, kind: str) -> dict[str, Any]:
    path = _json_path(stem)
    if not path.is_file():
        raise CheckpointError(f"there is no {kind} checkpoint at {path}; check the path, or train first")
    try:
        body = read_json(path)
    except StorageError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        found = body.get("format") if isinstance(body, dict) else None
        raise CheckpointError(
            f"{path} has format {found!r}; this version of worldloom reads format {FORMAT}. Use the version that "
            f"wrote it, or train again"
        )
    checksum = body.pop("checksum", None)
    if checksum != _checksum(body):
        raise CheckpointError(f"{path} is damaged or was changed: its checksum does not fit; restore it")
    if body["kind"] != kind:
        raise CheckpointError(f"{path} holds a {body['kind']}; expected a {kind}. Check the path")
    if Path(body["tensors"]).name != body["tensors"]:
        raise CheckpointError(f"{path} names tensors outside its directory: {body['tensors']!r}")
    return body


def _json_path(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.json")


def _digest(payload: bytes) -> str:
    return hashlib.blake2b(payload, digest_size=32).hexdigest()


def _checksum(body: Mapping[str, Any]) -> str:
    return _digest(json.dumps(body, sort_keys=True).encode())
