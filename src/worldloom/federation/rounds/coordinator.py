"""The coordinator: rounds that survive a kill at any moment, and that anyone can compute again.

A round asks every member for its contribution to the base, waits as long as the constitution says, and weaves what came
into the next base. What a round has is on the disk before it goes on: the base, each accepted contribution as it was
signed, and the ledger, whose last entries say where to begin again. A base is a function of the one before, of the
contributions and of the constitution alone, so `recompute` gives it bit for bit.
"""

import logging
import math
import statistics
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from worldloom.core.chain import Entry
from worldloom.core.errors import CheckpointError, DataError, StorageError, TrainingError
from worldloom.core.files import storage_errors, whole_folder, write_atomic
from worldloom.core.progress import SILENT, Progress
from worldloom.core.signing import SigningKey
from worldloom.federation.record.envelope import SignedMessage, unseal_answer
from worldloom.federation.record.ledger import Ledger, Records
from worldloom.federation.rounds.aggregation import AGGREGATORS, capped
from worldloom.federation.rounds.codecs import CODECS
from worldloom.federation.rounds.contribution import check_contribution, check_facts, check_spent
from worldloom.federation.rounds.keeping import Keeping
from worldloom.federation.rounds.members import Members
from worldloom.federation.rounds.outer import OUTER
from worldloom.federation.rules.constitution import Constitution
from worldloom.federation.rules.partition import check_finite, check_like, check_names, fingerprint
from worldloom.federation.secure.secure_rounds import THE_SUM, Sums, kept_sum, reopen
from worldloom.federation.transport.messages import Transport
from worldloom.models import load_tensors, save_tensors

_log = logging.getLogger(__name__)
_BASE, _MOMENTUM = "shared-base", "outer-momentum"
_TRIES = 3  # exchanges in a round, where the quorum is not met

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Woven:
    """What a round makes: the next base, what the outer optimiser keeps, and what each owner had in it."""

    base: State
    momentum: State
    weights: Mapping[str, float]
    notes: Mapping[str, Mapping[str, Any]]


class Rounds:
    """The folder of a consortium: bases, the contributions to each, and the outer optimiser's momentum."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def base(self, number: int) -> State:
        """Return the base that a round begins with.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        return load_tensors(self._stem("bases", number), kind=_BASE)[0]

    def momentum(self, number: int) -> State:
        """Return what the outer optimiser kept of the rounds before; nothing at the first."""
        return load_tensors(self._stem("momenta", number), kind=_MOMENTUM)[0] if number else {}

    def keep(self, number: int, base: Mapping[str, Tensor], momentum: Mapping[str, Tensor]) -> str:
        """Write what a round begins with; return the base's fingerprint."""
        if number:
            save_tensors(self._stem("momenta", number), momentum, kind=_MOMENTUM)
        save_tensors(self._stem("bases", number), base, {"round": number}, kind=_BASE)
        return fingerprint(base)

    def message(self, number: int, owner: str) -> Path:
        """Return where a contribution is kept as it came."""
        return self.path / "contributions" / f"{number:05d}" / f"{owner}.msg"

    def delta(self, number: int, owner: str) -> Path:
        """Return where a contribution is kept as it was decoded, to be read tensor by tensor."""
        return self.path / "contributions" / f"{number:05d}" / f"{owner}.safetensors"

    def owners(self, number: int) -> list[str]:
        """Return whose contributions to a round are kept."""
        return sorted(path.stem for path in self.message(number, "x").parent.glob("*.msg"))

    def _stem(self, folder: str, number: int) -> Path:
        return self.path / folder / f"{number:05d}"


def save_base(path: Path | str, base: Mapping[str, Tensor], *, about: Mapping[str, Any] | None = None) -> str:
    """Write a base as a file that rounds can begin with, such as a pilot's or a released one; return its fingerprint.

    `about` says where it comes from, in plain JSON.

    Raises:
        StorageError: a file is there already, or the disk refuses.
    """
    path = Path(path)
    if path.with_suffix(".json").exists():
        raise StorageError(f"{path} is there already; choose another name")
    save_tensors(path, base, {"round": 0, **(about or {})}, kind=_BASE)
    return fingerprint(base)


