"""The report of a consortium: its ledger as one self-contained HTML file."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import worldloom
from worldloom.core.errors import CheckpointError, StorageError
from worldloom.core.files import storage_errors, write_text
from worldloom.federation import (
    Constitution,
    LedgerHistory,
    Round,
    RoundStore,
    duration,
    is_countersigned,
    loss_change,
    model_card,
    printable,
    read_history,
    read_ledger,
    size,
)
from worldloom.reports.consortium_figures import (
    bytes_up,
    gradients,
    influence,
    loss_curves,
    privacy_spent,
    training_at_home,
)
from worldloom.reports.figures import COLOURS
from worldloom.reports.page import embedded, render_page
from worldloom.training import RunFolder

_LARGEST = 2**16  # maximum bytes of a file that may be a checkpoint


def write_consortium_report(
    path: Path | str, rounds: Path | str, constitution: Constitution, *, runs: Mapping[str, Path] | None = None
) -> None:
    """Write the report of a folder of rounds, which may still be in progress; `runs` are the owners' runs.

    Countersigned checkpoints are read from the folder and from its subfolder `checkpoints`.

    Raises:
        StorageError: there is no ledger, or the storage fails. An earlier report is not changed.
        DataError: the ledger does not verify, by itself or against a checkpoint; no report is written.
    """
    write_text(Path(path), render_consortium_report(rounds, constitution, runs=runs))


def render_consortium_report(
    rounds: Path | str, constitution: Constitution, *, runs: Mapping[str, Path] | None = None
) -> str:
    """Return the report as HTML; see `write_consortium_report`."""
    folder = Path(rounds)
    stored = _checkpoints(folder)  # read before the ledger, which may grow
    checkpoints = [checkpoint for _, checkpoint in stored]
    records = read_ledger(folder / "ledger.jsonl", constitution, checkpoints, growing=True)
    history = read_history(records.entries(), constitution)
    within = [(entry.index, entry.body["facts"]) for entry in records.entries("checkpoint")]
    names = constitution.known()
    seen = [(f"entry {index}", one) for index, facts in within for one in facts.get("countersigned", [])]
    seen += stored
    base = _bytes_of_base(folder)
    owned = {name: RunFolder.open(run) for name, run in (runs or {}).items()}
    figures = {
        "losses": loss_curves(history),
        "influence": influence(history),
        "bytes": bytes_up(history, base),
        "privacy": privacy_spent(history),
        "home": training_at_home(history, {name: run.metrics() for name, run in owned.items()}),
    }
    return render_page(
        "consortium.html",
        title=_headline(history),
        lede=_lede(history, base),
        facts=_facts(history, records.head.length),
        rules=_rules(constitution),
        colours={name: place % COLOURS for place, name in enumerate(history.members)},
        owners=[_owner(history, name) for name in history.members],
        judged=[name for name in history.members if any(name in round.losses for round in history.rounds)],
        losses=_losses(history),
        influence=_grid(history, _share),
        bytes=_grid(history, _sent),
        totals=[size(history.sent(name)) for name in history.members] if history.bytes else [],
        total=size(history.bytes),
        cost=_cost(history, constitution, base),
        privacy=_grid(history, _epsilon) if history.private else [],
        private=constitution.privacy,
        refusals=_refusals(history),
        head=records.head,
        fingerprint=constitution.fingerprint,
        newest=max(history.bases.items(), default=None),
        checkpoints=[(names[one["key"]], one["length"], place) for place, one in seen],
        home=[_at_home(name, run) for name, run in owned.items()],
        card=model_card(records),
        figures={name: embedded(figure) for name, figure in figures.items()},
        version=worldloom.__version__,
    )


def find_owners(folder: Path | str, constitution: Constitution) -> dict[str, Path]:
    """Return the run folder of each member: NAME or NAME/run below `folder`; members without a run are left out.

    Raises:
        StorageError: no member has a run folder.
    """
    found: dict[str, Path] = {}
    for name in constitution.members:
        for path in (Path(folder) / name, Path(folder) / name / "run"):
            if (path / "config.json").is_file():
                found[name] = path
    if not found:
        raise StorageError(f"{folder} has no run of a member; expected a folder such as {path}. Check the path")
    return found


def _checkpoints(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for path in sorted([*folder.glob("*.json"), *(folder / "checkpoints").glob("*.json")]):
        with storage_errors(path), path.open("rb") as file:
            content = file.read(_LARGEST)
        try:
            values = json.loads(content)
        except (ValueError, RecursionError):
            continue  # not a checkpoint
        if is_countersigned(values):
            found.append((path.name, values))
    return found


def _bytes_of_base(folder: Path) -> int | None:
    """Return the size of the base in float32 in bytes, or None if the folder has no base."""
    try:
        return sum(4 * tensor.numel() for tensor in RoundStore(folder).base(0).tensors.values())
    except (CheckpointError, StorageError):
        return None


def _headline(history: LedgerHistory) -> str:
    count, over = len(history.members), sum(round.done for round in history.rounds)
    owners = f"{count} owner{'' if count == 1 else 's'}"
    if history.done:
        return f"{history.consortium}: {owners} trained one model in {over} round{'' if over == 1 else 's'}"
    return f"{history.consortium}: {owners} train one model, {over} of {history.total} rounds done"


def _lede(history: LedgerHistory, base: int | None) -> str:
    judged = [round.median for round in history.rounds if round.median]
    text = "No member has evaluated a base yet."
    if judged:
        first, last = judged[0][0], judged[-1][1]
        verb = "fell" if last < first else "rose" if last > first else "stayed"
        text = (
            f"The held-out loss of the median member {verb} from {loss_change(first, last).split()[0]} "
            f"to {loss_change(first, last).split()[-1]}."
        )
    if history.bytes:
        text += f" {size(history.bytes)} were uploaded in total"
        text += f"; gradients of every step would have been {size(gradients(history, base))}." if base else "."
    return text


def _facts(history: LedgerHistory, entries: int) -> list[str]:
    refused = sum(not one.left_out for round in history.rounds for one in round.refusals)
    left_out = sum(len(round.left_out) for round in history.rounds)
    return [
        f"{sum(round.done for round in history.rounds)} of {history.total} rounds",
        f"{len(history.members)} owners",
        f"{size(history.bytes)} uploaded",
        f"{refused} refused",
        f"{left_out} left out",
        f"ledger verified, {entries} entries",
    ]


def _rules(rules: Constitution) -> list[str]:
    count = len(rules.members)
    weights = {
        "equal": "equal weights",
        "frames": "weights by frames",
        "sqrt-frames": "weights by the square root of frames",
    }
    text = [
        f"In each of {rules.rounds} rounds every owner trains the shared tensors for {rules.inner_steps} steps on its "
        f"own data, and uploads their change. At least {rules.quorum} of {count} must contribute, within "
        f"{duration(rules.timeout_seconds)}; the changes are aggregated by {rules.aggregation['name']} with "
        f"{weights[rules.weighting]}, none above {rules.cap:.3g}, and applied by {rules.outer['name']}.",
        f"If the next base would raise held-out losses by more than {rules.quality.max_worse:.0%} (at the median "
        f"member), contributions are left out until it does not. Data of the classes {' and '.join(rules.classes)} may "
        f"train the base; other data trains only its owner's model.",
    ]
    if (privacy := rules.privacy) is None:
        text.append("No noise is added: there is no differential privacy.")
    else:
        budget = "" if privacy.epsilon_budget is None else f", with a budget of {privacy.epsilon_budget:g}"
        text.append(
            f"Each change is clipped to a norm of {privacy.clip:g} and gets noise of {privacy.noise:g} clips before it "
            f"leaves its owner; epsilon is computed at delta {privacy.delta:g}{budget}."
        )
    return text


def _owner(history: LedgerHistory, name: str) -> dict[str, str]:
    came = [round for round in history.rounds if name in round.contributions]
    classes = sorted({round.contributions[name].data_class for round in came})
    weights = [round.weights[name] for round in history.rounds if name in round.weights]
    steps = [round.losses[name] for round in history.rounds if name in round.losses]
    states = [round.state(name) for round in history.rounds if round.done]
    return {
        "name": name,
        "data_class": ", ".join(classes) or "-",
        "rounds": str(states.count("contributed")),
        "left_out": str(states.count("left out")),
        "absent": str(states.count("refused") + states.count("waiting")),
        "weight": f"{sum(weights) / len(weights):.1%}" if weights else "-",
        "loss": loss_change(steps[0][0], steps[-1][1]) if steps else "-",
        "bytes": size(history.sent(name)),
        "epsilon": history.spent(name) or "-",
    }


def _grid(history: LedgerHistory, cell: Callable[[Round, str], str]) -> list[tuple[int, list[str]]]:
    """Return one row per round, with a cell for each owner."""
    return [(round.number, [cell(round, name) for name in history.members]) for round in history.rounds]


def _losses(history: LedgerHistory) -> list[tuple[int, dict[str, str], str]]:
    return [
        (
            round.number,
            {name: loss_change(*losses) for name, losses in round.losses.items()},
            loss_change(*round.median),
        )
        for round in history.rounds
        if round.median
    ]


def _share(round: Round, name: str) -> str:
    if name in round.weights:
        return f"{round.weights[name]:.1%}"
    state = round.state(name)
    return "-" if not round.done else "no answer" if state == "waiting" else state


def _sent(round: Round, name: str) -> str:
    return size(round.contributions[name].bytes) if name in round.contributions else "-"


def _epsilon(round: Round, name: str) -> str:
    one = round.contributions.get(name)
    if one is None or not one.private:
        return "-"
    return "unbounded" if one.epsilon is None else f"{one.epsilon:.3g}"


def _cost(history: LedgerHistory, rules: Constitution, base: int | None) -> str:
    if not history.bytes:
        return "Nothing was uploaded yet."
    if base is None:
        return "The cost of gradients is unknown: the folder has no base."
    whole = gradients(history, base)
    return (
        f"The base has {size(base)} in float32. Its gradients at each of the {rules.inner_steps} steps of every "
        f"contribution would have been {size(whole)}: {whole / history.bytes:,.3g} times the {size(history.bytes)} "
        f"uploaded with the codec {rules.codec['name']}. Downloads are not counted."
    )


def _refusals(history: LedgerHistory) -> list[dict[str, str]]:
    """Return refusals and exclusions with their reasons; rounds with the same causes share a row."""
    rounds: dict[tuple[str, str, str], dict[int, None]] = {}
    for round in history.rounds:
        causes = [(one.owner, "left out" if one.left_out else "refused", one.reason) for one in round.refusals]
        why = "no group of contributions passed the quality gate; the base did not change"
        left = {owner for owner, what, _ in causes if what == "left out"}
        causes += [(owner, "left out", why) for owner in round.left_out if owner not in left]
        for cause in causes:
            rounds.setdefault(cause, {})[round.number] = None
    return [
        {"rounds": _ranges([*numbers]), "owner": owner, "what": what, "reason": reason}
        for (owner, what, reason), numbers in rounds.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """Return ascending numbers as text, such as 0 to 3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def _at_home(name: str, run: RunFolder) -> dict[str, str]:
    metrics = run.metrics()
    figures: dict[str, float] = {}
    for line in metrics:
        figures.update(line)
    known = {"rank": "effective_rank", "open_loop": "open_loop", "actions": "inverse_dynamics"}
    text = {key: f"{figures[of]:.3g}" if of in figures else "-" for key, of in known.items()}
    return {"name": name, "steps": f"{int(figures.get('step', 0)):,}", **text, "path": printable(run.path)}
