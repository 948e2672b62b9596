"""The layout of episodes in a Lance table: one row per frame.

Columns: episode (int64); step (int32); pixels (the raw bytes, compressed with zstd); vector and action (fixed-size
lists of float32; action is null in an episode's last row); label (a struct with one fixed-size list per label, read
as `label.NAME`); frame_digest (of the row's pixels); metadata (JSON text) and digest (of the complete episode), both
set on step 0 and null elsewhere. The schema's metadata contain a digest of the spec.

An episode's digest covers the digests of its frames, so a reader can check one frame without decoding the others.
Version 1 had no frame digests: an episode's digest covers its pixels, and only whole episodes can be checked.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, UInt8

from worldloom.core.errors import DataError, StorageError, WorldloomError, one_line
from worldloom.core.files import storage_errors
from worldloom.core.types import Episode
from worldloom.data.spec import DatasetSpec

FORMAT = "worldloom.dataset"
VERSION = 2
_VERSIONS = ("1", "2")  # that are read
FRAME_DIGEST = 16  # bytes
BOUNDS_SLACK = 1e-5  # share of the range that is tolerated as rounding

# Parts of messages about network failures; these do not indicate damage, even if they contain "decode".
_NETWORK = ("error sending request", "response body", "timed out", "timeout", "status code: 5", "onnection ")

_REMEDY = (
    "Restore the dataset from a copy, or collect it again into another directory; 'worldloom data validate {path}' "
    "lists the damage"
)

_CODEC = pa.Codec("zstd", compression_level=1)
_CHUNK = 128  # frames per task of a thread


class MissingDataset(StorageError):
    """No dataset exists at a path."""


class Unanswered(StorageError):
    """Remote storage did not answer, or answered incompletely; a later attempt may succeed."""


class ChangedSpec(DataError):
    """The spec or the columns of a dataset were changed after the dataset was created."""


class BadFrame(DataError):
    """A frame does not decode or does not match its digest; `index` is the position of the frame in the array."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"frame {index} {reason}")
        self.index, self.reason = index, reason


def threads() -> int:
    """Return the number of threads for compression and decompression; zstd releases the GIL."""
    return min(8, os.cpu_count() or 1)


def table_schema(spec: DatasetSpec, version: int = VERSION) -> pa.Schema:
    """Return the table schema for `spec`; the schema's metadata contain the format, its version and the spec."""
    fields = [pa.field("episode", pa.int64(), nullable=False), pa.field("step", pa.int32(), nullable=False)]
    metadata = {"format": FORMAT, "version": str(version), "spec": spec.to_json()}
    if spec.observation.pixels is not None:
        fields.append(pa.field("pixels", pa.large_binary(), nullable=False))
        layout = {"codec": "zstd", "dtype": "uint8", "shape": list(spec.observation.pixels)}
        metadata["pixels"] = json.dumps(layout)
    if spec.observation.vector:
        fields.append(pa.field("vector", float_list(spec.observation.vector), nullable=False))
    fields.append(pa.field("action", float_list(spec.action.size)))
    if spec.labels:
        children = [pa.field(name, float_list(size), nullable=False) for name, size in spec.labels.items()]
        fields.append(pa.field("label", pa.struct(children), nullable=False))
    if version > 1:
        if spec.observation.pixels is not None:
            fields.append(pa.field("frame_digest", pa.binary(FRAME_DIGEST), nullable=False))
        metadata["digest"] = _metadata_digest(metadata)
    fields += [pa.field("metadata", pa.string()), pa.field("digest", pa.string())]
    return pa.schema(fields, metadata=metadata)


def spec_of(schema: pa.Schema, path: str) -> tuple[DatasetSpec, int]:
    """Return the spec stored in a table, and the version of the table's format.

    Raises:
        DataError: the table is not a worldloom dataset, its format version is not supported, or its spec or its
            columns were changed.
    """
    metadata = {
        key.decode(errors="replace"): value.decode(errors="replace") for key, value in (schema.metadata or {}).items()
    }
    if metadata.get("format") != FORMAT:
        raise DataError(f"{path} is a Lance table but not a worldloom dataset; check the path")
    version = metadata.get("version")
    if version not in _VERSIONS:
        raise DataError(
            f"{path} has version {version} of the dataset format; expected version {' or '.join(_VERSIONS)}. Use the "
            f"worldloom version that wrote the dataset, or collect the dataset again"
        )
    digest = metadata.pop("digest", None)
    if version != "1" and digest != _metadata_digest(metadata):
        raise ChangedSpec(
            f"the spec of {path} was changed after it was written: its digest does not match. Restore the dataset from "
            f"a copy"
        )
    spec = DatasetSpec.from_json(metadata.get("spec", ""))
    if not schema.equals(table_schema(spec, int(version))):
        raise ChangedSpec(
            f"the columns of {path} ({', '.join(schema.names)}) do not match the dataset's spec. Restore the dataset "
            f"from a copy"
        )
    return spec, int(version)