def read_base(path: Path | str, like: Mapping[str, Tensor]) -> State:
    """Return a base that `save_base` wrote, if its tensors are those of `like` by name, shape and type.

    Raises:
        CheckpointError: it is missing or damaged.
        DataError: it is of another model.
    """
    base = load_tensors(Path(path), kind=_BASE)[0]
    check_names(base, like, f"the base in {path}")
    for name, tensor in base.items():
        check_like(name, tensor, like[name])
        check_finite(name, tensor, f" of the base in {path}")
    return base


class Coordinator:
    """Runs the rounds of a consortium over a transport.

    `initial` is the base of the first round; a folder that was begun goes on with its own.

    Raises:
        StorageError: another process coordinates in the folder.
        DataError: the ledger does not verify, is of another constitution, or the key is no coordinator's.
    """

    def __init__(
        self,
        path: Path | str,
        constitution: Constitution,
        *,
        key: SigningKey,
        transport: Transport,
        initial: Mapping[str, Tensor],
        progress: Progress = SILENT,
    ) -> None:
        if key.public not in constitution.coordinator_keys().values():
            raise DataError(f"{key.public} is no coordinator's key by the constitution; take the key that it names")
        self.rounds, self._constitution, self._key = Rounds(path), constitution, key
        self._transport, self._progress = transport, progress
        self._members = {public: name for name, public in constitution.member_keys().items()}
        self.ledger = Ledger(self.rounds.path / "ledger.jsonl", key)
        with ExitStack() as stack:
            stack.callback(self.ledger.close)
            first = next(self.ledger.entries("constitution"), None)
            if first is not None and first.body["facts"].get("fingerprint") != constitution.fingerprint:
                raise DataError(f"{path} runs under another constitution; choose another folder for this one")
            if first is None:
                self.ledger.append("constitution", {"fingerprint": constitution.fingerprint})
            self._circle = Members(constitution, transport, self.ledger, key)
            self._sums = Sums(
                self.rounds.path, constitution, key=key, transport=transport, ledger=self.ledger, members=self._circle
            )
            if not self.ledger.bases():
                self.ledger.append("base", {"fingerprint": self.rounds.keep(0, initial, {})}, round=0)
            stack.pop_all()

    def close(self) -> None:
        """Let go of the ledger."""
        self.ledger.close()

    def run(self) -> dict[str, Tensor]:
        """Run the rounds that are left, and return the last base.

        Raises:
            TrainingError: fewer members than the quorum contributed; run again when they are back.
        """
        last = self._constitution.rounds
        with self._progress.task("weaving", last, "round") as task:
            begun = max(self.ledger.bases())
            task.advance(begun)
            for number in range(begun, last):
                self.weave(number)
                task.advance(1)
        base = self.rounds.base(last)
        self._hand_over(last, base)
        return base

    def _hand_over(self, number: int, base: Mapping[str, Tensor]) -> None:
        """Give the last base to all members who have not said that they have it."""
        *_, newest = self.ledger.entries()
        said = newest.body["facts"].get("countersigned", []) if newest.body["kind"] == "checkpoint" else []
        if {one["key"] for one in said} < set(self._members):
            self._circle.ask("keep", number, base, kind="receipt")

    def weave(self, number: int) -> None:
        """Run one round: gather, weave, judge, and publish the next base."""
        base = self._published(number)
        if self._constitution.secure_aggregation:
            self._weave_sum(number, base)
            return
        gathered = self._gather(number, base)
        before = self._judged(number, base)
        left_out: list[str] = []
        woven = weave(self.rounds, number, self._constitution, gathered)
        after = self._judged(number, woven.base)
        while before and (worse := _worse(before, after)) > self._constitution.quality.max_worse:
            remaining = {owner: frames for owner, frames in gathered.items() if owner not in left_out}
            if len(remaining) - 1 < self._constitution.quorum:
                # Nothing that is left is good enough: the base stays as it is.
                woven = unchanged(self.rounds, number)
                left_out, after = list(gathered), before
                break
            found = {
                owner: weave(
                    self.rounds,
                    number,
                    self._constitution,
                    {other: frames for other, frames in remaining.items() if other != owner},
                )
                for owner in remaining
            }
            losses = {owner: self._judged(number, trial.base) for owner, trial in found.items()}
            growth = {owner: _worse(before, after) for owner, after in losses.items()}
            culprit = min(growth, key=lambda owner: growth[owner])
            _log.warning("round %d: held-out losses grow by %.0f%%; %s is left out", number, 100 * worse, culprit)
            left_out.append(culprit)
            reason = f"with it, held-out losses grow by {worse:.1%}"
            self.ledger.append("refusal", {"owner": culprit, "reason": reason}, round=number)
            woven, after = found[culprit], losses[culprit]
        self._publish(number, base, woven, left_out=left_out, before=before, after=after)

    def _weave_sum(self, number: int, base: Mapping[str, Tensor]) -> None:
        """Run a round under secure aggregation: of a sum that is judged too bad nobody can be left out."""
        weights = self._sums.gather(number, base)
        self._circle.are_here(weights, number)
        before, left_out = self._judged(number, base), list[str]()
        woven = weave_sum(self.rounds, number, self._constitution, weights)
        after = self._judged(number, woven.base)
        if before and (worse := _worse(before, after)) > self._constitution.quality.max_worse:
            _log.warning("round %d: held-out losses grow by %.0f%%; the base stays as it is", number, 100 * worse)
            reason = f"with it, held-out losses grow by {worse:.1%}: the base stays as it is"
            self.ledger.append("refusal", {"owner": THE_SUM, "reason": reason}, round=number)
            woven, left_out, after = unchanged(self.rounds, number), sorted(weights), before
        self._publish(number, base, woven, left_out=left_out, before=before, after=after)

    def _publish(
        self,
        number: int,
        base: Mapping[str, Tensor],
        woven: Woven,
        *,
        left_out: list[str],
        before: Mapping[str, float],
        after: Mapping[str, float],
    ) -> None:
        """Keep the next base, and write down how it came to be."""
        known = self.rounds.keep(number + 1, woven.base, woven.momentum)
        evaluation = _evaluation(before, after) if before else None
        facts = {
            "weights": dict(woven.weights),
            "notes": {owner: dict(note) for owner, note in woven.notes.items()},
            "left_out": left_out,
            "evaluation": evaluation,
        }
        # A kill between the two entries leaves the first, which is what this round makes again.
        if not self.ledger.of("round", number):
            self.ledger.append("round", facts, round=number)
        self.ledger.append("base", {"fingerprint": known, "previous": fingerprint(base)}, round=number + 1)

    def _published(self, number: int) -> dict[str, Tensor]:
        base = self.rounds.base(number)
        said = self.ledger.bases()[number]["fingerprint"]
        if fingerprint(base) != said:
            raise CheckpointError(
                f"the base of round {number} is not the one that the ledger names ({said[:16]}); recompute it"
            )
        return base

    def _gather(self, number: int, base: Mapping[str, Tensor]) -> dict[str, int]:
        """Return whose contributions are there, once there are enough, with the frames that each saw."""
        for _ in range(_TRIES):
            here = {facts["owner"] for facts in self.ledger.contributions(number)}
            missing = [node for node in self._circle.nodes() if node not in here]
            for reply in self._circle.exchange(missing, {"what": "train", "round": number}, base):
                if self._circle.has_left(reply, number):
                    continue
                try:
                    if reply.data is None:
                        raise DataError(reply.error)
                    self._accept(number, base, reply.node, reply.data)
                except DataError as error:
                    _log.warning("round %d: %s: %s", number, reply.node, error)
                    self.ledger.append("refusal", {"owner": reply.node, "reason": str(error)[:1000]}, round=number)
                else:
                    self._circle.are_here([reply.node], number)
            frames = {facts["owner"]: facts["frames"] for facts in self.ledger.contributions(number)}
            if len(frames) >= self._constitution.quorum:
                return frames
        raise TrainingError(
            f"round {number} has {len(frames)} contributions and needs {self._constitution.quorum}; what came is kept: "
            f"start the coordinator again when more members are back"
        )

    def _accept(self, number: int, base: Mapping[str, Tensor], node: str, data: bytes) -> None:
        """Check a contribution, and keep it as it came and as it was decoded, before the ledger says that it is there.

        Raises:
            DataError: it is not what was asked for.
        """
        message = read_contribution(data, number, base, self._constitution, self._members)
        if message.sender != node:
            raise DataError(f"{node} sent what {message.sender} signed; expected its own")
        delta = decoded(message, base, self._constitution)
        write_atomic(self.rounds.message(number, node), lambda temporary: temporary.write_bytes(data))
        write_atomic(self.rounds.delta(number, node), partial(safetensors.torch.save_file, delta))
        facts = {key: message.body[key] for key in ("owner", "steps", "frames", "data_class", "spent")}
        self.ledger.append("contribution", {**facts, "message": message.digest, "bytes": len(data)}, round=number)

    def _judged(self, number: int, base: Mapping[str, Tensor]) -> dict[str, float]:
        """Return what each member that answers loses on its held-out episodes under a base."""
        found, known = {}, fingerprint(base)
        for node, verdict in self._circle.ask("judge", number, base, kind="verdict").items():
            try:
                if verdict.body.get("base") != known:
                    raise DataError("the verdict is of another base")
                loss = verdict.body["losses"]["total"]
                # A loss is a sum of squares; text, none, or infinity is nobody's verdict.
                if not isinstance(loss, int | float) or not 0 < loss < math.inf:
                    raise DataError(f"its loss is {str(loss)[:40]}; expected a number above 0")
                found[node] = float(loss)
            except (DataError, KeyError, TypeError) as error:
                _log.warning("round %d: %s gives no verdict: %s", number, node, error)
        return found


