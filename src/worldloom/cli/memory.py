"""`worldloom memory`: look into an agent's episodic memory, and tend it."""

import math
from pathlib import Path
from typing import Annotated

import typer

from worldloom.cli.options import Json

app = typer.Typer(help="Look into an agent's episodic memory, and tend it.", no_args_is_help=True)
Memory = Annotated[Path, typer.Argument(help="The memory's directory.")]


@app.command()
def remember(
    path: Memory,
    run: Annotated[Path, typer.Argument(help="The run folder of the model.")],
    data: Annotated[str, typer.Argument(help="The dataset to remember.")],
    frames: Annotated[str, typer.Option(help="What a new memory keeps of frames: whole, thumbnail or none.")] = "whole",
    capacity: Annotated[int, typer.Option(help="How many memories a new memory holds before it forgets.")] = 1_000_000,
) -> None:
    """Remember logs: encode a dataset's episodes into a memory, made where there is none."""
    from worldloom.cli.console import progress, say
    from worldloom.memory import EpisodicMemory, MemoryConfig
    from worldloom.workflow import Run
    from worldloom.workflow import remember as append

    opened = Run.open(run)
    config = MemoryConfig.parse({"frames": frames, "capacity": capacity})
    with EpisodicMemory.open_or_create(path, spec=opened.model.spec, config=config) as memory:
        count = append(opened, data, memory, progress=progress())
        say(f"{path}: {count:,} memories appended, {len(memory):,} in all")


@app.command()
def inspect(path: Memory, json: Json = False) -> None:
    """Say what a memory holds."""
    from worldloom.cli.console import print_json, print_table
    from worldloom.memory import EpisodicMemory, summarise

    with EpisodicMemory.open(path, spec=None) as memory:
        summary = summarise(memory)
    if json:
        print_json(summary)
    else:
        print_table(str(path), ["", "value"], [[key, str(value)] for key, value in summary.items()])


@app.command()
def recall(
    path: Memory,
    like: Annotated[int | None, typer.Option("--id", help="Recall what is like the memory of this id.")] = None,
    image: Annotated[Path | None, typer.Option(help="Recall what is like this picture; needs --run.")] = None,
    run: Annotated[Path | None, typer.Option(help="The run whose model encodes the picture.")] = None,
    count: Annotated[int, typer.Option("-k", "--count", min=1, help="How many.")] = 6,
    since: Annotated[
        str | None, typer.Option(help="Not before: a time such as 2026-01-31T12:00 (UTC), or an age such as 2h, 3d.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Before: a time or an age.")] = None,
    episode: Annotated[int | None, typer.Option(help="Only of this stretch of experience.")] = None,
    outcome: Annotated[str | None, typer.Option(help="Only with this outcome.")] = None,
    min_surprise: Annotated[float | None, typer.Option(help="Only as surprising as this.")] = None,
    out: Annotated[Path | None, typer.Option(help="Draw them into this PNG.")] = None,
    json: Json = False,
) -> None:
    """Show memories: like one of them or like a picture, or the newest."""
    import numpy as np
    import torch

    from worldloom.cli.console import print_json, print_table, say
    from worldloom.core.errors import ConfigError
    from worldloom.memory import EpisodicMemory, Where, as_rows, draw_memories
    from worldloom.workflow import Run, encode_picture

    if (image is None) != (run is None) or (image is not None and like is not None):
        raise ConfigError("expected --id, or --image together with --run, or none of them for the newest memories")
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
    if json:
        print_json(rows)
        return
    columns = list(rows[0]) if rows else ["id"]
    shown = [["" if row[key] is None else str(row[key]) for key in columns] for row in rows]
    print_table(f"{len(rows)} of {path}", columns, shown)
    if out is not None and rows:
        say(f"wrote {out}")


@app.command()
def prune(
    path: Memory, keep: Annotated[int, typer.Option(min=1, help="How many memories to keep.")], json: Json = False
) -> None:
    """Forget what is told again elsewhere, until so many memories are left."""
    from dataclasses import asdict

    from worldloom.cli.console import print_json, say
    from worldloom.memory import EpisodicMemory

    with EpisodicMemory.open(path, spec=None, writable=True) as memory:
        report = memory.prune(keep)
    if json:
        print_json(asdict(report))
    else:
        say(f"{path}: forgot {report.forgotten:,} memories, kept {report.kept:,}")


@app.command()
def export(path: Memory, out: Annotated[Path, typer.Argument(help="A file that ends in .parquet or .jsonl.")]) -> None:
    """Write all memories to a file for other tools."""
    from worldloom.cli.console import progress, say
    from worldloom.memory import EpisodicMemory
    from worldloom.memory import export as write

    with EpisodicMemory.open(path, spec=None) as memory:
        count = write(memory, out, progress=progress())
    say(f"wrote {count:,} memories to {out}")


@app.command()
def reencode(path: Memory, run: Annotated[Path, typer.Argument(help="The run folder of the model.")]) -> None:
    """Encode all memories anew, with the model of a run."""
    from worldloom.cli.console import progress, say
    from worldloom.memory import EpisodicMemory
    from worldloom.workflow import Run

    model = Run.open(run).model
    with EpisodicMemory.open(path, spec=None, writable=True) as memory:
        memory.reencode(model, progress=progress())
        say(f"{path}: {len(memory):,} memories now hold latents of {run}")


@app.command()
def migrate(path: Memory) -> None:
    """Bring a memory of an older version of the format to this one."""
    from worldloom.cli.console import say
    from worldloom.memory import migrate as bring

    versions = bring(path)
    say(f"{path}: version {' -> '.join(map(str, versions))}" + ("" if versions[1:] else ", nothing to do"))


def _short(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def _moment(text: str | None, option: str) -> float | None:
    """Read a time or an age as seconds since 1970."""
    import re
    import time
    from datetime import UTC, datetime

    from worldloom.core.errors import ConfigError

    if text is None:
        return None
    if age := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text):
        return time.time() - float(age[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[age[2]]
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            f"{option} {text!r} is no time; expected one such as 2026-01-31T12:00, or an age such as 2h or 3d"
        ) from None
    return (read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp()
