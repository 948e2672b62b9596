"""`worldloom weave`: federated training of one model by many owners, its constitution and its ledger."""

from pathlib import Path
from typing import Annotated

import typer

from worldloom.cli.options import Json, Threads, set_threads

app = typer.Typer(help="Train one world model among many owners (Tapestry).", no_args_is_help=True)
ledger = typer.Typer(help="Verify and show the ledger of a consortium.", no_args_is_help=True)
app.add_typer(ledger, name="ledger")

Rounds = Annotated[Path, typer.Argument(help="The folder of the rounds.")]
Rules = Annotated[Path, typer.Option(help="The constitution, signed by its members.")]


@app.command()
def simulate(
    consortium: Annotated[Path, typer.Argument(help="A consortium of owners, as YAML.")],
    out: Annotated[Path, typer.Option(help="The folder for keys, data, runs and rounds.")],
    seed: Annotated[int, typer.Option(min=0, help="The root of all seeds.")] = 0,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Simulate a consortium on this machine, each owner in its own folder; run it again to resume."""
    from worldloom.cli.console import print_json, print_table, progress, say
    from worldloom.core.yaml_config import read_yaml
    from worldloom.federation import Records
    from worldloom.workflow import ConsortiumConfig, simulate

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
        Path | None, typer.Option(help="The constitution, which tells the number of rounds.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Show the present state, and end.")] = False,
) -> None:
    """Show the rounds of a folder as they run, from any terminal, until the last round or Ctrl-C."""
    from worldloom.cli.weave_watch import watch
    from worldloom.federation import read_constitution

    watch(rounds, None if constitution is None else read_constitution(constitution), once=once)


@app.command()
def report(
    rounds: Rounds,
    constitution: Rules,
    out: Annotated[Path, typer.Option(help="The path of the report, an HTML file.")],
    runs: Annotated[
        Path | None, typer.Option(help="A folder with the owners' runs, NAME or NAME/run, to show their training.")
    ] = None,
) -> None:
    """Verify the ledger and write its report: losses, influence, bytes, privacy and refusals on one page."""
    from worldloom.cli.console import say
    from worldloom.federation import read_constitution
    from worldloom.reports import find_owners, write_consortium_report

    rules = read_constitution(constitution)
    write_consortium_report(out, rounds, rules, runs={} if runs is None else find_owners(runs, rules))
    say(f"report: {out}")


Party = Annotated[Path, typer.Argument(help="The settings of this party, as YAML; paths are relative to its folder.")]


@app.command()
def keys(
    name: Annotated[str, typer.Argument(help="The name of an owner or a coordinator.")],
    out: Annotated[Path, typer.Option(help="A folder for the keys; the secret ones never leave it.")] = Path("keys"),
    host: Annotated[
        list[str] | None,
        typer.Option(help="For a coordinator: a name or address of it, for its certificate."),
    ] = None,
) -> None:
    """Make the keys of a node, or with --host those of a coordinator; print the entry for the constitution."""
    from worldloom.cli.console import print_json
    from worldloom.workflow import make_keys

    print_json({name: make_keys(out, name, tuple(host or ()))})


@app.command()
def classify(
    dataset: Annotated[Path, typer.Argument(help="A dataset; its card is written beside it.")],
    owner: Annotated[str, typer.Option(help="The owner's name in the constitution.")],
    data_class: Annotated[
        str, typer.Option("--as", help="open, unique-open, controlled, sovereign or private; only the first three "
                          "can shape the base.")
    ],
    key: Annotated[Path, typer.Option(help="The owner's secret key.")],
    title: Annotated[str, typer.Option(help="A title of the data.")] = "",
    licence: Annotated[str, typer.Option(help="The licence of the data.")] = "",
) -> None:  # fmt: skip
    """Write and sign the data card of a dataset; without a card its data cannot shape the base."""
    from worldloom.core.errors import ConfigError
    from worldloom.core.registry import nearest
    from worldloom.federation import CLASSES
    from worldloom.workflow import classify

    known = {name: name for name in CLASSES}
    if data_class not in known:
        raise ConfigError(f"--as: {nearest(data_class, known)}")
    typer.echo(str(classify(
        dataset, owner=owner, data_class=known[data_class], key=key, title=title, licence=licence
    )))  # fmt: skip


@app.command()
def coordinator(party: Party, json: Json = False) -> None:
    """Run the remaining rounds with the members that connect; start it again to resume."""
    from worldloom.cli.console import print_json, say
    from worldloom.cli.weave_watch import live
    from worldloom.core.yaml_config import read_yaml
    from worldloom.federation import Records
    from worldloom.workflow import CoordinatorConfig, coordinate

    config = read_yaml(party, CoordinatorConfig).at(party.parent)
    with live(config.home / "rounds", config.rules()):
        rounds = coordinate(config)
    bases = Records(rounds / "ledger.jsonl").bases()
    last = max(bases)
    if json:
        print_json({"rounds": str(rounds), "round": last, "base": bases[last]["fingerprint"]})
        return
    say(f"{rounds}: the base after {last} rounds is {bases[last]['fingerprint']}")


@app.command()
def pilot(
    party: Party,
    out: Annotated[Path, typer.Option(help="The path of the base, for the coordinator's 'initial'.")],
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Train the first base alone, before the first round; needed if the owners' conventions differ."""
    from worldloom.cli.console import print_json, progress, say
    from worldloom.core.yaml_config import read_yaml
    from worldloom.workflow import NodeConfig, pilot

    set_threads(threads)
    base = pilot(read_yaml(party, NodeConfig).at(party.parent), out, progress=progress())
    print_json({"base": base, "path": str(out)}) if json else say(f"{out}: the base {base}; send it to the coordinator")


@app.command()
def node(party: Party, threads: Threads = 0, json: Json = False) -> None:
    """Take part as an owner until the last base has come and is fine-tuned; start it again to resume."""
    from worldloom.cli.console import print_json, progress, say
    from worldloom.core.yaml_config import read_yaml
    from worldloom.workflow import NodeConfig, take_part

    set_threads(threads)
    run = take_part(read_yaml(party, NodeConfig).at(party.parent), progress=progress())
    print_json({"run": str(run.path)}) if json else say(f"the fine-tuned model: {run.path}")


@app.command()
def exit(
    party: Party,
    into: Annotated[Path, typer.Option(help="A new folder for base, ledger, rules and the owner's run.")],
    why: Annotated[str, typer.Option(help="The reason, which all members can read.")] = "",
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Leave the consortium and export all that is yours; this needs no permission and no connection."""
    from worldloom.cli.console import print_json, progress, say
    from worldloom.core.yaml_config import read_yaml
    from worldloom.workflow import NodeConfig, leave

    set_threads(threads)
    leave(read_yaml(party, NodeConfig).at(party.parent), into, why=why, progress=progress())
    print_json({"left": str(into)}) if json else say(f"left, with base, ledger, rules and run in {into}")


@app.command(name="return")
def come_back(party: Party) -> None:
    """Return after an exit: start the node to take part from the next round on."""
    from worldloom.cli.console import say
    from worldloom.core.yaml_config import read_yaml
    from worldloom.workflow import NodeConfig, come_back

    come_back(read_yaml(party, NodeConfig).at(party.parent))
    say("returned; start the node")


@app.command()
def succeed(
    party: Party,
    coordinator: Annotated[Path, typer.Option(help="The settings of the new coordinator, as YAML.")],
) -> None:
    """Take over from a lost coordinator with this node's base and ledger; then start the coordinator here."""
    from worldloom.cli.console import say
    from worldloom.core.yaml_config import read_yaml
    from worldloom.workflow import CoordinatorConfig, NodeConfig, take_over

    number = take_over(
        read_yaml(party, NodeConfig).at(party.parent),
        read_yaml(coordinator, CoordinatorConfig).at(coordinator.parent),
    )
    say(f"took over before round {number}; start: worldloom weave coordinator {coordinator}")


@app.command()
def key(path: Annotated[Path, typer.Argument(help="The path of the secret key.")]) -> None:
    """Make a secret key, and print its public key for the constitution."""
    from worldloom.core.signing import make_key

    typer.echo(make_key(path))


@app.command()
def ratify(
    constitution: Annotated[Path, typer.Argument(help="The constitution, as YAML.")],
    member: Annotated[str, typer.Option(help="Your name in the constitution.")],
    key: Annotated[Path, typer.Option(help="Your secret key.")],
) -> None:
    """Sign the present text of a constitution as one of its members; the signature is written beside it."""
    from worldloom.core.signing import SigningKey
    from worldloom.federation import ratify

    typer.echo(str(ratify(constitution, member, SigningKey(key))))


@app.command()
def recompute(
    rounds: Rounds,
    constitution: Rules,
    into: Annotated[Path, typer.Option(help="A folder for the computed bases.")],
    without: Annotated[list[str] | None, typer.Option(help="A member to exclude.")] = None,
    json: Json = False,
) -> None:
    """Compute every base again from the stored contributions of all members, or without some."""
    from worldloom.cli.console import print_json, say
    from worldloom.federation import read_constitution, recompute

    found = recompute(rounds, read_constitution(constitution), into=into, without=without or ())
    if json:
        print_json({str(number): base for number, base in found.items()})
        return
    for number, base in found.items():
        say(f"round {number}: {base}")
    say(f"without {', '.join(without)}" if without else "all match the ledger")


@app.command()
def release(
    rounds: Rounds,
    constitution: Rules,
    into: Annotated[Path, typer.Option(help="A new folder for base, model card and ledger.")],
) -> None:
    """Release the newest base from the consortium, if it passes every gate of the constitution."""
    from worldloom.federation import read_constitution, release

    typer.echo(str(release(rounds, read_constitution(constitution), into)))


@ledger.command()
def verify(rounds: Rounds, constitution: Rules, json: Json = False) -> None:
    """Check every entry and signature; report the first invalid one with exit code 3."""
    from worldloom.cli.console import print_json, say
    from worldloom.core.errors import DataError
    from worldloom.federation import read_constitution, verify_ledger

    verdict = verify_ledger(rounds / "ledger.jsonl", read_constitution(constitution))
    if verdict.broken is not None:
        raise DataError(f"{rounds}: entry {verdict.broken} {verdict.why}")
    if json:
        print_json({"length": verdict.length, "hash": verdict.head.hash})
        return
    say(
        f"{rounds}: all {verdict.length} entries are complete, signed and in order; last hash: {verdict.head.hash}"
    )


@ledger.command()
def show(rounds: Rounds, json: Json = False) -> None:
    """Show the entries of a ledger; the chain of hashes is verified while reading."""
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
    print_table("ledger", ["kind", "round", "subject", "reason"], rows)


@ledger.command()
def card(rounds: Rounds, constitution: Rules) -> None:
    """Print the model card of the newest base, made from a verified ledger."""
    from worldloom.federation import model_card, read_constitution

    typer.echo(model_card(rounds / "ledger.jsonl", read_constitution(constitution)), nl=False)
