"""A cache of all frames of a dataset, decoded before training starts."""

import logging
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
from jaxtyping import UInt8

from worldloom.core.errors import DataError
from worldloom.core.files import write_atomic
from worldloom.core.processes import is_first_here, on_this_machine
from worldloom.core.progress import SILENT, Progress
from worldloom.data.dataset import EpisodeDataset
from worldloom.data.frames import Frames, Pixels
from worldloom.data.layout import empty_frames

Mode = Literal["auto", "ram", "mmap"]
_log = logging.getLogger(__name__)


def load_cache(
    dataset: EpisodeDataset, mode: Mode = "auto", *, directory: Path | None = None, progress: Progress = SILENT
) -> Frames:
    """Return all frames of a dataset, decoded into memory ("ram") or into a memory-mapped file ("mmap").

    "auto" uses memory if the frames need less than a quarter of the available memory and torchrun runs no other
    process on this machine. The memory-mapped file is in `directory` (default: PATH.cache beside the
    dataset) and is named after the dataset's fingerprint. Later calls reuse the file if it contains the frames of the
    dataset. You can delete the file at any time. If another program changes or truncates the file while it is in use,
    the next read of frames raises `DataError`.

    Raises:
        DataError: a file of the dataset is missing, truncated or changed, or does not decode.
        StorageError: the disk is full.
    """
    columns = dataset.columns()
    fingerprint = dataset.fingerprint()
    pixels: Pixels | None = None
    if dataset.spec.observation.pixels is not None:
        shape = (dataset.frames, *dataset.spec.observation.pixels)
        size = int(np.prod(shape))
        if mode == "auto":
            alone = (
                on_this_machine() == 1
            )  # several processes share one mapped file, so that the frames are decoded once
            mode = "ram" if alone and size < psutil.virtual_memory().available / 4 else "mmap"
        if mode == "ram" or size == 0:  # an empty file cannot be mapped
            decoded = empty_frames(dataset.frames, dataset.spec.observation.pixels, str(dataset.path))
            for _ in _decode(dataset, progress, decoded):
                pass
            pixels = decoded
        else:
            path = (directory or _default_directory(dataset)) / f"{fingerprint}.frames"
            pixels = _known_frames(dataset, path, shape, progress)
            if pixels is None:
                _write_frames(dataset, path, size, progress)
                pixels = MappedPixels(path, shape)
    return Frames(
        spec=dataset.spec,
        fingerprint=fingerprint,
        pixels=pixels,
        starts=dataset.starts,
        lengths=dataset.lengths,
        **vars(columns),
    )


class MappedPixels:
    """Frames in a memory-mapped file, indexed by rows.

    Reading a mapped file that became shorter would end the process without a message, and values that changed after
    their check would be used unnoticed. Each read therefore checks the size and the modification time first.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.shape, self._path = shape, path
        with path.open("rb") as file:
            self._descriptor = os.dup(file.fileno())  # of the mapped file, even if the path gets another one
            weakref.finalize(self, os.close, self._descriptor)
            self._stamp = self._size_and_time()
            # A plain view: indexing np.memmap itself is slower and returns np.memmap.
            self._frames = np.asarray(np.memmap(file, np.uint8, mode="r", shape=shape))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any, /) -> UInt8[np.ndarray, "*shape H W C"]:
        """Return the frames of these rows: an integer, an array of integers of any shape, or a slice.

        Raises:
            DataError: another program changed the file.
        """
        if self._size_and_time() != self._stamp:
            raise DataError(
                f"{self._path} was changed by another program while its frames were in use. Run the command again, or "
                f"resume it; the frames are then decoded again"
            )
        frames: np.ndarray = self._frames[rows]
        return frames

    def _size_and_time(self) -> tuple[int, int]:
        stat = os.fstat(self._descriptor)
        return stat.st_size, stat.st_mtime_ns


def _decode(
    dataset: EpisodeDataset, progress: Progress, out: UInt8[np.ndarray, "N H W C"] | None = None
) -> Iterator[UInt8[np.ndarray, "n H W C"]]:
    with progress.task("decode", dataset.frames, "frames") as task:
        for part in dataset.scan_pixels(out=out):
            yield part
            task.advance(len(part))


def _known_frames(
    dataset: EpisodeDataset, path: Path, shape: tuple[int, ...], progress: Progress
) -> MappedPixels | None:
    """Return the frames in a file of an earlier call, or None if the file is missing or contains other frames."""
    if not path.exists():
        return None
    there, size = path.stat().st_size, int(np.prod(shape))
    if there != size:
        _log.warning("%s has %d bytes; expected %d. Decoding the frames again", path, there, size)
        return None
    pixels = MappedPixels(path, shape)
    if is_first_here():  # the other processes of this machine map the same file
        try:
            dataset.check_frames(pixels[:], progress=progress)
        except DataError as error:
            _log.warning("%s is damaged: %s. Decoding the frames again", path, error)
            return None
    _log.info("using the decoded frames in %s", path)
    return pixels


def _write_frames(dataset: EpisodeDataset, path: Path, size: int, progress: Progress) -> None:
    """Write all decoded frames."""
    _log.info("decoding %d frames into %s (%.1f GiB)", dataset.frames, path, size / 2**30)

    # Plain writes raise on a full disk; writing through a mapping would kill the process.
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            for part in _decode(dataset, progress):
                file.write(part.data)

    write_atomic(path, write)


def _default_directory(dataset: EpisodeDataset) -> Path:
    path = str(dataset.path)
    if "://" in path:
        raise DataError(
            f"a memory-mapped file of the frames of {path} has no default directory, because the dataset is on remote "
            f"storage; pass 'directory', or stream the frames (data.mode=stream)"
        )
    return Path(f"{path.rstrip('/')}.cache")
