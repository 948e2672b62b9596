"""The run folder: everything that one training leaves behind.

config.json        the configuration, whole, and the version of the format of this folder
provenance.json    data fingerprint, commit, versions, hardware, seeds
metrics.jsonl      one line of figures for each logged step
diagnostics.json   the last figures of the latents, and alarms
tensorboard/       the same figures for TensorBoard, where the extra `tensorboard` is installed
checkpoints/       what resuming needs; the last two
model/             the trained model
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldloom.core.errors import StorageError, TrainingError
from worldloom.core.files import (
    exclusive_lock,
    read_document,
    read_json,
    storage_errors,
    write_document,
    write_json,
    write_text,
)
from worldloom.core.processes import is_first

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


_KIND = "worldloom run"


class RunFolder:
    """One run's folder; made by `create` or `open`.

    Under torchrun every rank makes one, and only the first of them writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writes = is_first()
        self._tensorboard: SummaryWriter | None = None

    @classmethod
    def create(cls, path: Path | str, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> "RunFolder":
        """Make a folder with `config` and `provenance`, both JSON.

        Raises:
            StorageError: a run is there already, or the disk refuses.
        """
        run = cls(Path(path))
        if not run._writes:
            return run
        if (run.path / "config.json").exists():
            raise StorageError(f"{run.path} holds a run already; resume it (--resume) or choose another folder")
        write_json(run.path / "provenance.json", dict(provenance))
        run.reconfigure(config)  # last: what makes the folder a run
        return run

    @classmethod
    def open(cls, path: Path | str) -> "RunFolder":
        """Open a folder made before.

        Raises:
            StorageError: there is no run at `path`.
        """
        run = cls(Path(path))
        if not (run.path / "config.json").is_file():
            raise StorageError(f"{run.path} is not a run: it has no config.json; check the path")
        return run

    def withdraw(self) -> None:
        """Undo `create` if nothing has been trained, so that the folder is free for another configuration."""
        if self._writes and not any((self.path / name).exists() for name in ("metrics.jsonl", "checkpoints", "model")):
            with storage_errors(self.path):
                for name in ("config.json", "provenance.json"):
                    (self.path / name).unlink(missing_ok=True)

    def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Replace the configuration."""
        write_document(self.path / "config.json", _KIND, config)

    @property
    def config(self) -> dict[str, Any]:
        """What was given to `create` or, later, to `reconfigure`.

        Raises:
            StorageError: config.json is damaged, or of another version of the format.
        """
        return read_document(self.path / "config.json", _KIND)

    @property
    def provenance(self) -> dict[str, Any]:
        """What was given to `create`."""
        provenance: dict[str, Any] = read_json(self.path / "provenance.json")
        return provenance

    @property
    def model_directory(self) -> Path:
        """Where `save_model` and `load_model` find the model."""
        return self.path / "model"

    @property
    def checkpoint_directory(self) -> Path:
        """Where training keeps what resuming needs."""
        return self.path / "checkpoints"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one training.

        Raises:
            TrainingError: another process is training in it.
        """
        if not self._writes:
            yield
            return
        other = TrainingError(f"another training is writing {self.path}; wait for it to end or choose another folder")
        with exclusive_lock(self.path / ".lock", other):
            yield

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Append one line of figures to metrics.jsonl, and write them for TensorBoard where it is installed.

        Figures that are not finite are left out: JSON cannot hold them.
        """
        if not self._writes:
            return
        finite = {name: float(value) for name, value in figures.items() if math.isfinite(value)}
        path = self.path / "metrics.jsonl"
        line = json.dumps({"step": step, **finite}, allow_nan=False) + "\n"
        with storage_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(line)  # one write and one flush: a reader sees whole lines
        writer = self._writer(step)
        if writer is not None:
            for name, value in finite.items():
                writer.add_scalar(name, value, step)

    def metrics(self) -> list[dict[str, Any]]:
        """Read the logged lines; a last line cut off by a crash is left out.

        Raises:
            StorageError: another line is damaged.
        """
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return []
        with storage_errors(path):
            content = path.read_bytes()
        lines: list[dict[str, Any]] = []
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            if line.endswith(b"\n"):
                try:
                    lines.append(json.loads(line))
                except ValueError as error:
                    raise StorageError(f"line {number} of {path} is not whole JSON ({error}); delete it") from None
        return lines

    def forget_after(self, step: int) -> None:
        """Drop the lines past `step`, which a resumed training will write again."""
        if self._writes:
            kept = [json.dumps(line) + "\n" for line in self.metrics() if line["step"] <= step]
            write_text(self.path / "metrics.jsonl", "".join(kept))

    def write_diagnostics(self, values: Mapping[str, Any]) -> None:
        """Write diagnostics.json."""
        if self._writes:
            write_json(self.path / "diagnostics.json", dict(values))

    def diagnostics(self) -> dict[str, Any]:
        """Read diagnostics.json; empty before training has written it."""
        path = self.path / "diagnostics.json"
        return read_json(path) if path.is_file() else {}

    def close(self) -> None:
        """Flush the figures for TensorBoard."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def _writer(self, step: int) -> "SummaryWriter | None":
        if self._tensorboard is None and find_spec("tensorboard") is not None:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)
        return self._tensorboard
