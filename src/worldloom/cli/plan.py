"""`worldloom plan`: one plan in detail."""

from pathlib import Path
from typing import Annotated

import typer

from worldloom.cli.console import answer, progress, table, values_table
from worldloom.cli.options import (
    Audit,
    Imports,
    Json,
    Rules,
    Threads,
    Trust,
    Unsigned,
    import_modules,
    open_session,
    set_threads,
)


def plan(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    start: Annotated[Path | None, typer.Option(help="A picture of the state to plan from (PNG).")] = None,
    goal: Annotated[Path | None, typer.Option(help="A picture of the goal (PNG).")] = None,
    protocol: Annotated[
        str | None, typer.Option(help="The protocol that draws start and goal, if no pictures are given.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="The split of the protocol; by default, the first.")] = None,
    episode: Annotated[int, typer.Option(min=0, help="The episode of the split.")] = 0,
    method: Annotated[str | None, typer.Option(help="A planning method of the recipe.")] = None,
    explain: Annotated[
        Path | None, typer.Option(help="Draw the predicted future, the guardrails and the ruled-out candidates (PNG).")
    ] = None,
    rules: Rules = None,
    trust: Trust = None,
    unsigned: Unsigned = False,
    audit: Audit = None,
    threads: Threads = 0,
    imports: Imports = None,
    json: Json = False,
) -> None:
    """Plan once from a start to a goal; show the actions, their predicted cost and the planning time."""
    from worldloom.workflow import plan_once

    import_modules(imports)
    set_threads(threads)
    with open_session(run, rules, trust, unsigned, audit=audit) as session:
        made = plan_once(
            session,
            start=start,
            goal=goal,
            protocol=protocol,
            split=split,
            episode=episode,
            method=method,
            picture=explain,
            progress=progress(),
        )
    actions = made["actions"]
    rows = [[str(step), *(f"{value:+.3f}" for value in action)] for step, action in enumerate(actions)]
    answer(
        json,
        made,
        values_table("plan", {name: value for name, value in made.items() if name != "actions"}),
        table("actions", ["step", *(f"a{index}" for index in range(len(actions[0])))], rows),
    )