def _metadata_digest(metadata: Mapping[str, str]) -> str:
    """Return the digest of a schema's metadata, which must not yet contain the digest itself."""
    return hashlib.blake2b(json.dumps(dict(metadata), sort_keys=True).encode(), digest_size=16).hexdigest()


def check_episode(episode: Episode, spec: DatasetSpec, where: str) -> None:
    """Raise `DataError` if an episode does not match the spec; the message begins with `where`."""
    observation = spec.observation
    pixels = None if episode.pixels is None else episode.pixels.shape[1:]
    vector = 0 if episode.vector is None else episode.vector.shape[1]
    if pixels != observation.pixels:
        raise DataError(
            f"{where} has pixels of shape {pixels}; expected {observation.pixels}, as in the dataset. Resize them, "
            f"or leave them out if None is expected"
        )
    if vector != observation.vector:
        raise DataError(
            f"{where} has {vector} values in its vector; expected {observation.vector}, as in the dataset. Give the "
            f"episode a vector of this size"
        )
    if episode.actions.shape[1] != spec.action.size:
        raise DataError(
            f"{where} has actions of {episode.actions.shape[1]} values; expected {spec.action.size}, as in the "
            f"dataset. Give the episode actions of this size"
        )
    sizes = {name: column.shape[1] for name, column in episode.labels.items()}
    if sizes != spec.labels:
        raise DataError(
            f"{where} has labels {sizes}; expected {spec.labels}, as in the dataset. Give the episode exactly these "
            f"labels, with these sizes"
        )
    inside = within_bounds(episode.actions, spec)
    if not inside.all():
        step = int(np.flatnonzero(~inside)[0])
        raise DataError(
            f"{where} has action {episode.actions[step]} at step {step}; expected low {spec.action.low} to high "
            f"{spec.action.high}. Clip the action, or state the true bounds (--low and --high when converting)"
        )


def within_bounds(actions: Float32[np.ndarray, "T A"], spec: DatasetSpec) -> Bool[np.ndarray, "T"]:
    """Return whether each action is finite and within the spec's bounds, up to rounding."""
    low, high = np.array(spec.action.low, np.float32), np.array(spec.action.high, np.float32)
    slack = BOUNDS_SLACK * (high - low)
    inside: np.ndarray = np.all((actions >= low - slack) & (actions <= high + slack), axis=1)
    return inside


def episode_batch(episode: Episode, number: int, spec: DatasetSpec) -> pa.RecordBatch:
    """Return the rows of one episode."""
    frames = episode.steps + 1
    columns: dict[str, Any] = {
        "episode": pa.array(np.full(frames, number, np.int64)),
        "step": pa.array(np.arange(frames, dtype=np.int32)),
    }
    if episode.pixels is not None:
        columns["pixels"] = compress_frames(episode.pixels)
    if episode.vector is not None:
        columns["vector"] = float_lists(episode.vector)
    padded = np.concatenate([episode.actions, np.zeros_like(episode.actions[:1])])
    columns["action"] = float_lists(padded, null=np.arange(frames) == frames - 1)
    schema = table_schema(spec)
    if spec.labels:
        lists = [float_lists(episode.labels[name]) for name in spec.labels]
        columns["label"] = pa.StructArray.from_arrays(lists, fields=list(schema.field("label").type))
    frames_digests = None
    if episode.pixels is not None:
        frames_digests = frame_digests(episode.pixels)
        columns["frame_digest"] = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(FRAME_DIGEST), frames, [None, pa.py_buffer(frames_digests.tobytes())]
        )
    metadata = metadata_json(episode.metadata)
    arrays = arrays_digest(frames_digests, episode.vector, episode.actions, episode.labels)
    first = {"metadata": metadata, "digest": episode_digest(arrays, metadata)}
    for name, text in first.items():
        columns[name] = pa.array([text, *[None] * (frames - 1)], pa.string())
    return pa.record_batch([columns[name] for name in schema.names], schema=schema)


