"""`worldloom explore`: let an agent explore new worlds and remember them."""

from pathlib import Path
from typing import Annotated

import typer

from worldloom.cli.console import answer, progress
from worldloom.cli.options import Imports, Json, Simulator, Threads, open_session


def explore(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    memory: Annotated[Path, typer.Option(help="The directory of the memory; created if it is missing.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps in each world.")] = 2000,
    method: Annotated[str | None, typer.Option(help="A method that explores; by default, the recipe's choice.")] = None,
    protocol: Annotated[
        str | None, typer.Option(help="The protocol of the worlds; by default, the run's protocol.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="One split of the protocol; by default, all.")] = None,
    episodes: Annotated[int | None, typer.Option(min=1, help="The number of worlds of each split.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The root of the seeds of the worlds.")] = None,
    simulator: Simulator = False,
    threads: Threads = 0,
    imports: Imports = None,
    json: Json = False,
) -> None:
    """Explore the worlds of a protocol's episodes by curiosity, and remember what was observed.

    Then run 'worldloom evaluate RUN --memory MEMORY --exploration 0' with the same protocol, split, episodes and seed
    to evaluate far goals in the same worlds.
    """
    from worldloom import workflow

    with open_session(run, threads, imports, memory=memory, simulator=simulator) as session:
        seen = workflow.explore(
            session,
            steps,
            method=method,
            protocol=protocol,
            split=split,
            episodes=episodes,
            seed=seed,
            progress=progress(),
        )
        assert session.memory is not None
        count = len(session.memory)
    found = {"memory": memory, "worlds": seen, "memories": count}
    answer(json, found, f"{memory}: {seen} worlds explored, {count:,} memories")
