"""Views of a memory for people and other programs: a summary, a picture sheet, an exported file."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from PIL import Image

from worldloom.core.errors import ConfigError
from worldloom.core.files import require_writable, write_atomic
from worldloom.core.progress import SILENT, Progress
from worldloom.data import to_rgb, write_sheet
from worldloom.memory.episodic import EpisodicMemory
from worldloom.memory.records import COLUMNS, Memories, moment

_ROW, _BATCH = 6, 1024


def summarise(memory: EpisodicMemory) -> dict[str, Any]:
    """Return a summary of a memory, as JSON values."""
    memories = memory.read()
    outcomes = Counter(memories.outcomes.tolist())
    del outcomes[""]
    measured = memories.surprises[~np.isnan(memories.surprises)]
    return {
        "memories": len(memories),
        "stretches": len(np.unique(memories.episodes)),
        "from": moment(memories.times.min()) if len(memories) else None,
        "to": moment(memories.times.max()) if len(memories) else None,
        "outcomes": dict(outcomes.most_common()),
        "surprise, mean": float(measured.mean()) if len(measured) else None,
        "waiting in the journal": memory.pending,
        "in the index": memory.indexed,
        "bytes": memory.stored_bytes(),
        "model": memory.spec.model,
        "latent size": memory.spec.latent_dim,
        "frames": list(memory.spec.frame_shape) if memory.spec.frame_shape else None,
        "config": memory.spec.config.model_dump(mode="json"),
    }


def as_rows(memories: Memories) -> list[dict[str, Any]]:
    """Return a row of plain values for each memory, without latents and actions."""
    return [
        {
            "id": int(memories.ids[row]),
            "time": moment(memories.times[row]),
            "episode": int(memories.episodes[row]),
            "step": int(memories.steps[row]),
            "surprise": None if np.isnan(memories.surprises[row]) else float(memories.surprises[row]),
            "outcome": str(memories.outcomes[row]),
        }
        for row in range(len(memories))
    ]


def draw_memories(memory: EpisodicMemory, ids: Int64[np.ndarray, "M"], captions: list[str], path: Path) -> None:
    """Write a PNG of the frames of memories, each with its caption.

    Raises:
        DataError: no frames were stored, or a memory does not exist.
    """
    frames = memory.pictures(ids)
    places = [slice(first, first + _ROW) for first in range(0, len(ids), _ROW)]
    write_sheet([(captions[place], frames[place]) for place in places], path)


def export(memory: EpisodicMemory, path: Path, *, progress: Progress = SILENT) -> int:
    """Write all memories to a `.parquet` or `.jsonl` file for other tools; return the number of memories.

    Parquet files also contain the stored frames, as PNG in the column `image`; JSON lines contain all other columns.

    Raises:
        ConfigError: the file name has a different suffix.
        StorageError: the file cannot be written.
    """
    writers = {".parquet": _write_parquet, ".jsonl": _write_lines}
    if path.suffix not in writers:
        raise ConfigError(f"expected a file name that ends in .parquet or .jsonl; got {path}")
    require_writable(path)
    memories = memory.read()
    with progress.task(f"exporting to {path.name}", len(memories), "memory") as task:
        batches = [memories[first : first + _BATCH] for first in range(0, len(memories), _BATCH)]
        write_atomic(path, lambda temporary: writers[path.suffix](memory, batches, temporary, task.advance))
    return len(memories)


def _write_parquet(memory: EpisodicMemory, batches: list[Memories], path: Path, advance: Any) -> None:
    import pyarrow.parquet as pq

    pictured = memory.spec.frame_shape is not None
    moments = pa.timestamp("us", tz="UTC")
    fields = [memory.spec.schema().field(name).with_nullable(True) for name in COLUMNS]
    fields[COLUMNS.index("time")] = pa.field("time", moments)
    image = [pa.field("image", pa.binary())] if pictured else []
    schema = pa.schema(fields + image, metadata={"model": memory.spec.model})
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in batches:
            columns = batch.columns()
            columns["time"] = pa.array((batch.times * 1e6).astype(np.int64), moments)
            columns["surprise"] = pa.array(batch.surprises, from_pandas=True)
            if pictured:
                columns["image"] = pa.array([_png(frame) for frame in to_rgb(memory.pictures(batch.ids))], pa.binary())
            writer.write_table(pa.table(columns, schema=schema))
            advance(len(batch))


def _write_lines(memory: EpisodicMemory, batches: list[Memories], path: Path, advance: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        for batch in batches:
            for row, values in enumerate(as_rows(batch)):
                numbers = {"latent": batch.latents[row].tolist(), "action": batch.actions[row].tolist()}
                file.write(json.dumps({**values, **numbers}, allow_nan=False) + "\n")
            advance(len(batch))


def _png(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG")
    return buffer.getvalue()