def metadata_json(metadata: Mapping[str, Any]) -> str:
    """Return metadata as JSON with sorted keys; NumPy numbers and arrays become plain values."""
    try:
        return json.dumps(dict(metadata), sort_keys=True, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise DataError(f"an episode's metadata must be JSON: {error}; use only JSON values") from error


def frame_digests(pixels: UInt8[np.ndarray, "n H W C"]) -> UInt8[np.ndarray, "n 16"]:
    """Return the digest of each frame, computed in parallel threads."""
    out = np.empty((len(pixels), FRAME_DIGEST), np.uint8)
    flat = np.ascontiguousarray(pixels).reshape(len(pixels), -1)

    def digest(rows: range) -> None:
        for row in rows:
            out[row] = np.frombuffer(_frame_digest(flat[row].data), np.uint8)

    _in_threads(digest, len(pixels))
    return out


def _frame_digest(content: Any) -> bytes:
    # Processors have instructions for SHA-256, which make it twice as fast as BLAKE2b.
    return hashlib.sha256(content).digest()[:FRAME_DIGEST]


def arrays_digest(
    frames: UInt8[np.ndarray, "n *_"] | None,
    vector: Float32[np.ndarray, "n V"] | None,
    actions: Float32[np.ndarray, "n-1 A"],
    labels: Mapping[str, Float32[np.ndarray, "n _"]],
) -> str:
    """Return a digest of an episode's arrays, which is the same on every machine.

    `frames` are the frame digests; for version 1 of the format, the pixels themselves.
    """
    digest = hashlib.blake2b(digest_size=16)
    parts = {"pixels" if frames is None or frames.ndim > 2 else "frames": frames, "vector": vector, "actions": actions}
    parts |= {f"label.{name}": column for name, column in sorted(labels.items())}
    for name, array in parts.items():
        if array is not None:
            digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def episode_digest(arrays: str, metadata: str) -> str:
    """Return the digest of an episode, computed from the digest of its arrays and from its metadata as stored."""
    return hashlib.blake2b(f"{arrays} {metadata}".encode(), digest_size=16).hexdigest()


def decode_frames(
    frames: pa.Array, out: UInt8[np.ndarray, "n H W C"], digests: UInt8[np.ndarray, "n 16"] | None = None
) -> None:
    """Decompress frames into `out`, and check them against their `digests`, in parallel threads.

    Raises:
        BadFrame: a frame does not decode, has the wrong size, or does not match its digest.
    """
    size = int(np.prod(out.shape[1:]))
    assert out.flags.c_contiguous
    whole = out.reshape(-1).data
    known = None if digests is None else digests.tobytes()  # comparing arrays would take as long as hashing

    def decode(rows: range) -> None:
        for index in rows:
            place = whole[index * size : (index + 1) * size]
            try:
                place[:] = _CODEC.decompress(frames[index].as_buffer(), size, asbytes=True)
            except (OSError, ValueError) as error:
                raise BadFrame(index, f"does not decode: expected {size} bytes of zstd ({error})") from error
            if known is not None and _frame_digest(place) != known[index * FRAME_DIGEST : (index + 1) * FRAME_DIGEST]:
                raise BadFrame(index, "was changed after it was written: its digest does not match")

    _in_threads(decode, len(out))


def _in_threads(work: Callable[[range], None], count: int) -> None:
    """Call `work` on ranges that cover `count` rows, in parallel threads."""
    parts = [range(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK)]
    if len(parts) <= 1:
        for part in parts:
            work(part)
    else:
        with ThreadPoolExecutor(threads()) as pool:
            for _ in pool.map(work, parts):
                pass


def empty_frames(count: int, shape: tuple[int, int, int], path: str) -> UInt8[np.ndarray, "n H W C"]:
    """Return an uninitialised array for frames.

    Raises:
        DataError: the frames do not fit into memory.
    """
    try:
        return np.empty((count, *shape), np.uint8)
    except (MemoryError, ValueError) as error:
        raise DataError(
            f"{path}: {count} frames of shape {shape} do not fit into memory ({error}). Stream the dataset "
            f"(data.mode=stream), or use smaller frames"
        ) from error


def compressed_digest(frames: pa.LargeBinaryArray) -> bytes:
    """Return a digest of compressed frames, which is cheaper than digests of the decoded frames."""
    _, ends, content = frames.buffers()
    bounds = np.frombuffer(ends, np.int64)[frames.offset : frames.offset + len(frames) + 1]
    digest = hashlib.sha256((bounds - bounds[0]).tobytes())
    digest.update(memoryview(content)[bounds[0] : bounds[-1]])
    return digest.digest()


def digests_of(column: pa.Array | pa.ChunkedArray) -> UInt8[np.ndarray, "n 16"]:
    """Return a column of frame digests as an array."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    content = column.buffers()[1] or b""  # no buffer without rows
    first, last = column.offset * FRAME_DIGEST, (column.offset + len(column)) * FRAME_DIGEST
    digests: np.ndarray = np.frombuffer(content, np.uint8)[first:last].reshape(len(column), FRAME_DIGEST).copy()
    return digests


def floats_of(column: pa.Array | pa.ChunkedArray) -> tuple[Float32[np.ndarray, "n size"], Bool[np.ndarray, "n"]]:
    """Return a column of fixed-size lists as an array, with zeros for nulls, and a mask of the null rows."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    size = column.type.list_size
    null = column.is_null().to_numpy(zero_copy_only=False)
    # A fixed-size list also stores values for nulls, and a slice shares its parent's values.
    flat = column.values.slice(column.offset * size, len(column) * size).to_numpy(zero_copy_only=False)
    values = flat.astype(np.float32).reshape(len(column), size)
    values[null] = 0.0
    return values, null


@contextmanager
def lance_errors(path: str, doing: Literal["read", "write"], *, remedy: str | None = None) -> Iterator[None]:
    """Convert Lance's errors to worldloom's errors; `remedy` ends the message about a damaged table."""
    try:
        with storage_errors(path):
            yield
    except (OSError, ValueError, RuntimeError) as error:  # Arrow's errors are among these
        raise _translate(path, doing, error, remedy or _REMEDY.format(path=path)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a library in Rust; not a subclass of Exception
            raise
        raise _translate(path, "read", RuntimeError(str(error)), remedy or _REMEDY.format(path=path)) from error


def _translate(path: str, doing: str, error: Exception, remedy: str) -> WorldloomError:
    text = one_line(error).split(", /")[0]  # the rest is a position in Lance's source
    if "Dataset at path" in text and "not found" in text:
        return MissingDataset(f"no dataset exists at {path}; check the path, or collect a dataset")
    if "NoSuchBucket" in text:
        return StorageError(
            f"the bucket of {path} does not exist; check the bucket's name, the endpoint and the region"
        )
    if "://" in path and any(sign in text for sign in _NETWORK):
        return Unanswered(
            f"cannot {doing} {path}: {text}. Check the network and the storage, then run the command again"
        )
    if "already exists" in text:
        return DataError(f"{path} already contains a dataset; open it to append to it, or choose another path")
    if "Not a directory" in text:
        return StorageError(f"{path} or a parent of it is a file; expected a directory. Check the path")
    if "Permission denied" in text or "Read-only file system" in text:
        return StorageError(f"no permission to access {path}; change the permissions, or choose another path")
    signs = ("not found", "whole buffer", "too small", "corrupt", "magic", "decode", "invalid")
    remote = "://" in path
    if doing == "write" or (remote and not any(sign in text.lower() for sign in signs)):
        return StorageError(f"cannot {doing} {path}: {text}. Check the storage, then run the same command again")
    return DataError(f"{path} is damaged: a file is missing, truncated or changed ({text}). {remedy}")


def compress_frames(pixels: UInt8[np.ndarray, "N H W C"]) -> pa.Array:
    """Return the raw bytes of each frame, compressed with zstd."""
    frames = np.ascontiguousarray(pixels).reshape(len(pixels), -1)
    return pa.array([_CODEC.compress(frame, asbytes=True) for frame in frames], pa.large_binary())


def float_list(size: int) -> pa.DataType:
    """Return the type of a column with `size` float32 values per row."""
    return pa.list_(pa.float32(), size)


def float_lists(array: Float32[np.ndarray, "n size"], null: Bool[np.ndarray, "n"] | None = None) -> pa.Array:
    """Return the rows of an array as a column of fixed-size lists, null where `null` is set."""
    values = pa.array(np.ascontiguousarray(array).reshape(-1), pa.float32())
    return pa.FixedSizeListArray.from_arrays(values, array.shape[1], mask=None if null is None else pa.array(null))


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")
