"""The coordinator: it runs rounds that can be interrupted at any moment and recomputed by anyone.

In a round the coordinator asks every member for its contribution, waits up to the constitution's timeout, and
aggregates the received contributions into the next base. After each step it writes its state to disk: the base, each
accepted contribution with its signature, and the ledger, which determines where to resume. A base depends only on the
previous base, the contributions and the constitution, so `recompute` reproduces it bit for bit.
"""

import logging
import statistics
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from worldloom.core.closing import Closing
from worldloom.core.errors import CheckpointError, ConfigError, DataError, TrainingError
from worldloom.core.files import whole_folder, write_atomic
from worldloom.core.progress import SILENT, Progress
from worldloom.core.signing import SigningKey
from worldloom.federation.record.envelope import SignedMessage
from worldloom.federation.record.ledger import Ledger, LedgerReader, constitution_facts, read_ledger
from worldloom.federation.record.ledger_rules import THE_SUM
from worldloom.federation.record.statements import SignedContribution
from worldloom.federation.rounds.base import Base
from worldloom.federation.rounds.contribution import read_contribution
from worldloom.federation.rounds.member_store import MemberStore
from worldloom.federation.rounds.members import LONGEST_REASON, Members
from worldloom.federation.rounds.next_base import NextBase, aggregated, mean_of_sum, next_base
from worldloom.federation.rounds.round_store import RoundStore
from worldloom.federation.rounds.rule_check import check_model, check_rules
from worldloom.federation.rounds.secure_rounds import SecureSums
from worldloom.federation.rules.constitution import Constitution
from worldloom.federation.rules.ranges import Loss, within
from worldloom.federation.transport.messages import Transport

_log = logging.getLogger(__name__)
_TRIES = 3  # exchanges in a round until the quorum is met
_LOSS = TypeAdapter(Loss)


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """A candidate for the next base, and each answering member's loss with this candidate.

    `failure` says why no candidate could be computed; `result` then contains the unchanged base.
    """

    result: NextBase
    after: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""