def succeed(keeping: Keeping, path: Path | str, constitution: Constitution, key: SigningKey) -> int:
    """Take over from a coordinator that is lost, with what a member kept; return the round that comes next.

    The folder is then a coordinator's. The rounds go on from the newest base; the outer optimiser begins without
    momentum, and the bases before can no longer be recomputed from here.

    Raises:
        DataError: the key has no seat, the ledger does not verify, or no base came yet.
        StorageError: the folder holds a ledger already.
    """
    seats = {public: name for name, public in constitution.coordinator_keys().items()}
    if key.public not in seats:
        raise DataError(
            f"{key.public} has no seat among the coordinators; expected a key of {', '.join(seats.values())}"
        )
    path = Path(path)
    if path.exists():
        raise StorageError(f"{path} is there already; take over into a new folder")
    number, base = keeping.base()
    content = keeping.read()
    named = Records(keeping.ledger).bases()
    if number != max(named, default=None) or named[number]["fingerprint"] != fingerprint(base):
        raise DataError(
            f"the base of round {number} is kept here, and the ledger names that of round {max(named, default=0)}; let "
            f"a member who has that one take over"
        )
    with whole_folder(path) as begun:
        made = Rounds(begun)
        made.keep(number, base, {})
        write_atomic(made.path / "ledger.jsonl", lambda temporary: temporary.write_bytes(content))
        with Ledger(made.path / "ledger.jsonl", key) as written:
            facts = {"coordinator": seats[key.public], "base": fingerprint(base)}
            written.append("succession", facts, round=number)
    return number


