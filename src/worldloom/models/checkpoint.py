"""Checkpoints: tensors in safetensors files, everything else in JSON. Reading a checkpoint runs no code from it.

`STEM.json` contains the name and the digest of its tensor file, and is written last. A crash at any moment therefore
leaves either the old pair of files or the new one.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor, nn

from worldloom.core.config import Shape, check_shape
from worldloom.core.errors import CheckpointError, ConfigError, StorageError
from worldloom.core.files import read_json, read_whole, reading, storage_errors, write_atomic, write_json
from worldloom.core.json_text import parse_json
from worldloom.core.names import PathName
from worldloom.core.types import ActionSpec, ObservationSpec
from worldloom.data import Statistics
from worldloom.models.jepa import JEPA, JEPAConfig, build_jepa
from worldloom.models.size import shapes_of

FORMAT = 1
_MODEL = "world-model"
_LONGEST_HEADER = 100_000_000  # bytes, as in safetensors

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class _Body(Shape):
    format: int
    kind: str
    tensors: PathName
    digest: str
    metadata: dict[str, Any]


class _ModelFile(Shape):
    config: dict[str, Any]
    observation: dict[str, Any]
    action: dict[str, Any]
    extra: dict[str, Any] = Field(default_factory=dict)


def save_tensors(
    stem: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None, *, kind: str
) -> str:
    """Write `STEM.json` and `STEM-<digest>.safetensors`; return the BLAKE2 digest of the tensor file.

    `kind` is the type of content; `load_tensors` requires the same kind. `metadata` contains JSON values.

    Raises:
        StorageError: the disk is full or the write failed; files saved earlier under this stem are unchanged.
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
    """Read the tensors and the metadata that `save_tensors` wrote.

    Raises:
        CheckpointError: the files are missing, damaged or tampered with, or have a different version or kind.
    """
    tensors, body = _read(Path(stem), kind)
    return {name: tensor.to(device) for name, tensor in tensors.items()}, body["metadata"]


def stored_digest(stem: Path | str) -> str | None:
    """Return the digest of everything that `save_tensors` wrote under this stem, or None if there is nothing.

    Raises:
        CheckpointError: the JSON file is damaged, or has a different version.
    """
    stem = Path(stem)
    return _checksum(_read_body(stem)) if _json_path(stem).is_file() else None


def delete_tensors(stem: Path | str) -> None:
    """Delete the files that `save_tensors` wrote; the JSON file first, so that an incomplete pair is never read."""
    stem = Path(stem)
    with storage_errors(stem):
        _json_path(stem).unlink(missing_ok=True)
        for path in stem.parent.glob(f"{stem.name}-{'[0-9a-f]' * 16}.safetensors"):
            path.unlink(missing_ok=True)


def save_model(directory: Path | str, model: JEPA, extra: Mapping[str, Any] | None = None) -> str:
    """Save the model and the JSON values `extra` in `directory`; set and return the model's fingerprint."""
    metadata = {
        "config": model.config.model_dump(mode="json"),
        "observation": asdict(model.spec.observation),
        "action": asdict(model.spec.action),
        "extra": dict(extra or {}),
    }
    fingerprint = save_tensors(Path(directory) / "model", model.state_dict(), metadata, kind=_MODEL)
    model.set_fingerprint(fingerprint)
    return fingerprint


def stored_extra(directory: Path | str) -> dict[str, Any]:
    """Return the JSON values `extra` of a model that `save_model` wrote.

    Raises:
        CheckpointError: the model is missing, damaged or of another kind.
    """
    stem = Path(directory) / "model"
    metadata = _read_body(stem, _MODEL)["metadata"]
    return dict(check_shape(metadata, _ModelFile, _json_path(stem), CheckpointError).extra)


