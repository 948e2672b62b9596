"""`worldloom plan`: one plan in detail."""

from pathlib import Path
from typing import Annotated

import typer

from worldloom.cli import options
from worldloom.cli.console import answer, progress, table, values_table


def plan(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    start: Annotated[Path | None, typer.Option(help="A picture of the state to plan from (PNG).")] = None,
    goal: Annotated[Path | None, typer.Option(help="A picture of the goal (PNG).")] = None,
    protocol: Annotated[
        str | None, typer.Option(help="The protocol of start and goal, if no pictures are given.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="The split of the protocol; by default, the first.")] = None,
    episode: Annotated[int, typer.Option(min=0, help="The episode of the split.")] = 0,
    method: Annotated[str | None, typer.Option(help="A planning method of the recipe.")] = None,
    explain: Annotated[
        Path | None, typer.Option(help="Draw the predicted future, the guardrails and the ruled-out candidates (PNG).")
    ] = None,
    rules: options.Rules = None,
    trust: options.Trust = None,
    unsigned: options.Unsigned = False,
    simulator: options.Simulator = False,
    audit: options.Audit = None,
    threads: options.Threads = 0,
    imports: options.Imports = None,
    json: options.Json = False,
) -> None:
    """Plan once from a start to a goal; show the actions, their predicted cost and the planning time."""
    from worldloom.workflow import plan_once

    with options.open_session(
        run, threads, imports, rules, trust, unsigned, audit=audit, simulator=simulator
    ) as session:
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