def read_contribution(
    data: bytes, number: int, base: Mapping[str, Tensor], constitution: Constitution, members: Mapping[str, str]
) -> SignedMessage:
    """Return a member's contribution to a round.

    Raises:
        DataError: it is no member's, of another round or base, of a class that may not shape the base, or a refusal.
    """
    message = unseal_answer(data, kind="contribution", known=members, limit=constitution.largest_bytes)
    check_facts(message, number, fingerprint(base), constitution)
    check_spent(message, constitution)
    return message


def decoded(message: SignedMessage, base: Mapping[str, Tensor], constitution: Constitution) -> dict[str, Tensor]:
    """Return the delta of a contribution.

    Raises:
        DataError: it does not fit the base, or is not finite.
    """
    codec = CODECS[str(constitution.codec["name"])].parse(constitution.codec)
    delta = codec.decode(message.tensors, {name: tensor.shape for name, tensor in base.items()})
    check_contribution(delta, base)
    return delta


def weave(rounds: Rounds, number: int, constitution: Constitution, frames: Mapping[str, int]) -> Woven:
    """Return what contributions make of a round's base; `frames` says how many each of their owners saw.

    It is the same to the last bit, whoever computes it.

    Raises:
        StorageError: a contribution is missing.
    """
    base = rounds.base(number)
    files = {owner: rounds.delta(number, owner) for owner in sorted(frames)}
    for owner, path in files.items():
        if not path.is_file():
            raise StorageError(f"the contribution of {owner} to round {number} is not at {path}; restore it")
    power = {"equal": 0.0, "frames": 1.0, "sqrt-frames": 0.5}[constitution.weighting]
    # Fewer than a quorum, as without a member in `recompute`, may be too few for the cap: then all weigh alike.
    weights = capped({owner: float(frames[owner]) ** power for owner in files}, max(constitution.cap, 1 / len(files)))
    aggregator = AGGREGATORS[str(constitution.aggregation["name"])].parse(constitution.aggregation)
    shapes = {name: tensor.shape for name, tensor in base.items()}
    sources = {owner: partial(_tensor, path) for owner, path in files.items()}
    aggregate = aggregator.aggregate(sources, weights, shapes, cap=constitution.cap)
    outer = OUTER[str(constitution.outer["name"])].parse(constitution.outer)
    moved, momentum = outer.step(base, aggregate.tensors, rounds.momentum(number))
    return Woven(base=moved, momentum=momentum, weights=aggregate.weights, notes=aggregate.notes)


