"""The report of a consortium: what its ledger tells, as one HTML file that asks the network for nothing."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import worldloom
from worldloom.core.errors import CheckpointError, DataError, StorageError
from worldloom.core.files import storage_errors, write_text
from worldloom.federation import (
    Constitution,
    LedgerVerdict,
    Records,
    Round,
    Rounds,
    Story,
    duration,
    is_countersigned,
    loss_change,
    model_card,
    printable,
    size,
    tell,
    verify_ledger,
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

_LARGEST = 2**16  # bytes of a file that may be a checkpoint


def write_weaving_report(
    path: Path | str, rounds: Path | str, constitution: Constitution, *, runs: Mapping[str, Path] | None = None
) -> None:
    """Write the report of a folder of rounds, which may still be written by others; `runs` are those of owners.

    Checkpoints that members countersigned are looked for in the folder and in its `checkpoints`.

    Raises:
        StorageError: there is no ledger, or the storage refuses; a report that stood there is untouched.
        DataError: the ledger does not verify, alone or against a checkpoint; nothing is written of it.
    """
    write_text(Path(path), render_weaving_report(rounds, constitution, runs=runs))


def render_weaving_report(
    rounds: Path | str, constitution: Constitution, *, runs: Mapping[str, Path] | None = None
) -> str:
    """Return the report as HTML; see `write_weaving_report`."""
    folder = Path(rounds)
    kept = _checkpoints(folder)  # before the ledger, which may grow: what they saw must be there
    with _as_it_is(folder / "ledger.jsonl") as ledger:
        verdict = verify_ledger(ledger, constitution, [checkpoint for _, checkpoint in kept])
        if verdict.broken is not None:
            raise DataError(
                f"{folder / 'ledger.jsonl'} does not verify: entry {verdict.broken} {verdict.why}. No report is written"
            )
        records = Records(ledger)
        story = tell(records.entries(), constitution)
        card = model_card(ledger, constitution)
        within = [(entry.index, entry.body["facts"]) for entry in records.entries("checkpoint")]
    names = constitution.known()
    seen = [(f"entry {index}", one) for index, facts in within for one in facts.get("countersigned", [])]
    seen += [(place, one) for place, one in kept]
    base = _bytes_of_base(folder)
    owned = {name: RunFolder.open(run) for name, run in (runs or {}).items()}
    figures = {
        "losses": loss_curves(story),
        "influence": influence(story),
        "bytes": bytes_up(story, base),
        "privacy": privacy_spent(story),
        "home": training_at_home(story, {name: run.metrics() for name, run in owned.items()}),
    }
    return render_page(
        "consortium.html",
        title=_headline(story),
        lede=_lede(story, base),
        facts=_facts(story, verdict),
        rules=_rules(constitution),
        colours={name: place % COLOURS for place, name in enumerate(story.members)},
        owners=[_owner(story, name) for name in story.members],
        judged=[name for name in story.members if any(name in round.losses for round in story.rounds)],
        losses=_losses(story),
        influence=_grid(story, lambda round, name: _share(round, name)),
        bytes=_grid(story, lambda round, name: _sent(round, name)),
        totals=[size(story.sent(name)) for name in story.members] if story.bytes else [],
        total=size(story.bytes),
        cost=_cost(story, constitution, base),
        privacy=_grid(story, lambda round, name: _epsilon(round, name)) if story.private else [],
        private=constitution.privacy,
        refusals=_refusals(story),
        verdict=verdict,
        fingerprint=constitution.fingerprint,
        newest=max(story.bases.items(), default=None),
        checkpoints=[(names[one["key"]], one["length"], place) for place, one in seen],
        home=[_at_home(name, run) for name, run in owned.items()],
        card=card,
        figures={name: embedded(figure) for name, figure in figures.items()},
        version=worldloom.__version__,
    )


def find_owners(folder: Path | str, constitution: Constitution) -> dict[str, Path]:
    """Return the run folder of each member that has one below a folder, as NAME or NAME/run.

    Raises:
        StorageError: no member has one.
    """
    found: dict[str, Path] = {}
    for name in constitution.members:
        for path in (Path(folder) / name, Path(folder) / name / "run"):
            if (path / "config.json").is_file():
                found[name] = path
    if not found:
        raise StorageError(f"{folder} has no run of a member; expected folders such as {path}. Check the path")
    return found


@contextmanager
def _as_it_is(ledger: Path) -> Iterator[Path]:
    """Give a copy of a ledger up to its last whole line, so that all that is read of it is of one moment."""
    with storage_errors(ledger):
        content = ledger.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / ledger.name
        copy.write_bytes(content[: content.rfind(b"\n") + 1])
        yield copy


def _checkpoints(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for path in sorted([*folder.glob("*.json"), *(folder / "checkpoints").glob("*.json")]):
        with storage_errors(path), path.open("rb") as file:
            content = file.read(_LARGEST)
        try:
            values = json.loads(content)
        except (ValueError, RecursionError):
            continue  # another file
        if is_countersigned(values):
            found.append((path.name, values))
    return found


def _bytes_of_base(folder: Path) -> int | None:
    """Return the bytes of the base in float32, or None where the folder has none."""
    try:
        return sum(4 * tensor.numel() for tensor in Rounds(folder).base(0).values())
    except (CheckpointError, StorageError):
        return None


def _headline(story: Story) -> str:
    count, over = len(story.members), sum(round.woven for round in story.rounds)
    owners = f"{count} owner{'' if count == 1 else 's'}"
    if story.done:
        return f"{story.consortium}: {owners} wove one model in {over} round{'' if over == 1 else 's'}"
    return f"{story.consortium}: {owners} weave one model, {over} of {story.total} rounds done"


def _lede(story: Story, base: int | None) -> str:
    judged = [round.middle for round in story.rounds if round.middle]
    said = "No member has judged a base yet."
    if judged:
        first, last = judged[0][0], judged[-1][1]
        way = "fell" if last < first else "rose" if last > first else "stayed"
        said = (
            f"The held-out loss of the member in the middle {way} from {loss_change(first, last).split()[0]} "
            f"to {loss_change(first, last).split()[-1]}."
        )
    if story.bytes:
        said += f" {size(story.bytes)} came up in all"
        said += f", where gradients of every step would have been {size(gradients(story, base))}." if base else "."
    return said


def _facts(story: Story, verdict: LedgerVerdict) -> list[str]:
    refused = sum(not one.left_out for round in story.rounds for one in round.refusals)
    left_out = sum(len(round.left_out) for round in story.rounds)
    return [
        f"{sum(round.woven for round in story.rounds)} of {story.total} rounds",
        f"{len(story.members)} owners",
        f"{size(story.bytes)} up",
        f"{refused} refused",
        f"{left_out} left out",
        f"ledger verified, {verdict.length} entries",
    ]


def _rules(rules: Constitution) -> list[str]:
    count = len(rules.members)
    weights = {"equal": "equal weights", "frames": "weights by frames", "sqrt-frames": "weights by the root of frames"}
    said = [
        f"In each of {rules.rounds} rounds every owner trains the shared part for {rules.inner_steps} steps on its own "
        f"data, and sends up what changed. At least {rules.quorum} of {count} must contribute, within "
        f"{duration(rules.patience_seconds)}; their changes are woven by {rules.aggregation['name']} with "
        f"{weights[rules.weighting]}, none above {rules.cap:.3g}, and taken as a step of {rules.outer['name']}.",
        f"A contribution by which the held-out loss of the member in the middle grows by more than "
        f"{rules.quality.max_worse:.0%} is left out. Data of the classes {' and '.join(rules.classes)} may shape the "
        f"base; other data trains its owner alone.",
    ]
    if (privacy := rules.privacy) is None:
        said.append("No noise is added to what is sent: nothing here is private in the sense of differential privacy.")
    else:
        budget = "" if privacy.epsilon_budget is None else f", and stops at {privacy.epsilon_budget:g}"
        said.append(
            f"Each change is clipped to a norm of {privacy.clip:g} and gets noise of {privacy.noise:g} clips before it "
            f"leaves its owner; epsilon is counted at delta {privacy.delta:g}{budget}."
        )
    return said


def _owner(story: Story, name: str) -> dict[str, str]:
    came = [round for round in story.rounds if name in round.contributions]
    classes = sorted({round.contributions[name].data_class for round in came})
    weights = [round.weights[name] for round in story.rounds if name in round.weights]
    steps = [round.losses[name] for round in story.rounds if name in round.losses]
    states = [round.state(name) for round in story.rounds if round.woven]
    return {
        "name": name,
        "data_class": ", ".join(classes) or "-",
        "rounds": str(states.count("contributed")),
        "left_out": str(states.count("left out")),
        "absent": str(states.count("refused") + states.count("waiting")),
        "weight": f"{sum(weights) / len(weights):.1%}" if weights else "-",
        "loss": loss_change(steps[0][0], steps[-1][1]) if steps else "-",
        "bytes": size(story.sent(name)),
        "epsilon": story.spent(name) or "-",
    }


def _grid(story: Story, cell: Any) -> list[tuple[int, list[str]]]:
    """Return a row a round, of a cell for each owner."""
    return [(round.number, [cell(round, name) for name in story.members]) for round in story.rounds]


def _losses(story: Story) -> list[tuple[int, dict[str, str], str]]:
    return [
        (
            round.number,
            {name: loss_change(*losses) for name, losses in round.losses.items()},
            loss_change(*round.middle),
        )
        for round in story.rounds
        if round.middle
    ]


def _share(round: Round, name: str) -> str:
    if name in round.weights:
        return f"{round.weights[name]:.1%}"
    state = round.state(name)
    return "-" if not round.woven else "no answer" if state == "waiting" else state


def _sent(round: Round, name: str) -> str:
    return size(round.contributions[name].bytes) if name in round.contributions else "-"


def _epsilon(round: Round, name: str) -> str:
    one = round.contributions.get(name)
    if one is None or not one.private:
        return "-"
    return "no bound" if one.epsilon is None else f"{one.epsilon:.3g}"


def _cost(story: Story, rules: Constitution, base: int | None) -> str:
    if not story.bytes:
        return "Nothing came up yet."
    if base is None:
        return "What gradients would have cost is not known here: the folder has no base to tell its size."
    whole = gradients(story, base)
    return (
        f"The base has {size(base)} in float32. Gradients of it at each of the {rules.inner_steps} steps of every "
        f"contribution would have been {size(whole)}: {whole / story.bytes:,.3g} times as much as the "
        f"{size(story.bytes)} that came up, written by the codec {rules.codec['name']}. What goes down is not counted."
    )


def _refusals(story: Story) -> list[dict[str, str]]:
    """Return what was refused or left out and why, the rounds of one cause together."""
    rounds: dict[tuple[str, str, str], dict[int, None]] = {}
    for round in story.rounds:
        told = [(one.owner, "left out" if one.left_out else "refused", one.reason) for one in round.refusals]
        why = "nothing that came was good enough; the base stayed as it was"
        left = {owner for owner, what, _ in told if what == "left out"}
        told += [(owner, "left out", why) for owner in round.left_out if owner not in left]
        for cause in told:
            rounds.setdefault(cause, {})[round.number] = None
    return [
        {"rounds": _ranges([*numbers]), "owner": owner, "what": what, "reason": reason}
        for (owner, what, reason), numbers in rounds.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """Return growing numbers in words, such as 0 to 3, 5."""
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
    said = {key: f"{figures[of]:.3g}" if of in figures else "-" for key, of in known.items()}
    return {"name": name, "steps": f"{int(figures.get('step', 0)):,}", **said, "path": printable(run.path)}
