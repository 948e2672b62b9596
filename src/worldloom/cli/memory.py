"""`worldloom memory`: build, inspect and maintain the episodic memory of an agent."""

import math
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from worldloom.cli.console import answer, progress, table, values_table
from worldloom.cli.options import Json
from worldloom.core.errors import ConfigError
from worldloom.core.files import require_writable

app = typer.Typer(help="Build, inspect and maintain the episodic memory of an agent.", no_args_is_help=True)
Memory = Annotated[Path, typer.Argument(help="The directory of the memory.")]


@app.command()
def remember(
    path: Memory,
    run: Annotated[Path, typer.Argument(help="The run folder of the model.")],
    data: Annotated[str, typer.Argument(help="The dataset to remember.")],
    frames: Annotated[str, typer.Option(help="How a new memory stores frames: whole, thumbnail or none.")] = "whole",
    capacity: Annotated[int, typer.Option(help="The maximum number of memories of a new memory.")] = 1_000_000,
    json: Json = False,
) -> None:
    """Encode the episodes of a dataset into a memory; create the memory if it is missing."""
    from worldloom.memory import EpisodicMemory, MemoryConfig
    from worldloom.workflow import Run
    from worldloom.workflow import remember as append

    opened = Run.open(run)
    config = MemoryConfig.parse({"frames": frames, "capacity": capacity})
    with EpisodicMemory.open_or_create(path, spec=opened.model.spec, config=config) as memory:
        count = append(opened, data, memory, progress=progress())
        total = len(memory)
    found = {"memory": path, "appended": count, "memories": total}
    answer(json, found, f"{path}: {count:,} memories appended, {total:,} in total")


@app.command()
def inspect(path: Memory, json: Json = False) -> None:
    """Show what a memory contains."""
    from worldloom.memory import EpisodicMemory, summarise

    with EpisodicMemory.open(path, spec=None) as memory:
        summary = summarise(memory)
    answer(json, summary, values_table(str(path), summary))


@app.command()
def recall(
    path: Memory,
    like: Annotated[
        int | None, typer.Option("--id", help="Recall memories similar to the memory with this id.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Recall memories similar to this picture; needs --run.")] = None,
    run: Annotated[Path | None, typer.Option(help="The run whose model encodes the picture.")] = None,
    count: Annotated[int, typer.Option("-k", "--count", min=1, help="The number of memories.")] = 6,
    since: Annotated[
        str | None,
        typer.Option(help="Only memories since this time, such as 2026-01-31T12:00 (UTC), or age, such as 2h or 3d."),
    ] = None,
    until: Annotated[str | None, typer.Option(help="Only memories before this time or age.")] = None,
    episode: Annotated[int | None, typer.Option(help="Only memories of this episode.")] = None,
    outcome: Annotated[str | None, typer.Option(help="Only memories with this outcome.")] = None,
    min_surprise: Annotated[float | None, typer.Option(help="Only memories with at least this surprise.")] = None,
    out: Annotated[Path | None, typer.Option(help="Draw the memories into this PNG.")] = None,
    json: Json = False,
) -> None:
    """Show the newest memories, or the memories most similar to a memory or to a picture."""
    import numpy as np
    import torch

    from worldloom.memory import EpisodicMemory, Where, as_rows, draw_memories
    from worldloom.workflow import Run, encode_picture

    if (image is None) != (run is None) or (image is not None and like is not None):
        raise ConfigError(
            "expected --id only, --image together with --run, or none of these for the newest memories; got another "
            "combination. Add or remove options"
        )
    if out is not None:
        require_writable(out)
    where = Where(
        since=_moment(since, "--since"),
        until=_moment(until, "--until"),
        episode=episode,
        outcome=outcome,
        min_surprise=min_surprise,
    )
    with EpisodicMemory.open(path, spec=None) as memory:
        if like is None and image is None:
            memories = memory.read(where, newest=count)
            distances = np.full(len(memories), np.nan)
        else:
            if image is not None and run is not None:
                query = encode_picture(Run.open(run), image, memory)
            else:
                query = torch.from_numpy(memory.get(np.array([like])).latents)
            found = memory.recall(query, count, where=where)
            there = found.ids[0] >= 0
            memories, distances = memory.get(found.ids[0][there]), found.distances[0][there]
        rows = [
            row | {"surprise": _short(surprise), "distance": _short(gap)}
            for row, surprise, gap in zip(
                as_rows(memories), memories.surprises.tolist(), distances.tolist(), strict=True
            )
        ]
        if out is not None and len(memories):
            captions = [f"{row['id']}  {row['outcome']}" for row in rows]
            draw_memories(memory, memories.ids, captions, out)
    columns = list(rows[0]) if rows else ["id"]
    shown = [["" if row[key] is None else str(row[key]) for key in columns] for row in rows]
    written = [f"wrote {out}"] if out is not None and rows else []
    answer(json, rows, table(f"{len(rows)} of {path}", columns, shown), *written)


@app.command()
def prune(
    path: Memory,
    keep: Annotated[int, typer.Option(min=1, help="The number of memories to keep.")],
    json: Json = False,
) -> None:
    """Delete the most redundant memories until only the given number remains."""
    from worldloom.memory import EpisodicMemory

    with EpisodicMemory.open(path, spec=None, writable=True) as memory:
        forgotten = memory.prune(keep, progress=progress())
        kept = len(memory)
    found = {"kept": kept, "forgotten": forgotten}
    answer(json, found, f"{path}: forgot {forgotten:,} memories, kept {kept:,}")


@app.command()
def export(
    path: Memory,
    out: Annotated[Path, typer.Argument(help="A file that ends in .parquet or .jsonl.")],
    json: Json = False,
) -> None:
    """Write all memories to a file for other tools."""
    from worldloom.memory import EpisodicMemory
    from worldloom.memory import export as write

    with EpisodicMemory.open(path, spec=None) as memory:
        count = write(memory, out, progress=progress())
    answer(json, {"path": out, "memories": count}, f"wrote {count:,} memories to {out}")


@app.command()
def reencode(
    path: Memory, run: Annotated[Path, typer.Argument(help="The run folder of the model.")], json: Json = False
) -> None:
    """Re-encode all memories with the model of a run."""
    from worldloom.memory import EpisodicMemory
    from worldloom.workflow import Run

    model = Run.open(run).model
    with EpisodicMemory.open(path, spec=None, writable=True) as memory:
        memory.reencode(model, progress=progress())
        count = len(memory)
    found = {"memory": path, "memories": count, "run": run}
    answer(json, found, f"{path}: {count:,} memories now have latents of {run}")


@app.command()
def migrate(path: Memory, json: Json = False) -> None:
    """Convert a memory from an older version of the format to the current one."""
    from worldloom.memory import migrate as bring

    versions = bring(path, progress=progress())
    nothing = "" if versions[1:] else ", nothing to do"
    answer(json, {"versions": versions}, f"{path}: version {' -> '.join(map(str, versions))}{nothing}")


def _short(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def _moment(text: str | None, option: str) -> float | None:
    """Parse a time or an age as seconds since 1970."""

    if text is None:
        return None
    if age := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text):
        return time.time() - float(age[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[age[2]]
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            f"expected {option} as a time such as 2026-01-31T12:00, or an age such as 2h or 3d; got {text!r}"
        ) from None
    return (read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp()
