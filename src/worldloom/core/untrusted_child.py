"""The child process of untrusted.py: reads files with limits on memory and time, and names each file beforehand.

It is run as a script and imports nothing of worldloom, because importing PyTorch would take seconds. The process stays
for further requests, with the libraries that it has imported. Each request is read by a fork of the process.
"""

import importlib
import json
import os
import resource
import select
import signal
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_SLAB = 2**25  # bytes read at a time
_MOST_EXPANSION = 2000  # of a file's size by decompression; deflate, the densest common filter, reaches 1032
MOST_PIXELS = 2**26  # of a picture
_FRAMES = 8  # of a video that are decoded
# Other formats start programs (EPS), or name further files or addresses to read (playlists).
PICTURE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
VIDEO_FORMATS = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi", "protocol_whitelist": "file"}
_IDLE = 60.0  # seconds without a request after which the process ends


class Harmful(Exception):
    """A file that the parent must not read. The arguments are the reason and, optionally, the remedy."""


def say(what: str, told: str | Sequence[int | str] = "") -> None:
    """Write a line of ASCII to the parent, after a line break, because a library may have printed text without one."""
    sys.stdout.write(f"\n{what} {json.dumps(told)}\n")
    sys.stdout.flush()


def rows_at_a_time(rows: int, size: int) -> int:
    """Return how many rows of a table make a slab, so that tables of large pictures need little memory."""
    return max(1, min(1024, _SLAB * rows // max(size, 1)))


def check_footer(path: str) -> None:
    """Refuse a Lance file whose footer points outside of the file; a truncated file has no footer."""
    with Path(path).open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 40))
        footer = file.read()
    if len(footer) < 40 or not footer.endswith(b"LANC"):
        return
    if path.endswith(".manifest"):
        inside = struct.unpack("<Q", footer[-16:-8])[0] < size
    else:
        *places, buffers, columns = struct.unpack("<QQQII", footer[:32])
        inside = max(places) < size and 16 * (buffers + columns) < size
    if not inside:
        raise Harmful("found a footer that points outside of the file")


def check_growth(total: int, size: int, rows: int) -> int:
    """Refuse a table of `size` bytes whose rows so far need far more memory; return `total`, the bytes so far."""
    if total > _MOST_EXPANSION * size + 2**26:
        raise Harmful(f"found that its {rows:,} rows need more than {total:,} bytes")
    return total


def lance_table(request: dict[str, Any]) -> None:
    """Read all columns of each fragment of a table that has an unknown file, and check the buffers of its rows."""
    import lance

    for file in request["files"]:
        say("file", file)
        check_footer(file)
    manifests = [file for file in request["files"] if file.endswith(".manifest")]
    say("file", (manifests or [request["table"]])[-1])
    table = lance.dataset(request["table"], version=request["version"])
    assert table.schema is not None
    known = {file.rpartition("/")[2] for file in request["known"]}
    for fragment in table.get_fragments():
        names, deletions = [file.path for file in fragment.data_files()], fragment.deletion_file()
        files = [f"data/{name}" for name in names] + (
            [f"_deletions/{deletions.rpartition('/')[2]}"] if deletions else []
        )
        unknown = [file for file in files if file.rpartition("/")[2] not in known]
        overlays = getattr(fragment.metadata, "overlays", [])  # unknown to older versions of Lance
        if files and not unknown and not overlays:
            continue
        say("file", "/".join([request["table"], *unknown[:1]]))
        try:
            size = sum(Path(request["table"], "data", name).stat().st_size for name in names)
            total, rows = 0, rows_at_a_time(fragment.count_rows(), size)
            for batch in fragment.to_batches(batch_size=rows, batch_readahead=2):
                batch.validate(full=True)
                total = check_growth(total + batch.nbytes, size, fragment.count_rows())
        except Harmful:
            raise
        except Exception:  # the caller finds out which of its files cannot be read
            pass


def refuse_other_files(item: Any) -> None:
    """Refuse an HDF5 group or dataset that takes values from another file, which may be any file of the user."""
    import h5py

    others: list[tuple[str, str]] = []
    if isinstance(item, h5py.Group):
        for name in item:
            try:
                link = item.get(name, getlink=True)
            except TypeError:
                raise Harmful(f"found {item.name!r}, which has a link of an unknown type") from None
            if isinstance(link, h5py.ExternalLink):
                others.append((f"{item.name.rstrip('/')}/{name}", link.filename))
    elif isinstance(item, h5py.Dataset):
        sources = [name for name, *_ in item.external or ()]
        sources += [source.file_name for source in item.virtual_sources()] if item.is_virtual else []
        others = [(item.name, source) for source in sources if source != "."]
    for name, other in others:
        raise Harmful(
            f"found that {name!r} takes its values from another file, {other!r}", "Copy the values into this file"
        )