class Coordinator(Closing):
    """Runs the rounds of a consortium over a transport.

    `initial` is the base of the first round; it is ignored in a folder that already has rounds.

    Raises:
        StorageError: another process coordinates in the folder.
        ConfigError: the constitution cannot work, or not with this base; see `check_rules` and `check_model`.
        DataError: the ledger does not verify, lacks entries or belongs to another constitution, or the key is not a
            coordinator's.
    """

    def __init__(
        self,
        path: Path | str,
        constitution: Constitution,
        *,
        key: SigningKey,
        transport: Transport,
        initial: Base,
        progress: Progress = SILENT,
    ) -> None:
        if key.public not in constitution.coordinator_keys().values():
            raise DataError(
                f"{key.public} is not the key of a coordinator in the constitution; use the key of a coordinator"
            )
        check_rules(constitution)
        check_model(constitution, initial.tensors)
        self.rounds, self._constitution, self._progress = RoundStore(path), constitution, progress
        self._newest: tuple[int, Base] | None = None  # the newest published base and its round
        self.ledger = Ledger(self.rounds.ledger, key)
        with ExitStack() as stack:
            stack.callback(self.ledger.close)
            if self.ledger.head.length:
                read_ledger(self.rounds.ledger, constitution)
            self._check_complete()
            if not self.ledger.head.length:
                self.ledger.append("constitution", constitution_facts(constitution))
            self._members = Members(constitution, transport, self.ledger, key)
            self._sums = SecureSums(self.rounds.path, constitution, ledger=self.ledger, members=self._members)
            if not self.ledger.bases():
                self.rounds.save(0, initial, {})
                self.ledger.append("base", {"fingerprint": initial.fingerprint}, round=0)
            stack.pop_all()

    def close(self) -> None:
        """Close the ledger."""
        self.ledger.close()

    def _check_complete(self) -> None:
        """Check that the ledger was not lost or cut: without it, the coordinator would write and sign another one.

        Raises:
            DataError: files are stored that later entries must have recorded.
        """
        last = max(self.ledger.bases(), default=-1)
        told = [entry.body["kind"] for entry in self.ledger.entries() if entry.body["round"] == last]
        judged = told[::-1].index("contribution") if "contribution" in told else len(told) - 1
        enough = self._constitution.secure_aggregation or told.count("contribution") >= self._constitution.quorum
        # The next base is stored after the contributions and an evaluation are recorded, and before its own entry.
        ended = enough and judged >= 1 if last >= 0 else self.ledger.head.length > 0
        if self.rounds.newest > last + ended or self.rounds.begun > last:
            found = f"ends in round {last}" if last >= 0 else "has no base"
            raise DataError(
                f"{self.ledger.path} {found}, but later files are stored beside it: the ledger was lost or cut. "
                f"Restore it from the longest copy of a member, which is consortium/ledger.jsonl in the member's folder"
            )

    def run(self) -> Base:
        """Run the remaining rounds, and return the last base.

        Raises:
            TrainingError: fewer members than the quorum contributed; run again when more are connected.
        """
        last = self._constitution.rounds
        with self._progress.task("weaving", last, "round") as task:
            begun = max(self.ledger.bases())
            task.advance(begun)
            for number in range(begun, last):
                self.run_round(number)
                task.advance(1)
        base = self._published(last)
        self._hand_over(last, base)
        return base

    def _hand_over(self, number: int, base: Base) -> None:
        """Send the last base to all members, unless all have confirmed it."""
        *_, newest = self.ledger.entries()
        seen = newest.body["facts"].get("countersigned", []) if newest.body["kind"] == "checkpoint" else []
        if {one["key"] for one in seen} < set(self._constitution.member_names()):
            self._members.ask("store", number, base, kind="receipt")

    def run_round(self, number: int) -> None:
        """Run one round: collect contributions, aggregate, evaluate, and publish the next base."""
        base, secure = self._published(number), self._constitution.secure_aggregation
        if done := self.ledger.of("round", number):  # the coordinator was killed before it recorded the next base
            self._publish_base(number, base, self._recorded(number, base, done[-1]))
            return
        # The owners that count, with their weights in the sum or, without secure aggregation, their frames.
        whole: Mapping[str, Any] = (self._sums.gather if secure else self._gather)(number, base)
        before, group, left_out = self._judged(number, base), whole, list[str]()
        trial = self._trial(number, base, group)
        while reason := self._fault(number, before, trial):
            others = {owner: {name: count for name, count in group.items() if name != owner} for owner in group}
            if secure or len(group) - 1 < self._constitution.quorum:
                others = {}  # a secure sum cannot exclude an owner; a group below the quorum may not change a base
            trials = {owner: self._trial(number, base, rest, partial=True) for owner, rest in others.items()}
            possible = [owner for owner, one in trials.items() if not one.failure]
            if not possible:
                if secure or trial.failure:
                    reason += ", so the base does not change"
                    self.ledger.append("refusal", {"owner": THE_SUM, "reason": reason}, round=number)
                unchanged = next_base(self.rounds, number, base, self._constitution, None)
                left_out, trial = list(whole), _Trial(result=unchanged, after=before)
                break
            culprit = min(possible, key=lambda owner: _growth(before, trials[owner].after))
            left_out.append(culprit)
            self.ledger.append("refusal", {"owner": culprit, "reason": reason}, round=number)
            trial, group = trials[culprit], others[culprit]
        self._publish(number, base, trial, left_out=left_out, before=before)

    def _trial(self, number: int, base: Base, group: Mapping[str, Any], *, partial: bool = False) -> "_Trial":
        """Return the base that results from the contributions of a group, and the members' losses with this base.

        The trial has failed if the contributions cannot be combined, for example because the result is not finite. A
        `partial` group also fails if it has too few owners for the aggregator.

        Raises:
            ConfigError: all contributions together have too few owners for the aggregator.
        """
        try:
            if self._constitution.secure_aggregation:
                change = mean_of_sum(self.rounds, number, group)
            else:
                change = aggregated(self.rounds, number, base, self._constitution, group)
            result = next_base(self.rounds, number, base, self._constitution, change)
        except (ArithmeticError, ConfigError, DataError) as error:
            if isinstance(error, ConfigError) and not partial:
                raise
            unchanged = next_base(self.rounds, number, base, self._constitution, None)
            return _Trial(result=unchanged, failure=f"{type(error).__name__}: {error}")
        return _Trial(result=result, after=self._judged(number, result.base))

    def _fault(self, number: int, before: Mapping[str, float], trial: "_Trial") -> str:
        """Return why the base of a trial may not become the next base; an empty string if it may."""
        if trial.failure:
            _log.warning("round %d: %s", number, trial.failure)
            return f"the next base cannot be computed with it: {trial.failure}"[:LONGEST_REASON]
        if before and (worse := _growth(before, trial.after)) > self._constitution.quality.max_worse:
            _log.warning("round %d: held-out losses would grow by %.0f%%", number, 100 * worse)
            return f"held-out losses would grow by {worse:.1%} with it"
        return ""

    def _publish(
        self,
        number: int,
        base: Base,
        trial: "_Trial",
        *,
        left_out: list[str],
        before: Mapping[str, float],
    ) -> None:
        """Save the next base, and record in the ledger how it was computed."""
        result = trial.result
        self.rounds.save(number + 1, result.base, result.momentum)
        facts = {
            "weights": dict(result.weights),
            "notes": {owner: dict(note) for owner, note in result.notes.items()},
            "left_out": left_out,
            "evaluation": _evaluation(before, trial.after) if before else None,
        }
        self.ledger.append("round", facts, round=number)
        self._publish_base(number, base, result)

    def _recorded(self, number: int, base: Base, facts: Mapping[str, Any]) -> NextBase:
        """Return the result of a round that is recorded in the ledger."""
        names, change = facts["weights"], None
        if names and self._constitution.secure_aggregation:
            change = mean_of_sum(self.rounds, number, self.ledger.of("sum", number)[-1]["weights"])
        elif names:
            frames = {one["owner"]: one["frames"] for one in self.ledger.of("contribution", number)}
            group = {owner: frames[owner] for owner in names}
            change = aggregated(self.rounds, number, base, self._constitution, group)
        result = next_base(self.rounds, number, base, self._constitution, change)
        self.rounds.save(number + 1, result.base, result.momentum)
        return result

    def _publish_base(self, number: int, base: Base, result: NextBase) -> None:
        published = {"fingerprint": result.base.fingerprint, "previous": base.fingerprint}
        self.ledger.append("base", published, round=number + 1)
        self._newest = number + 1, result.base

    def _published(self, number: int) -> Base:
        """Return the base of a round, from memory or from disk.

        Raises:
            CheckpointError: the file does not match the ledger.
        """
        if self._newest is None or self._newest[0] != number:
            try:
                base = self.rounds.base(number, named=self.ledger.bases()[number]["fingerprint"])
            except DataError as error:
                raise CheckpointError(
                    f"the base of round {number} does not match the ledger: {error}. Restore its file from a copy"
                ) from None
            self._newest = number, base
        return self._newest[1]

    def _gather(self, number: int, base: Base) -> dict[str, int]:
        """Collect contributions until the quorum is met; return the number of training frames of each owner."""
        for _ in range(_TRIES):
            here = self._counted(number)
            missing = [node for node in self._members.nodes() if node not in here]
            answers = self._members.exchange(missing, {"what": "train", "round": number}, base, kind="contribution")
            self._members.collect(answers, number, lambda message: self._accept(number, base, message))
            frames = self._counted(number)
            if len(frames) >= self._constitution.quorum:
                return frames
        raise TrainingError(
            f"round {number} has {len(frames)} contributions but needs {self._constitution.quorum}. The "
            f"contributions are saved; start the coordinator again when more members are connected"
        )

    def _counted(self, number: int) -> dict[str, int]:
        """Return the number of training frames of each owner whose contribution to a round is recorded."""
        return {facts["owner"]: facts["frames"] for facts in self.ledger.of("contribution", number)}

    def _accept(self, number: int, base: Base, message: SignedMessage) -> None:
        """Check a contribution, save it both as received and as decoded, and then record it in the ledger.

        Raises:
            DataError: the contribution is invalid; see `read_contribution`.
        """
        owner = message.sender
        delta = read_contribution(message, number, base, self._constitution)
        signed = SignedContribution.of([message.statement], number, self._constitution)
        self._members.check_seen(owner, signed.seen)
        self._members.check_spent(owner, signed.facts["spent"])
        write_atomic(self.rounds.message(number, owner), lambda temporary: temporary.write_bytes(message.data))
        self.rounds.save_delta(number, owner, delta)
        self.ledger.append("contribution", signed.facts, round=number)
        self._members.mark_present(owner, signed.seen, number)

    def _judged(self, number: int, base: Base) -> dict[str, float]:
        """Return each answering member's held-out loss with a base."""
        found = {}
        for node, verdict in self._members.ask("judge", number, base, kind="verdict").items():
            try:
                if verdict.body.get("base") != base.fingerprint:
                    raise DataError(
                        f"expected a loss with base {base.fingerprint[:16]}; got base "
                        f"{str(verdict.body.get('base'))[:16]}"
                    )
                loss = verdict.body["losses"].get("total")
                if within(_LOSS, loss) is None:
                    raise DataError(f"expected a total loss above 0 and up to 1e30; got {loss!r}")
                found[node] = float(loss)
            except DataError as error:
                self._members.refuse(node, "judge", error, number)
        return found