def weave_sum(rounds: Rounds, number: int, constitution: Constitution, weights: Mapping[str, float]) -> Woven:
    """Return what the sum of a round makes of its base; `weights` are those that its owners multiplied by.

    Without any, no sum could be opened, and the base stays as it is.

    Raises:
        CheckpointError: the sum is missing or damaged.
    """
    if not weights:
        return unchanged(rounds, number)
    total = math.fsum(weights.values())
    mean = {name: (tensor / total).float() for name, tensor in kept_sum(rounds.path, number).items()}
    outer = OUTER[str(constitution.outer["name"])].parse(constitution.outer)
    moved, momentum = outer.step(rounds.base(number), mean, rounds.momentum(number))
    shares = {owner: weight / total for owner, weight in sorted(weights.items())}
    return Woven(base=moved, momentum=momentum, weights=shares, notes={})


def unchanged(rounds: Rounds, number: int) -> Woven:
    """Return what a round makes to which nothing was contributed that may count."""
    return Woven(base=rounds.base(number), momentum=rounds.momentum(number), weights={}, notes={})


def recompute(
    path: Path | str,
    constitution: Constitution,
    *,
    into: Path | str,
    without: Collection[str] = (),
    progress: Progress = SILENT,
) -> dict[int, str]:
    """Compute all bases again from the kept contributions, in another folder; return their fingerprints by round.

    With nobody left out they are those that the ledger names. With `without` they are what comes of the others'
    contributions alone, as these were made: from bases that the owners who are left out had a part in. Each message is
    read and checked as when it came. Under secure aggregation the sum of each round is opened again from the masked
    contributions and the secrets that members handed over.

    Raises:
        DataError: a message is not what the ledger says, a recomputed base is not the published one, or one is to be
            left out of a sum under secure aggregation.
        StorageError: a contribution is missing, or the target is the folder itself.
    """
    if Path(path).resolve() == Path(into).resolve():
        raise StorageError(f"{into} holds what is recomputed from; choose another folder for the result")
    kept, made = Rounds(path), Rounds(into)
    records = Records(kept.path / "ledger.jsonl")
    published = records.bases()
    # A successor was handed the base, and nothing of the rounds before.
    begun = max((entry.body["round"] for entry in records.entries("succession")), default=0)
    found = {begun: made.keep(begun, kept.base(begun), {})}
    # Of a round that was woven twice, before and after a succession, the second is the one that counts.
    woven_in = {entry.body["round"]: entry for entry in records.entries("round") if entry.body["round"] >= begun}
    with progress.task("recomputing", len(woven_in), "round") as task:
        for _, entry in sorted(woven_in.items()):
            again = _summed_again if constitution.secure_aggregation else _woven_again
            woven, number = again(kept, made, records, constitution, entry, without), entry.body["round"]
            found[number + 1] = made.keep(number + 1, woven.base, woven.momentum)
            if not without and found[number + 1] != published[number + 1]["fingerprint"]:
                raise DataError(f"the recomputed base of round {number + 1} differs from the published one")
            task.advance()
    return found


