"""`worldloom weave`: many owners weave one model; its constitution, its ledger, and what they say."""

from pathlib import Path
from typing import Annotated

import typer

from worldloom.cli.options import Json, Threads, set_threads

app = typer.Typer(help="Weave one world model among many owners (Tapestry).", no_args_is_help=True)
ledger = typer.Typer(help="Verify and show the ledger of a consortium.", no_args_is_help=True)
app.add_typer(ledger, name="ledger")

Rounds = Annotated[Path, typer.Argument(help="The folder of the rounds.")]
Rules = Annotated[Path, typer.Option(help="The constitution, which its members signed.")]


@app.command()
def simulate(
    consortium: Annotated[Path, typer.Argument(help="A consortium of owners, as YAML.")],
    out: Annotated[Path, typer.Option(help="Where keys, data, runs and rounds go.")],
    seed: Annotated[int, typer.Option(min=0, help="The root of all seeds.")] = 0,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Weave on this machine, each owner in a folder of its own; run again, it goes on where it was."""
    from worldloom.cli.console import print_json, print_table, progress, say
    from worldloom.core.yaml_config import read_yaml
    from worldloom.federation import Records
    from worldloom.recipes.weaving import ConsortiumConfig, simulate

    set_threads(threads)
    made = simulate(read_yaml(consortium, ConsortiumConfig), out, seed=seed, progress=progress())
    records = Records(made.rounds / "ledger.jsonl")
    told = [(entry.body["round"], entry.body["facts"]) for entry in records.entries("round")]
    if json:
        print_json({
            "rounds": [{"round": number, **facts} for number, facts in told],
            "runs": {name: str(run.path) for name, run in made.runs.items()},
            "model_card": str(made.card),
            "report": str(made.report),
        })  # fmt: skip
        return
    rows = []
    for number, facts in told:
        judged = facts["evaluation"] or {}
        losses = [f"{judged[when]:.3f}" if when in judged else "-" for when in ("before", "after")]
        sent = sum(one["bytes"] for one in records.contributions(number))
        who = ", ".join(f"{owner} {weight:.2f}" for owner, weight in sorted(facts["weights"].items()))
        rows.append([str(number), *losses, f"{sent / 1e6:.1f}", who or "none", ", ".join(facts["left_out"]) or "-"])
    print_table("rounds", ["round", "held-out loss before", "after", "MB sent", "influence", "left out"], rows)
    for name, run in made.runs.items():
        say(f"{name}: {run.path}")
    say(f"model card: {made.card}")
    say(f"report: {made.report}")


@app.command()
def watch(
    rounds: Rounds,
    constitution: Annotated[
        Path | None, typer.Option(help="The constitution; without it nobody knows which round is the last.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Show what there is now, and end.")] = False,
) -> None:
    """Show the rounds as they run, from any terminal that sees their folder; ends with the last round, or Ctrl-C."""
    from worldloom.cli.watching import watch
    from worldloom.federation import read_constitution

    watch(rounds, None if constitution is None else read_constitution(constitution), once=once)


@app.command()
def report(
    rounds: Rounds,
    constitution: Rules,
    out: Annotated[Path, typer.Option(help="Where the report goes, as HTML.")],
    runs: Annotated[
        Path | None, typer.Option(help="A folder with a run of each owner, NAME or NAME/run, whose training is shown.")
    ] = None,
) -> None:
    """Write what the ledger tells as one page: losses, influence, bytes, privacy, refusals; it must verify."""
    from worldloom.cli.console import say
    from worldloom.federation import read_constitution
    from worldloom.recipes.weaving_report import find_owners, write_weaving_report

    rules = read_constitution(constitution)
    write_weaving_report(out, rounds, rules, runs={} if runs is None else find_owners(runs, rules))
    say(f"report: {out}")


@app.command()
def key(path: Annotated[Path, typer.Argument(help="Where to keep the secret key.")]) -> None:
    """Make a secret key; prints the public one, for the constitution."""
    from worldloom.core.signing import make_key

    typer.echo(make_key(path))


@app.command()
def ratify(
    constitution: Annotated[Path, typer.Argument(help="The constitution, as YAML.")],
    member: Annotated[str, typer.Option(help="The name by which it knows you.")],
    key: Annotated[Path, typer.Option(help="Your secret key.")],
) -> None:
    """Sign a constitution as it is now, as one of its members; the signature is kept beside it."""
    from worldloom.core.signing import SigningKey
    from worldloom.federation import ratify

    typer.echo(str(ratify(constitution, member, SigningKey(key))))


@app.command()
def recompute(
    rounds: Rounds,
    constitution: Rules,
    into: Annotated[Path, typer.Option(help="A folder for the bases that come of it.")],
    without: Annotated[list[str] | None, typer.Option(help="A member to leave out.")] = None,
    json: Json = False,
) -> None:
    """Compute every base again from the kept contributions, all of them or without a member's."""
    from worldloom.cli.console import print_json, say
    from worldloom.federation import read_constitution, recompute

    found = recompute(rounds, read_constitution(constitution), into=into, without=without or ())
    if json:
        print_json({str(number): base for number, base in found.items()})
        return
    for number, base in found.items():
        say(f"round {number}: {base}")
    say(f"without {', '.join(without)}" if without else "each is the one that the ledger names")


@ledger.command()
def verify(rounds: Rounds, constitution: Rules, json: Json = False) -> None:
    """Check every entry and signature; the first that is wrong is named, and the exit code is 3."""
    from worldloom.cli.console import print_json, say
    from worldloom.core.errors import DataError
    from worldloom.federation import read_constitution, verify_ledger

    verdict = verify_ledger(rounds / "ledger.jsonl", read_constitution(constitution))
    if verdict.broken is not None:
        raise DataError(f"{rounds}: entry {verdict.broken} {verdict.why}")
    if json:
        print_json({"length": verdict.length, "hash": verdict.head.hash})
        return
    say(f"{rounds}: all {verdict.length} entries are whole, signed and in order; the last is {verdict.head.hash}")


@ledger.command()
def show(rounds: Rounds, json: Json = False) -> None:
    """Show what happened, entry by entry, each verified as it is read."""
    from worldloom.cli.console import print_json, print_table
    from worldloom.federation import Records

    found = [entry.body for entry in Records(rounds / "ledger.jsonl").entries()]
    if json:
        print_json({"entries": [{key: body[key] for key in ("kind", "round", "facts")} for body in found]})
        return
    rows = []
    for body in found:
        facts = body["facts"]
        said = facts.get("owner") or facts.get("fingerprint", "")[:16] or ", ".join(facts.get("weights", {}))
        rows.append([body["kind"], "-" if body["round"] is None else str(body["round"]), said, facts.get("reason", "")])
    print_table("ledger", ["kind", "round", "who or what", "why"], rows)


@ledger.command()
def card(rounds: Rounds, constitution: Rules) -> None:
    """Print the model card of the newest base, written from a ledger that verifies."""
    from worldloom.federation import model_card, read_constitution

    typer.echo(model_card(rounds / "ledger.jsonl", read_constitution(constitution)), nl=False)