def succeed(store: MemberStore, path: Path | str, constitution: Constitution, key: SigningKey) -> int:
    """Take over from a lost coordinator with a member's copies of base and ledger; return the next round.

    `path` becomes the new coordinator's folder of rounds. The rounds continue from the newest base; the outer optimiser
    starts without momentum, and earlier bases cannot be recomputed from this folder.

    Raises:
        DataError: the key is not a coordinator's, the ledger does not verify, or the member lacks the newest base.
        StorageError: the folder exists already.
    """
    names = {public: name for name, public in constitution.coordinator_keys().items()}
    if key.public not in names:
        raise DataError(
            f"{key.public} is not the key of a coordinator; use the key of one of {', '.join(names.values())}"
        )
    number, base = store.base()
    content = store.read()
    reader = LedgerReader(store.ledger, constitution)
    reader.take(content.splitlines(keepends=True))
    named = reader.bases()
    if number != max(named, default=None) or named[number]["fingerprint"] != base.fingerprint:
        raise DataError(
            f"this member's base of round {number} is not the base of round {max(named, default=0)} in the ledger; let "
            f"a member that has the newest base take over"
        )
    with whole_folder(Path(path)) as begun:
        made = RoundStore(begun)
        made.save(number, base, {})
        write_atomic(made.ledger, lambda temporary: temporary.write_bytes(content))
        with Ledger(made.ledger, key) as written:
            facts = {"coordinator": names[key.public], "base": base.fingerprint}
            written.append("succession", facts, round=number)
    return number


def _evaluation(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Any]:
    """Return the held-out losses of each member and of the median member, for the ledger."""
    median = {"before": statistics.median(before.values()), "after": statistics.median(after.values())}
    return {**median, "owners": {name: [before.get(name), after.get(name)] for name in sorted({*before, *after})}}


def _growth(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Return the median over members of the relative growth of the loss; a missing answer counts as infinite loss.

    If no member sent a loss with the previous base, the growth is 0.
    """
    growth = [after.get(node, float("inf")) / loss - 1 for node, loss in before.items()]
    return statistics.median(growth) if growth else 0.0
