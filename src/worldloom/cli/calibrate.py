"""`worldloom calibrate`: margins that keep the risk of a rule set."""

from pathlib import Path
from typing import Annotated

import typer

from worldloom.cli import options
from worldloom.cli.console import answer, progress, table


def calibrate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    method: Annotated[
        list[str] | None, typer.Option(help="A planning method of the recipe; by default, all that use margins.")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="The protocol to calibrate in; by default, the run's protocol.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="One split of the protocol; by default, all.")] = None,
    episodes: Annotated[int, typer.Option(min=2, help="Episodes of each split, in each round.")] = 200,
    rounds: Annotated[int, typer.Option(min=1, help="The maximum number of rounds.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="The root of the seeds of the calibration.")] = 0,
    key: Annotated[
        Path | None, typer.Option(help="The secret key that signs the margins; by default, your own key.")
    ] = None,
    rules: options.Rules = None,
    trust: options.Trust = None,
    unsigned: options.Unsigned = False,
    simulator: options.Simulator = False,
    threads: options.Threads = 0,
    imports: options.Imports = None,
    json: options.Json = False,
) -> None:
    """Calibrate the margins of a rule set for the plans that a method chooses, and write them into the run folder."""
    from worldloom.core.signing import SigningKey
    from worldloom.core.user_state import own_key
    from worldloom.workflow import calibrate, uses_margins

    signer = own_key() if key is None else SigningKey(key)
    with options.open_session(run, threads, imports, rules, trust, unsigned, simulator=simulator) as session:
        methods = session.run.recipe.methods
        found = {
            name: calibrate(
                session,
                method=name,
                protocol=protocol,
                split=split,
                episodes=episodes,
                rounds=rounds,
                seed=seed,
                key=signer,
                progress=progress(),
            )
            for name in method or [name for name, config in methods.items() if uses_margins(config)]
        }
    titles = [] if session.rules is None else session.rules.rule_set.titles
    tables = []
    for name, margins in found.items():
        steps = [f"+{step}" for step in range(1, margins.values.shape[1] + 1)]
        rows = [
            [title, *(f"{value:.3g}" for value in values)]
            for title, values in zip(titles, margins.values.tolist(), strict=True)
        ]
        tables.append(table(f"{name}: margins at a risk of {margins.risk:g}", ["model steps ahead", *steps], rows))
    answer(
        json,
        {name: {"risk": one.risk, "margins": one.values.tolist(), "key": signer.public} for name, one in found.items()},
        *tables,
        f"signed with {signer.public}; on other machines, trust these margins with --trust {signer.public}",
    )
