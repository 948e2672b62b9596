"""`worldloom weave`: federated training of one model by many owners, its constitution and its ledger."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from worldloom.cli.console import answer, progress, table
from worldloom.cli.options import Json, Threads, set_threads
from worldloom.core.errors import ConfigError, DataError, StorageError
from worldloom.core.files import read_json, require_writable
from worldloom.core.registry import nearest
from worldloom.core.signing import SigningKey, make_key
from worldloom.core.yaml_config import read_yaml

if TYPE_CHECKING:
    from worldloom.federation import Constitution

app = typer.Typer(help="Train one world model among many owners (Tapestry).", no_args_is_help=True)
ledger = typer.Typer(help="Verify and show the ledger of a consortium.", no_args_is_help=True)
app.add_typer(ledger, name="ledger")

Rounds = Annotated[Path, typer.Argument(help="The folder of the rounds.")]
Rules = Annotated[Path, typer.Option(help="The constitution, signed by its members.")]


FoundRules = Annotated[
    Path | None,
    typer.Option(help="The constitution, signed by its members; by default constitution.yaml beside ROUNDS."),
]


def _rules(rounds: Path, constitution: Path | None) -> "Constitution":
    """Return the constitution under which the ledger in a folder is verified.

    Raises:
        StorageError: no constitution was given, and there is none beside the folder.
    """
    from worldloom.federation import read_constitution

    path = constitution or rounds.parent / "constitution.yaml"
    if constitution is None and not path.is_file():
        raise StorageError(
            f"{path} does not exist, and without a constitution the ledger's signatures cannot be verified; pass "
            f"--constitution"
        )
    return read_constitution(path)


@app.command()
def simulate(
    consortium: Annotated[Path, typer.Argument(help="A consortium of owners, as YAML.")],
    out: Annotated[Path, typer.Option(help="The folder for keys, data, runs and rounds.")],
    seed: Annotated[int, typer.Option(min=0, help="The root of all seeds.")] = 0,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Simulate a consortium on this machine, each owner in its own folder; run the command again to resume."""
    from worldloom.federation import read_constitution, read_ledger
    from worldloom.workflow import ConsortiumConfig, simulate

    set_threads(threads)
    made = simulate(read_yaml(consortium, ConsortiumConfig), out, seed=seed, progress=progress())
    records = read_ledger(made.rounds / "ledger.jsonl", read_constitution(out / "constitution.yaml"))
    told = [(entry.body["round"], entry.body["facts"]) for entry in records.entries("round")]
    found = {
        "rounds": [{"round": number, **facts} for number, facts in told],
        "runs": {name: str(run.path) for name, run in made.runs.items()},
        "model_card": made.card,
        "report": made.report,
    }
    rows = []
    for number, facts in told:
        judged = facts["evaluation"] or {}
        losses = [f"{judged[when]:.3f}" if when in judged else "-" for when in ("before", "after")]
        sent = sum(one["bytes"] for one in records.of("contribution", number))
        who = ", ".join(f"{owner} {weight:.2f}" for owner, weight in sorted(facts["weights"].items()))
        rows.append([str(number), *losses, f"{sent / 1e6:.1f}", who or "none", ", ".join(facts["left_out"]) or "-"])
    answer(
        json,
        found,
        table("rounds", ["round", "held-out loss before", "after", "MB sent", "influence", "left out"], rows),
        *(f"{name}: {run.path}" for name, run in made.runs.items()),
        f"model card: {made.card}",
        f"report: {made.report}",
    )


@app.command()
def watch(
    rounds: Rounds,
    constitution: FoundRules = None,
    once: Annotated[bool, typer.Option("--once", help="Show the current state, and exit.")] = False,
    json: Json = False,
) -> None:
    """Verify and show the rounds as they run, from any terminal that can read their folder, until the last one ends.

    --json prints one JSON line for each change; --json with --once prints one document of the current state.
    """
    from worldloom.cli.weave_watch import watch, watch_json

    look = watch_json if json else watch
    look(rounds, _rules(rounds, constitution), once=once)


