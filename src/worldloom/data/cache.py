"""A cache of all frames of a dataset, decoded before training starts."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
from jaxtyping import Float32, Int64, UInt8

from worldloom.core.errors import DataError
from worldloom.core.files import write_atomic
from worldloom.core.processes import on_this_machine
from worldloom.core.progress import SILENT, Progress
from worldloom.data.dataset import EpisodeDataset
from worldloom.data.frames import EpisodeFrames
from worldloom.data.spec import DatasetSpec

Mode = Literal["auto", "ram", "mmap"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class FrameCache(EpisodeFrames):
    """All N frames of a dataset with E episodes, decoded, one episode after the other.

    `starts` is the first frame of each episode, and `lengths` is its number of actions, one fewer than its frames.
    `pixels` may be a memory-mapped file. The last action of each episode is zero and never used.
    """

    spec: DatasetSpec
    fingerprint: str
    pixels: UInt8[np.ndarray, "N H W C"] | None
    vector: Float32[np.ndarray, "N V"] | None
    actions: Float32[np.ndarray, "N A"]
    labels: dict[str, Float32[np.ndarray, "N _"]]
    starts: Int64[np.ndarray, "E"]
    lengths: Int64[np.ndarray, "E"]


def load_cache(
    dataset: EpisodeDataset, mode: Mode = "auto", *, directory: Path | None = None, progress: Progress = SILENT
) -> FrameCache:
    """Decode a dataset into memory ("ram") or into a memory-mapped file ("mmap").

    "auto" uses memory if the frames need less than a quarter of the available memory and torchrun runs no other
    process on this machine. The file is in `directory` (default: PATH.cache beside the dataset) and is named after the
    dataset's fingerprint. Later calls reuse the file; you can delete it at any time.

    Raises:
        DataError: a file of the dataset is missing, truncated or does not decode.
        StorageError: the disk is full.
    """
    fingerprint = dataset.fingerprint()
    columns = dataset.columns()
    pixels = None
    if dataset.spec.observation.pixels is not None:
        size = dataset.frames * int(np.prod(dataset.spec.observation.pixels))
        if mode == "auto":
            alone = (
                on_this_machine() == 1
            )  # several processes share one mapped file, so that the frames are decoded once
            mode = "ram" if alone and size < psutil.virtual_memory().available / 4 else "mmap"
        if mode == "ram" or size == 0:  # an empty file cannot be mapped
            pixels = _decode(dataset, progress)
        else:
            pixels = _map(dataset, fingerprint, directory or _default_directory(dataset), progress)
    return FrameCache(
        spec=dataset.spec,
        fingerprint=fingerprint,
        pixels=pixels,
        vector=columns.vector,
        actions=columns.actions,
        labels=columns.labels,
        starts=dataset.starts,
        lengths=dataset.lengths,
    )


def _decode(dataset: EpisodeDataset, progress: Progress) -> UInt8[np.ndarray, "N H W C"]:
    assert dataset.spec.observation.pixels is not None
    out = np.empty((dataset.frames, *dataset.spec.observation.pixels), np.uint8)
    with progress.task("decode", dataset.frames, "frames") as task:
        for part in dataset.scan_pixels(out=out):
            task.advance(len(part))
    return out


def _map(
    dataset: EpisodeDataset, fingerprint: str, directory: Path, progress: Progress
) -> UInt8[np.ndarray, "N H W C"]:
    assert dataset.spec.observation.pixels is not None
    shape = (dataset.frames, *dataset.spec.observation.pixels)
    size = int(np.prod(shape))
    path = directory / f"{fingerprint}.frames"
    if path.exists() and path.stat().st_size == size:
        _log.info("using the decoded frames in %s", path)
    else:
        if path.exists():
            _log.warning("%s has %d bytes, expected %d; writing it again", path, path.stat().st_size, size)
        _log.info("decoding %d frames into %s (%.1f GiB)", shape[0], path, size / 2**30)

        # Plain writes raise if the disk is full; writes to a mapping would kill the process.
        def write(temporary: Path) -> None:
            with temporary.open("wb") as file, progress.task("decode", shape[0], "frames") as task:
                for part in dataset.scan_pixels():
                    file.write(part.data)
                    task.advance(len(part))

        write_atomic(path, write)
    # A plain view: indexing np.memmap itself is slower and returns np.memmap.
    return np.asarray(np.memmap(path, np.uint8, mode="r", shape=shape))


def _default_directory(dataset: EpisodeDataset) -> Path:
    path = str(dataset.path)
    if "://" in path:
        raise DataError(
            f"the frames of {path} do not fit into memory, and remote storage has no default cache directory; pass "
            f"a directory, or stream the frames (data.mode=stream)"
        )
    return Path(f"{path.rstrip('/')}.cache")
