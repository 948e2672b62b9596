"""All frames of a dataset, decoded before training starts."""

import logging
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
from jaxtyping import UInt8

from worldloom.core.errors import DataError
from worldloom.core.files import write_atomic
from worldloom.core.processes import on_this_machine
from worldloom.core.progress import SILENT, Progress
from worldloom.data.dataset import EpisodeDataset
from worldloom.data.frames import Frames

Mode = Literal["auto", "ram", "mmap"]
_log = logging.getLogger(__name__)


def load_cache(
    dataset: EpisodeDataset, mode: Mode = "auto", *, directory: Path | None = None, progress: Progress = SILENT
) -> Frames:
    """Decode a dataset into memory ("ram") or into a file that is mapped ("mmap").

    "auto" uses memory if the frames fill less than a quarter of the available memory and no other process of torchrun
    on this machine needs them. The file is in `directory` (default: PATH.cache beside the dataset) and named by the
    dataset's fingerprint; the next call uses it again, and it may be deleted at any time.

    Raises:
        DataError: a file of the dataset is missing, cut or does not decode.
        StorageError: the disk is full.
    """
    fingerprint = dataset.fingerprint()
    columns = dataset.columns()
    pixels = None
    if dataset.spec.observation.pixels is not None:
        size = dataset.frames * int(np.prod(dataset.spec.observation.pixels))
        if mode == "auto":
            alone = on_this_machine() == 1  # several processes map one file instead of decoding once each
            mode = "ram" if alone and size < psutil.virtual_memory().available / 4 else "mmap"
        if mode == "ram" or size == 0:  # no file of no bytes can be mapped
            pixels = _decode(dataset, progress)
        else:
            pixels = _map(dataset, fingerprint, directory or _default_directory(dataset), progress)
    return Frames(
        spec=dataset.spec,
        fingerprint=fingerprint,
        pixels=pixels,
        starts=dataset.starts,
        lengths=dataset.lengths,
        **vars(columns),
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

        # Plain writes raise on a full disk; writing through a mapping would kill the process.
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
            f"the frames of {path} do not fit into memory, and remote storage has no place for a cache; pass a "
            f"directory, or stream them (data.mode=stream)"
        )
    return Path(f"{path.rstrip('/')}.cache")