def load_model(directory: Path | str, device: torch.device | str = "cpu", *, digest: str | None = None) -> JEPA:
    """Load a model onto `device`, in evaluation mode. `digest` is the `stored_digest` that the model must have.

    Raises:
        CheckpointError: see `load_tensors`; or a part of the model is not registered or has a different version; or
            the model has another digest.
    """
    stem = Path(directory) / "model"
    tensors, body = _read(stem, _MODEL)
    if digest is not None and _checksum(body) != digest:
        raise CheckpointError(
            f"{_json_path(stem)} is not the model that was verified: it was changed since. Restore the run from a copy"
        )
    metadata = body["metadata"]
    check_shape(metadata, _ModelFile, _json_path(stem), CheckpointError)
    try:
        config = JEPAConfig.parse(metadata["config"])
    except ConfigError as error:
        raise CheckpointError(
            f"the model in {_json_path(stem)} cannot be built: {error}. Import the modules that define your own parts "
            f"(--import MODULE), or use the version of worldloom that wrote the model"
        ) from None
    observation = ObservationSpec.from_json(metadata["observation"])
    action = ActionSpec.from_json(metadata["action"])
    # The statistics are buffers, which the tensors contain; only their shapes matter here.
    model = build_from(
        tensors, lambda: build_jepa(config, observation, action, Statistics.unit(observation, action), seed=0), stem
    )
    model.set_fingerprint(body["digest"])
    return model.to(device).eval()


def build_from(tensors: Mapping[str, Tensor], build: Callable[[], ModuleT], stem: Path | str) -> ModuleT:
    """Build a module and load its tensors.

    Before memory is allocated, the tensor shapes of the module that `build` would return are compared with `tensors`.

    Raises:
        CheckpointError: the module cannot be built, or its tensors differ from `tensors` in name or shape.
    """
    with reading(stem, CheckpointError, "restore the files from a copy, or train again"):
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        expected = shapes_of(build)
        if expected is not None and expected != found:
            differ = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
            name = differ[0]
            raise CheckpointError(
                f"the tensors of {stem} do not match the model in its configuration: {name!r} has shape "
                f"{found.get(name)}, expected {expected.get(name)} ({len(differ)} differ). A part of the model "
                f"probably has a different version; install the version that wrote the checkpoint"
            )
        module = build()
        module.load_state_dict(tensors)
    return module


def _read(stem: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    body = _read_body(stem, kind)
    path = stem.parent / body["tensors"]
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; restore the file from a copy, or use an earlier checkpoint")
    try:
        stated, size = _stated_size(path), path.stat().st_size
        if stated is not None and stated != size:  # before a file of any size is read
            raise CheckpointError(
                f"{path} is damaged or was changed: it has {size} bytes, and its header states {stated}. Restore the "
                f"file from a copy, or train again"
            )
        payload = read_whole(path)
    except StorageError as error:
        raise CheckpointError(str(error)) from None
    if _digest(payload) != body["digest"]:
        raise CheckpointError(
            f"{path} is damaged or was changed: its digest differs from the digest in {_json_path(stem)}. Restore both "
            f"files from a copy, or train again"
        )
    try:
        return safetensors.torch.load(payload), body
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a safetensors file ({error}); restore the file from a copy, or train again"
        ) from None


def _stated_size(path: Path) -> int | None:
    """Return the size of a safetensors file according to its header; None if the header is damaged."""
    with storage_errors(path), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, _LONGEST_HEADER))
    try:
        tensors = [tensor for name, tensor in parse_json(header).items() if name != "__metadata__"]
        return int(8 + length + max((tensor["data_offsets"][1] for tensor in tensors), default=0))
    except (AttributeError, LookupError, TypeError, ValueError):
        return None


def _read_body(stem: Path, kind: str | None = None) -> dict[str, Any]:
    path = _json_path(stem)
    if not path.is_file():
        raise CheckpointError(f"no {kind or 'such'} checkpoint exists at {path}; check the path, or train first")
    try:
        body = read_json(path)
    except StorageError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        found = body.get("format") if isinstance(body, dict) else None
        raise CheckpointError(
            f"{path} has format {found!r}; expected format {FORMAT}. Check the path, use the version of worldloom that "
            f"wrote the file, or train again"
        )
    checksum = body.pop("checksum", None)
    if checksum != _checksum(body):
        raise CheckpointError(
            f"{path} is damaged or was changed: its checksum does not match its content. Restore the file from a copy"
        )
    if kind is not None and body.get("kind") != kind:
        raise CheckpointError(f"{path} contains a {body.get('kind')}; expected a {kind}. Check the path")
    check_shape(body, _Body, path, CheckpointError)
    return body


def _json_path(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.json")


def _digest(payload: bytes) -> str:
    return hashlib.blake2b(payload, digest_size=32).hexdigest()


def _checksum(body: Mapping[str, Any]) -> str:
    return _digest(json.dumps(body, sort_keys=True).encode())