def hdf5(path: str) -> None:
    """Read all attributes and values."""
    import h5py

    with suppress(ImportError):
        importlib.import_module("hdf5plugin")
    size = Path(path).stat().st_size
    with h5py.File(path, "r") as file:

        def visit(name: str, item: Any) -> None:
            refuse_other_files(item)
            for key in item.attrs:
                with suppress(OSError, KeyError, RuntimeError, TypeError, ValueError):
                    item.attrs[key]
            if not isinstance(item, h5py.Dataset) or item.shape is None:
                return
            width = item.dtype.itemsize
            for length in item.shape:
                width *= length
            if width > _MOST_EXPANSION * size + 2**20:
                raise Harmful(f"found {name!r}, which claims {width:,} bytes in a file of {size:,}")
            with suppress(OSError, KeyError, RuntimeError, TypeError, ValueError):
                if not item.shape or not width:
                    item[()]
                    return
                rows = max(1, _SLAB * item.shape[0] // width)
                for first in range(0, item.shape[0], rows):
                    item[first : first + rows]

        visit("/", file)
        file.visititems(visit)


def video(path: str) -> None:
    """Read all packets, and decode the first frames."""
    import av

    av.logging.set_level(av.logging.PANIC)
    with av.open(path, options=VIDEO_FORMATS) as container:
        stream = container.streams.video[0]
        for _, frame in zip(range(_FRAMES), container.decode(stream), strict=False):
            frame.to_ndarray(format="rgb24")
    with av.open(path, options=VIDEO_FORMATS) as container:
        for _ in container.demux(container.streams.video[0]):
            pass


def picture(path: str) -> None:
    """Decode a picture."""
    from PIL import Image

    with Image.open(path, formats=PICTURE_FORMATS) as image:
        if image.width * image.height <= MOST_PIXELS:  # the parent refuses a larger picture before it is decoded
            image.load()


def parquet(path: str) -> None:
    """Read all columns, and check the buffers of the rows."""
    import pyarrow.parquet

    file, size, total = pyarrow.parquet.ParquetFile(path), Path(path).stat().st_size, 0
    for batch in file.iter_batches(rows_at_a_time(file.metadata.num_rows, size)):
        batch.validate(full=True)
        total = check_growth(total + batch.nbytes, size, file.metadata.num_rows)


READERS: dict[str, Callable[[str], None]] = {"hdf5": hdf5, "video": video, "picture": picture, "parquet": parquet}
LIBRARIES = {
    "lance": ("lance",),
    "hdf5": ("h5py", "hdf5plugin"),
    "video": ("av",),
    "picture": ("PIL.Image",),
    "parquet": ("pyarrow.parquet",),
}


def guarded(read: Callable[[Any], None], argument: Any) -> None:
    """Call a reader. Ignore ordinary exceptions; report an error that would harm the parent, and end the process."""
    try:
        read(argument)
    except Harmful as error:
        say("refused", list(error.args))
        sys.exit(3)
    except MemoryError:
        say("refused", ["needed more memory than the limit"])
        sys.exit(3)
    except Exception:  # the parent meets an ordinary error again, and reports it in its own words
        pass
    except BaseException as error:  # a panic of a library in Rust, which is no Exception
        say("refused", ["failed inside a library: " + " ".join(str(error).split())[:200]])
        sys.exit(3)


def read(request: dict[str, Any]) -> None:
    """Read the files of a request, with its limits."""
    signal.alarm(int(request["seconds"]))
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (request["memory"], request["memory"]))
    if request["kind"] == "lance":
        guarded(lance_table, request)
    else:
        for file in request["files"]:
            say("file", file)
            guarded(READERS[request["kind"]], file)
    say("done")


def read_in_fork(request: dict[str, Any]) -> list[int | str]:
    """Read the files of a request in a fork of this process; return its exit code and its last error output."""
    for library in LIBRARIES[request["kind"]]:
        with suppress(Exception):  # the reader meets the error again
            importlib.import_module(library)
    warnings.simplefilter("ignore")  # Lance warns of forks, because its threads end; before the fork it has none
    with tempfile.TemporaryFile() as errors:
        pid = os.fork()
        if not pid:
            code = 1
            try:
                os.dup2(errors.fileno(), 2)
                read(request)
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        errors.seek(max(0, errors.seek(0, 2) - 4000))
        return [os.waitstatus_to_exitcode(status), errors.read().decode(errors="replace")]


def main() -> None:
    """Serve the requests on standard input, one line each, until the input ends or no request comes for a while."""
    while select.select([sys.stdin], [], [], _IDLE)[0] and (line := sys.stdin.buffer.readline()):
        say("ended", read_in_fork(json.loads(line)))


if __name__ == "__main__":
    main()