@app.command()
def report(
    rounds: Rounds,
    constitution: Rules,
    out: Annotated[Path, typer.Option(help="The path of the report, an HTML file.")],
    runs: Annotated[
        Path | None, typer.Option(help="A folder with the owners' runs, NAME or NAME/run, to show their training.")
    ] = None,
    json: Json = False,
) -> None:
    """Verify the ledger and write its report: losses, influence, bytes, privacy and refusals on one page."""
    from worldloom.federation import read_constitution
    from worldloom.reports import find_owners, write_consortium_report

    require_writable(out)
    rules = read_constitution(constitution)
    write_consortium_report(out, rounds, rules, runs={} if runs is None else find_owners(runs, rules))
    answer(json, {"report": out}, f"report: {out}")


Party = Annotated[Path, typer.Argument(help="The settings of this party, as YAML; paths are relative to its folder.")]


@app.command()
def keys(
    name: Annotated[str, typer.Argument(help="The name of an owner or a coordinator.")],
    out: Annotated[Path, typer.Option(help="A folder for the keys; the secret ones never leave it.")] = Path("keys"),
    host: Annotated[
        list[str] | None,
        typer.Option(help="For a coordinator: a host name or address for its TLS certificate."),
    ] = None,
    json: Json = False,
) -> None:
    """Create the keys of a node or, with --host, of a coordinator; print the entry for the constitution."""
    from worldloom.workflow import make_keys

    made = make_keys(out, name, tuple(host or ()))
    answer(json, {name: made}, f"{name}:", *(f"  {part}: {value}" for part, value in made.items()))


@app.command()
def classify(
    dataset: Annotated[Path, typer.Argument(help="A dataset; its card is written beside it.")],
    owner: Annotated[str, typer.Option(help="The owner's name in the constitution.")],
    data_class: Annotated[
        str, typer.Option("--as", help="open, unique-open, controlled, sovereign or private; only the first three "
                          "may train the base.")
    ],
    key: Annotated[Path, typer.Option(help="The owner's secret key.")],
    title: Annotated[str, typer.Option(help="A title of the data.")] = "",
    licence: Annotated[str, typer.Option(help="The licence of the data.")] = "",
    json: Json = False,
) -> None:  # fmt: skip
    """Write and sign the data card of a dataset. Data without a card may not train the base."""
    from worldloom.federation import CLASSES, classify

    known = {name: name for name in CLASSES}
    if data_class not in known:
        raise ConfigError(f"unknown class {data_class!r} for --as; {nearest(data_class, known)}")
    card = classify(dataset, owner=owner, data_class=known[data_class], key=key, title=title, licence=licence)
    answer(json, {"card": card}, str(card))


@app.command()
def coordinator(party: Party, json: Json = False) -> None:
    """Run the remaining rounds with the members that connect; run the command again to resume."""
    from worldloom.cli.weave_watch import live
    from worldloom.federation import read_ledger
    from worldloom.workflow import CoordinatorConfig, coordinate

    config = read_yaml(party, CoordinatorConfig).at(party.parent)
    with live(config.home / "rounds", config.rules()):
        rounds = coordinate(config)
    bases = read_ledger(rounds / "ledger.jsonl", config.rules()).bases()
    last = max(bases)
    base = bases[last]["fingerprint"]
    answer(json, {"rounds": rounds, "round": last, "base": base}, f"{rounds}: the base after {last} rounds is {base}")