def _woven_again(
    kept: Rounds, made: Rounds, records: Records, constitution: Constitution, entry: Entry, without: Collection[str]
) -> Woven:
    """Return what the kept contributions to a round make of it; see `recompute`."""
    number, frames = entry.body["round"], {}
    members = {public: name for name, public in constitution.member_keys().items()}
    said = {facts["owner"]: facts for facts in records.contributions(number)}
    for owner in entry.body["facts"]["weights"]:
        if owner in without:
            continue
        with storage_errors(kept.message(number, owner)):
            data = kept.message(number, owner).read_bytes()
        base = kept.base(number)
        message = read_contribution(data, number, base, constitution, members)
        if message.digest != said[owner]["message"]:
            raise DataError(f"the contribution of {owner} to round {number} is not the one that the ledger names")
        frames[owner] = said[owner]["frames"]
        delta = decoded(message, base, constitution)
        write_atomic(made.delta(number, owner), partial(safetensors.torch.save_file, delta))
    return weave(made, number, constitution, frames) if frames else unchanged(made, number)


def _summed_again(
    kept: Rounds, made: Rounds, records: Records, constitution: Constitution, entry: Entry, without: Collection[str]
) -> Woven:
    """Return what the kept sum of a round makes of it, opened again; see `recompute`."""
    number, weights = entry.body["round"], entry.body["facts"]["weights"]
    if inside := sorted({*weights} & {*without}):
        raise DataError(
            f"round {number} was summed under secure aggregation: nobody has the contribution of {', '.join(inside)} "
            f"by itself, so it cannot be left out. Weave anew without that member"
        )
    if weights:
        weights = reopen(kept.path, records, constitution, number, kept.base(number), into=made.path)
    return weave_sum(made, number, constitution, weights)


def _tensor(path: Path, name: str) -> Tensor:
    """Read one tensor of a file, and no more of it."""
    with storage_errors(path), safetensors.safe_open(str(path), framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _evaluation(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Any]:
    """Return what the ledger says of the held-out losses: of each member, and of the one in the middle."""
    middle = {"before": statistics.median(before.values()), "after": statistics.median(after.values())}
    return {**middle, "owners": {name: [before.get(name), after.get(name)] for name in sorted({*before, *after})}}


def _worse(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Return by what share of it a loss grows, for the member in the middle; no word counts as without bound."""
    return statistics.median(after.get(node, float("inf")) / loss - 1 for node, loss in before.items())
