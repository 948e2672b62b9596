"""The run folder, which contains all files of a training run.

config.json        the complete configuration, and the format version of the folder
provenance.json    data fingerprint, commit, versions, hardware, seeds, the number of threads that was fastest
metrics.jsonl      one line of figures for each logged step
diagnostics.json   the latest diagnostics of the latents, and alarms
tensorboard/       the same figures for TensorBoard, if the extra `tensorboard` is installed
checkpoints/       the last two checkpoints, for resuming
model/             the trained model
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field

from worldloom.core.config import Shape, check_shape
from worldloom.core.errors import StorageError, TrainingError
from worldloom.core.files import (
    exclusive_lock,
    lines_of,
    read_document,
    read_json,
    storage_errors,
    write_document,
    write_json,
    write_text,
)
from worldloom.core.json_text import parse_json
from worldloom.core.processes import is_first

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


_KIND = "worldloom run"


class _Provenance(Shape):
    data: str = ""


class _MetricsLine(Shape):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float]

    step: int


class _MetricsFile(Shape):
    lines: tuple[_MetricsLine, ...]


class _Alarm(Shape):
    name: str


class _Diagnostics(Shape):
    figures: dict[str, float | None] = Field(default_factory=dict)  # None: not finite
    alarms: tuple[_Alarm, ...] = ()


class RunFolder:
    """The folder of one run; use `create` or `open`.

    Under torchrun every rank has a `RunFolder`, but only rank 0 writes files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writes = is_first()
        self._tensorboard: SummaryWriter | None = None

    @classmethod
    def create(cls, path: Path | str, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> "RunFolder":
        """Create a folder with `config` and `provenance`, both JSON.

        Raises:
            StorageError: the folder already contains a run, or cannot be written.
        """
        run = cls(Path(path))
        if not run._writes:
            return run
        if (run.path / "config.json").exists():
            raise StorageError(f"{run.path} already contains a run; resume it (--resume) or choose another folder")
        write_json(run.path / "provenance.json", dict(provenance))
        run.reconfigure(config)  # last, because config.json marks the folder as a run
        return run

    @classmethod
    def open(cls, path: Path | str) -> "RunFolder":
        """Open an existing run folder.

        Raises:
            StorageError: `path` is not a run folder.
        """
        run = cls(Path(path))
        if not (run.path / "config.json").is_file():
            raise StorageError(f"{run.path} is not a run folder, because it has no config.json; check the path")
        return run

    def withdraw(self) -> None:
        """Undo `create` if nothing was trained, so that the folder can be used for another configuration."""
        if self._writes and not any((self.path / name).exists() for name in ("metrics.jsonl", "checkpoints", "model")):
            with storage_errors(self.path):
                for name in ("config.json", "provenance.json"):
                    (self.path / name).unlink(missing_ok=True)

    def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Replace the configuration."""
        write_document(self.path / "config.json", _KIND, config)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration from `create` or the latest `reconfigure`.

        Raises:
            StorageError: config.json is damaged, or its format version is not supported.
        """
        return read_document(self.path / "config.json", _KIND)

    @property
    def provenance(self) -> dict[str, Any]:
        """The provenance from `create`, and the number of threads from `record_threads`, if any.

        Raises:
            StorageError: provenance.json is missing or damaged.
        """
        path = self.path / "provenance.json"
        provenance: dict[str, Any] = read_json(path)
        check_shape(provenance, _Provenance, path)
        return provenance

    @property
    def threads(self) -> int | None:
        """The number of CPU threads that the run measured and chose; None if the run did not measure."""
        chosen: int | None = self.provenance.get("threads", {}).get("chosen")
        return chosen

    def record_threads(self, chosen: int, seconds: Mapping[int, float]) -> None:
        """Add the chosen number of CPU threads to the provenance, with the mean seconds of a step for each number."""
        measured = {str(count): round(mean, 5) for count, mean in seconds.items()}
        provenance = {**self.provenance, "threads": {"chosen": chosen, "seconds_per_step": measured}}
        write_json(self.path / "provenance.json", provenance)

    @property
    def model_directory(self) -> Path:
        """The directory for `save_model` and `load_model`."""
        return self.path / "model"

    @property
    def checkpoint_directory(self) -> Path:
        """The directory of the checkpoints."""
        return self.path / "checkpoints"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder for this process.

        Raises:
            TrainingError: another process is training in the folder.
        """
        if not self._writes:
            yield
            return
        other = TrainingError(
            f"another process is training in {self.path}; wait until it ends, or choose another folder"
        )
        with exclusive_lock(self.path / ".lock", other):
            yield

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Append one line of figures to metrics.jsonl, and also write the figures for TensorBoard if it is installed.

        Figures that are not finite are left out, because JSON cannot represent them.
        """
        if not self._writes:
            return
        finite = {name: float(value) for name, value in figures.items() if math.isfinite(value)}
        path = self.path / "metrics.jsonl"
        line = json.dumps({"step": step, **finite}, allow_nan=False) + "\n"
        with storage_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(line)  # one write and one flush, so that readers get complete lines
        writer = self._writer(step)
        if writer is not None:
            for name, value in finite.items():
                writer.add_scalar(name, value, step)

    def metrics(self) -> list[dict[str, Any]]:
        """Read the logged lines; an incomplete last line (after a crash) is left out.

        Raises:
            StorageError: any other line is damaged.
        """
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return []
        lines: list[dict[str, Any]] = []
        for number, line in enumerate(lines_of(path), 1):
            if line.endswith(b"\n"):
                try:
                    lines.append(parse_json(line))
                except ValueError as error:
                    raise StorageError(
                        f"line {number} of {path} is not valid JSON ({error}); delete the line"
                    ) from None
        check_shape({"lines": lines}, _MetricsFile, path)
        return lines

    def forget_after(self, step: int) -> None:
        """Delete the logged lines of steps after `step`, which a resumed run will write again."""
        if self._writes:
            kept = [json.dumps(line) + "\n" for line in self.metrics() if line["step"] <= step]
            write_text(self.path / "metrics.jsonl", "".join(kept))

    def write_diagnostics(self, values: Mapping[str, Any]) -> None:
        """Write diagnostics.json."""
        if self._writes:
            write_json(self.path / "diagnostics.json", dict(values))

    def diagnostics(self) -> dict[str, Any]:
        """Read diagnostics.json; an empty dictionary if training has not written it yet.

        Raises:
            StorageError: diagnostics.json is damaged.
        """
        path = self.path / "diagnostics.json"
        diagnostics: dict[str, Any] = read_json(path) if path.is_file() else {}
        check_shape(diagnostics, _Diagnostics, path)
        return diagnostics

    def close(self) -> None:
        """Flush and close the TensorBoard log."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def _writer(self, step: int) -> "SummaryWriter | None":
        if self._tensorboard is None and find_spec("tensorboard") is not None:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)
        return self._tensorboard