@app.command()
def pilot(
    party: Party,
    out: Annotated[Path, typer.Option(help="The path of the base; set the coordinator's 'initial' to it.")],
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Train the first base on one owner's data, before the first round; needed if the owners' conventions differ."""
    from worldloom.workflow import NodeConfig, pilot

    set_threads(threads)
    require_writable(out)
    base = pilot(read_yaml(party, NodeConfig).at(party.parent), out, progress=progress())
    answer(json, {"base": base, "path": out}, f"{out}: the base {base}; send it to the coordinator")


@app.command()
def node(party: Party, threads: Threads = 0, json: Json = False) -> None:
    """Take part as an owner until the last base is received and fine-tuned; run the command again to resume."""
    from worldloom.workflow import NodeConfig, take_part

    set_threads(threads)
    run = take_part(read_yaml(party, NodeConfig).at(party.parent), progress=progress())
    answer(json, {"run": run.path}, f"the fine-tuned model: {run.path}")


@app.command()
def exit(
    party: Party,
    into: Annotated[Path, typer.Option(help="A new folder for base, ledger, rules and the owner's run.")],
    why: Annotated[str, typer.Option(help="The reason, which all members can read.")] = "",
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Leave the consortium, and export your run, base, ledger and rules. No permission or connection is needed."""
    from worldloom.workflow import NodeConfig, leave

    set_threads(threads)
    leave(read_yaml(party, NodeConfig).at(party.parent), into, why=why, progress=progress())
    answer(json, {"left": into}, f"left, with base, ledger, rules and run in {into}")


@app.command(name="return")
def come_back(party: Party, json: Json = False) -> None:
    """Return after an exit: start the node to take part from the next round on."""
    from worldloom.workflow import NodeConfig, come_back

    config = read_yaml(party, NodeConfig).at(party.parent)
    come_back(config)
    answer(json, {"returned": config.owner}, "returned; start the node")


@app.command()
def succeed(
    party: Party,
    coordinator: Annotated[Path, typer.Option(help="The settings of the new coordinator, as YAML.")],
    json: Json = False,
) -> None:
    """Take over from a lost coordinator with this node's base and ledger; then start the coordinator here."""
    from worldloom.workflow import CoordinatorConfig, NodeConfig, take_over

    number = take_over(
        read_yaml(party, NodeConfig).at(party.parent),
        read_yaml(coordinator, CoordinatorConfig).at(coordinator.parent),
    )
    line = f"took over before round {number}; start: worldloom weave coordinator {coordinator}"
    answer(json, {"round": number, "coordinator": coordinator}, line)


@app.command()
def key(path: Annotated[Path, typer.Argument(help="The path of the secret key.")], json: Json = False) -> None:
    """Create a secret key, and print its public key for the constitution."""
    public = make_key(path)
    answer(json, {"key": public, "path": path}, public)


@app.command()
def ratify(
    constitution: Annotated[Path, typer.Argument(help="The constitution, as YAML.")],
    member: Annotated[str, typer.Option(help="Your name in the constitution.")],
    key: Annotated[Path, typer.Option(help="Your secret key.")],
    json: Json = False,
) -> None:
    """Sign the current text of a constitution as one of its members; write the signature beside it."""
    from worldloom.federation import Constitution, check_rules, ratify

    check_rules(read_yaml(constitution, Constitution))
    signature = ratify(constitution, member, SigningKey(key))
    answer(json, {"signature": signature}, str(signature))


@app.command()
def recompute(
    rounds: Rounds,
    constitution: Rules,
    into: Annotated[Path, typer.Option(help="A folder for the computed bases.")],
    without: Annotated[list[str] | None, typer.Option(help="A member to exclude.")] = None,
    json: Json = False,
) -> None:
    """Recompute every base from the stored contributions of all members, or without some of them."""
    from worldloom.federation import read_constitution, recompute

    require_writable(into)
    found = recompute(rounds, read_constitution(constitution), into=into, without=without or (), progress=progress())
    lines = [f"round {number}: {base}" for number, base in found.items()]
    answer(json, found, *lines, f"without {', '.join(without)}" if without else "all match the ledger")


@app.command()
def release(
    rounds: Rounds,
    constitution: Rules,
    into: Annotated[Path, typer.Option(help="A new folder for base, model card and ledger.")],
    json: Json = False,
) -> None:
    """Export the newest base for use outside the consortium, if it meets the constitution's release conditions."""
    from worldloom.federation import read_constitution, release

    released = release(rounds, read_constitution(constitution), into)
    answer(json, {"released": released}, str(released))


@ledger.command()
def verify(rounds: Rounds, constitution: Rules, json: Json = False) -> None:
    """Check every entry and signature; if one is invalid, report the first one and exit with code 3."""
    from worldloom.federation import read_constitution, verify_ledger

    verdict = verify_ledger(rounds / "ledger.jsonl", read_constitution(constitution))
    if verdict.broken is not None:
        raise DataError(f"{rounds}: entry {verdict.broken} {verdict.why}. Restore the ledger from an intact copy")
    line = f"{rounds}: all {verdict.length} entries are complete, signed and in order; last hash: {verdict.head.hash}"
    answer(json, {"length": verdict.length, "hash": verdict.head.hash}, line)


@ledger.command()
def show(rounds: Rounds, constitution: FoundRules = None, json: Json = False) -> None:
    """Verify a ledger, and show its entries."""
    from worldloom.federation import printable, read_ledger

    records = read_ledger(rounds / "ledger.jsonl", _rules(rounds, constitution), growing=True)
    found = [entry.body for entry in records.entries()]
    rows = []
    for body in found:
        facts = body["facts"]
        weights = facts.get("weights")
        subject = facts.get("owner") or str(facts.get("fingerprint", ""))[:16]
        subject = subject or ", ".join(weights if isinstance(weights, dict) else [])
        number = "-" if body["round"] is None else str(body["round"])
        rows.append([body["kind"], number, printable(subject), printable(facts.get("reason"))])
    entries = [{key: body[key] for key in ("kind", "round", "facts")} for body in found]
    answer(json, {"entries": entries}, table("ledger", ["kind", "round", "subject", "reason"], rows))


@ledger.command()
def compare(
    rounds: Rounds,
    heads: Annotated[list[Path], typer.Argument(help="The heads that members signed: their files countersigned.json.")],
    constitution: Rules,
    json: Json = False,
) -> None:
    """Check that other members have seen the same ledger; ROUNDS may also be a node's folder 'consortium'.

    Members send each other the file consortium/countersigned.json of their nodes. It contains the length of the ledger
    that the member has seen, and the hash of its newest entry. If this ledger has another hash at that length, the
    coordinator showed different ledgers, and the command exits with code 3.
    """
    from worldloom.federation import LedgerForked, compare_heads, read_constitution, read_ledger

    reader = read_ledger(rounds / "ledger.jsonl", read_constitution(constitution), growing=True)
    found = compare_heads(reader, [read_json(path) for path in heads])
    for path, (name, head, result) in zip(heads, found, strict=True):
        if result == "different":
            raise LedgerForked(
                f"{name} signed a ledger of {head.length} entries with the hash {head.hash}, which is not the hash in "
                f"{rounds}. There are two ledgers: keep this folder and {path} as evidence, and stop the rounds",
                path,
            )
    described = {
        "same": "the same ledger",
        "ahead": f"longer than this ledger ({reader.head.length} entries); compare again in that member's folder",
    }
    rows = [[name, str(head.length), described[result]] for name, head, result in found]
    values = [{"member": name, "length": head.length, "result": result} for name, head, result in found]
    answer(json, {"heads": values}, table("heads", ["member", "entries", "result"], rows))


@ledger.command()
def card(rounds: Rounds, constitution: Rules, json: Json = False) -> None:
    """Print the model card of the newest base, from a verified ledger."""
    from worldloom.federation import model_card, read_constitution, read_ledger

    card = model_card(read_ledger(rounds / "ledger.jsonl", read_constitution(constitution)))
    answer(json, {"model_card": card}, card.removesuffix("\n"))
