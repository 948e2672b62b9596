"""`worldloom evaluate`: zero-shot success under a named protocol."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from worldloom.cli import options
from worldloom.cli.console import Shown, answer, progress, table
from worldloom.core.errors import ConfigError

if TYPE_CHECKING:
    from worldloom.core.seams import Agent
    from worldloom.evaluation import Results
    from worldloom.workflow import Run


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    protocol: Annotated[
        str | None,
        typer.Option(
            help="A named protocol; by default, the world's protocol, or goals that the logging policy reached."
        ),
    ] = None,
    success: Annotated[
        str | None,
        typer.Option(
            metavar="NAME:TOLERANCE|env",
            help="For worlds without a protocol: a named vector and its tolerance, such as position:3.",
        ),
    ] = None,
    goal_offset: Annotated[
        int | None, typer.Option(min=1, help="For worlds without a protocol: steps from start to goal.")
    ] = None,
    budget: Annotated[int | None, typer.Option(min=1, help="The maximum number of steps of an episode.")] = None,
    episodes: Annotated[int | None, typer.Option(min=1, help="Episodes in each split.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The root of the seeds of the evaluation.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="A method to evaluate; by default, all of the recipe.")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE:FACTORY",
            help="Add a policy of another library; the factory returns an object with get_action(info).",
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="One split of the protocol; by default, all.")] = None,
    exploration: Annotated[
        int | None, typer.Option(min=0, help="Steps that an agent explores before it gets a goal.")
    ] = None,
    memory: Annotated[Path | None, typer.Option(help="The memory that agents read and write.")] = None,
    env_arg: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="An argument of the world.")] = None,
    rules: options.Rules = None,
    trust: options.Trust = None,
    unsigned: options.Unsigned = False,
    simulator: options.Simulator = False,
    threads: options.Threads = 0,
    imports: options.Imports = None,
    json: options.Json = False,
) -> None:
    """Evaluate a run and its baselines on goals from seeds that training never used, and write a report."""
    from worldloom import workflow

    with options.open_session(
        run, threads, imports, rules, trust, unsigned, memory=memory, simulator=simulator
    ) as session:
        results = workflow.evaluate(
            session,
            protocol=protocol,
            success=success,
            goal_offset=goal_offset,
            budget=budget,
            episodes=episodes,
            seed=seed,
            methods=method,
            others={name: _foreign(name, session.run) for name in policy or []},
            env_kwargs=options.key_values(env_arg, "--env-arg"),
            split=split,
            exploration=exploration,
            progress=progress(),
        )
    answer(json, results.to_json(), *shown(results), f"report: {workflow.report_path(session.run, results)}")


def _foreign(name: str, run: "Run") -> Callable[[], "Agent"]:
    """Return the factory of an agent from `MODULE:FACTORY`."""
    from worldloom.evaluation import ForeignPolicy, InfoPolicy

    module, _, factory = name.partition(":")
    options.import_modules([module])
    make = getattr(sys.modules[module], factory, None)
    if not callable(make):
        raise ConfigError(
            f"--policy {name}: module {module!r} has no callable {factory!r}; expected MODULE:FACTORY. Check both names"
        )
    policy = make()
    if not isinstance(policy, InfoPolicy):
        raise ConfigError(
            f"--policy {name}: expected an object with get_action(info) from the factory; got {type(policy).__name__}. "
            f"Define get_action"
        )
    return lambda: ForeignPolicy(policy, run.model.spec.action)


def shown(results: "Results") -> list[Shown]:
    """Return the table of an evaluation, and the conventions of its protocol."""
    from rich.text import Text

    from worldloom.evaluation import table_rows

    header, *rows = table_rows(results)
    conventions = [Text(line, style="dim") for line in results.protocol.describe()]
    return [table(f"{results.protocol.name}: zero-shot success", header, rows), *conventions]
