"""`worldloom explore`: an agent explores new worlds and remembers them."""

from pathlib import Path
from typing import Annotated

import typer

from worldloom.cli.options import Imports, Threads, import_modules, open_session, set_threads


def explore(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    memory: Annotated[Path, typer.Option(help="The memory's directory; created if it is missing.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps in each world.")] = 2000,
    method: Annotated[str | None, typer.Option(help="A method that explores; the recipe's by default.")] = None,
    protocol: Annotated[str | None, typer.Option(help="The protocol of the worlds; by default the run's.")] = None,
    split: Annotated[str | None, typer.Option(help="One split of the protocol; all by default.")] = None,
    episodes: Annotated[int | None, typer.Option(min=1, help="How many worlds of each split.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The root of the worlds' seeds.")] = None,
    threads: Threads = 0,
    imports: Imports = None,
) -> None:
    """Explore the worlds of a protocol's episodes by curiosity, and remember them.

    'worldloom evaluate RUN --memory MEMORY --exploration 0', with the same protocol, split, episodes and seed, then
    asks for far goals in the same worlds.
    """
    from worldloom import workflow
    from worldloom.cli.console import progress, say

    import_modules(imports)
    set_threads(threads)
    with open_session(run, memory=memory) as session:
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
        say(f"{memory}: {seen} worlds explored, {len(session.memory):,} memories")
