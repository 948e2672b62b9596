"""An owner's node: it answers a coordinator's messages; everything else stays with the owner.

A node stores the run of its model, its answers to the newest rounds and the codec's residual in its own folder. A
repeated request for the same round and base gets the same answer, so that killing a node or coordinator loses nothing.
"""

import logging
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter
from torch import Tensor

from worldloom.core.chain import canonical
from worldloom.core.config import Shape, check_shape, parse_component
from worldloom.core.errors import ConfigError, DataError, StorageError, WorldloomError
from worldloom.core.files import exclusive_lock, read_bytes, read_json, whole_folder, write_atomic, write_json
from worldloom.core.signing import SigningKey
from worldloom.federation.record.bodies import check_ask
from worldloom.federation.record.envelope import SignedMessage, seal, unseal
from worldloom.federation.record.statements import origin
from worldloom.federation.rounds.base import Base
from worldloom.federation.rounds.codecs import CODECS
from worldloom.federation.rounds.contribution import Contribution
from worldloom.federation.rounds.local import LocalTraining
from worldloom.federation.rounds.member_store import BaseMissing, EntriesMissing, LedgerRefused, MemberStore
from worldloom.federation.rounds.members import LONGEST_REASON
from worldloom.federation.rounds.rule_check import check_model, check_rules
from worldloom.federation.rounds.secure_node import AlreadyHelped, SecureNode
from worldloom.federation.rounds.self_check import SelfCheck
from worldloom.federation.rules.constitution import Constitution
from worldloom.federation.rules.ranges import Loss, within
from worldloom.federation.secure.aggregation_protocol import WrongShare
from worldloom.federation.secure.privacy import Accountant, PrivacyConfig, clip_and_noise, secret_generator
from worldloom.models import load_tensors, save_tensors

_log = logging.getLogger(__name__)
_LOSS = TypeAdapter(Loss)
_RESIDUAL = "codec-residual"
_LONGEST_WHY = 500  # characters
_STORED_ANSWERS = 3  # rounds: a coordinator that was rolled back by a round asks for old answers again


class _Exit(Shape):
    """The content of `left.json`: why the owner left. Whatever else is in the file is not signed."""

    left: Literal[True]
    why: str = Field(max_length=LONGEST_REASON)


class Node:
    """Answers a coordinator's messages; a transport calls `handle`, from any process.

    `training` uses only data that is permitted for the base. `own` trains the same run for the owner's private use, and
    may use more data; by default it is `training`.

    Raises:
        ConfigError: the constitution cannot work, or not with this model (see `check_rules` and `check_model`), or the
            partition shares statistics under privacy, where noise would corrupt them.
    """

    def __init__(
        self,
        path: Path | str,
        training: LocalTraining,
        *,
        name: str,
        key: SigningKey,
        constitution: Constitution,
        data_class: str,
        own: LocalTraining | None = None,
    ) -> None:
        self.path, self.name, self.constitution = Path(path), name, constitution
        self._training, self.own, self._key = training, own or training, key
        self._class = data_class
        check_rules(constitution)
        check_model(constitution, training.like)
        privacy = constitution.privacy
        if privacy is not None and privacy.noise > 0 and training.shared_statistics:
            raise ConfigError(
                f"partition.shared matches {training.shared_statistics[0]!r}, a statistic of the data. The noise that "
                f"the setting 'privacy' adds would corrupt this tensor; add the tensor to partition.sovereign"
            )
        self._coordinators = {public: title for title, public in constitution.coordinator_keys().items()}
        self.store = MemberStore(self.path / "consortium", constitution, key, like=training.like)
        self._left = self.path / "left.json"
        self.fault: LedgerRefused | None = None  # what was wrong with the ledger that a coordinator sent last
        self._check = SelfCheck(self.path / "self-check.json", name, self.store)
        self._sums: SecureNode | None = None
        self._answers: dict[str, Callable[[SignedMessage], bytes]] = {"train": self._train}
        if constitution.secure_aggregation:
            sums = self._sums = SecureNode(self.path / "secure", name=name, key=key, constitution=constitution)
            # Without 'train': its answer would be a delta that is not masked.
            self._answers = {
                "advertise": lambda asked: sums.advertise(asked, *self._take_session(asked), self._contribution),
                "share": sums.share,
                "mask": lambda asked: sums.mask(asked, self._spend),
                "unmask": sums.unmask,
            }
        self._answers |= {"judge": self._judge, "store": self._store}

    def handle(self, data: bytes) -> bytes:
        """Answer one message. If that fails, the answer is a signed refusal with the reason.

        Raises:
            DataError: the message is not from a coordinator.
        """
        asked = unseal(data, kind="ask", known=self._coordinators, limit=self.constitution.largest_bytes)
        number: int | None = None
        try:
            if asked.body.get("constitution") != self.constitution.fingerprint:
                raise DataError(
                    "the message is for a different constitution from this node's; start coordinator and node with the "
                    "same constitution"
                )
            answer = self._answers.get(str(asked.body.get("what")))
            if answer is None:
                raise DataError(
                    f"expected a request to {', '.join(self._answers)}; got {asked.body.get('what')!r}. "
                    f"Run the same version on both sides"
                )
            check_ask(asked.body)
            number = asked.body["round"]
            # A repeated message that arrives while the node works on it waits here, and then gets the same answer.
            with exclusive_lock(self.path / ".lock", None):
                if self.has_left:
                    why = check_shape(read_json(self._left), _Exit, self._left).why
                    left = {"round": number, "constitution": self.constitution.fingerprint, "left": True, "why": why}
                    return seal("refusal", left, {}, key=self._key)
                return answer(asked)
        except (WorldloomError, ArithmeticError) as error:
            why = str(error)[:LONGEST_REASON]  # it may quote the message
            _log.warning("%s refuses: %s", self.name, why)
            self.fault = error if isinstance(error, LedgerRefused) else None
            if self.fault is not None:
                _log.error("%s does not accept the ledger. %s", self.name, self.fault.place)
            body: dict[str, Any] = {"round": number, "why": why}
            if isinstance(error, EntriesMissing):
                body["length"] = error.length
            if isinstance(error, BaseMissing):
                body["lacks"] = True
            if isinstance(error, AlreadyHelped):
                body["helped"] = True
            if isinstance(error, WrongShare):
                body["sender"] = error.sender
            return seal("refusal", body, {}, key=self._key)

    @property
    def has_left(self) -> bool:
        """Whether the owner left the consortium, and has not returned."""
        return self._left.is_file()

    def leave(self, why: str = "") -> None:
        """Leave the consortium: from now on the node refuses every message, with the reason. This needs no permission.

        Raises:
            DataError: `why` is too long for the ledger.
        """
        if len(why) > _LONGEST_WHY:
            raise DataError(
                f"'why' has {len(why)} characters; expected at most {_LONGEST_WHY}, because every member stores this "
                f"text. Shorten the text"
            )
        with exclusive_lock(self.path / ".lock", None):
            write_json(self._left, {"left": True, "why": f"{self.name} left the consortium{': ' if why else ''}{why}"})

    def come_back(self) -> None:
        """Take part again, from the next round on.

        Raises:
            DataError: the node has not left.
        """
        if not self.has_left:
            raise DataError(
                f"{self.name} has not left the consortium, so it cannot return; start its node to take part"
            )
        with exclusive_lock(self.path / ".lock", None):
            self._check.returns()
            self._left.unlink()

    def export(self, into: Path | str, rules: Path | str) -> None:
        """Copy the run, base and ledger, and the constitution with its signatures, into a new folder.

        Raises:
            StorageError: the folder exists already, or writing failed.
        """
        rules = Path(rules)
        with exclusive_lock(self.path / ".lock", None), whole_folder(Path(into)) as begun:
            shutil.copytree(self.own.run.path, begun / "run")
            if self.store.path.is_dir():
                shutil.copytree(self.store.path, begun / "consortium")
            for file in (rules, *rules.parent.glob(f"{rules.name}.*.sig")):
                shutil.copy2(file, begun / file.name)

    def pilot(self, base: Base) -> Base:
        """Train alone from an untrained base for `align_steps`; return a candidate for the first base of all members.

        Only data that is permitted for the base is used. A repeated call returns the same base.

        Raises:
            DataError: the constitution's `align_steps` is 0, or a base was received already.
            TrainingError: see `worldloom.training.fit`.
        """
        steps = self.constitution.align_steps
        if not steps:
            raise DataError(
                "a pilot trains for the constitution's align_steps, which is 0; set align_steps, and let all members "
                "sign again"
            )
        with exclusive_lock(self.path / ".lock", None):
            if self.store.number is not None:
                raise DataError(f"{self.name} has received a base already; run a pilot only before the first round")
            return self._training.pilot(base, steps)

    def fine_tune(self, steps: int, *, frozen: bool = False) -> None:
        """Fine-tune the newest base for the owner's own use, while the learning rate falls to 0.

        With `frozen` only the sovereign tensors are trained. A repeated call with the same steps does nothing more.

        Raises:
            DataError: no base has been received yet.
            TrainingError: see `worldloom.training.fit`.
        """
        with exclusive_lock(self.path / ".lock", None):
            number, base = self.store.base()
            self._align(self.own, base)
            self.own.fine_tune(f"fine-tune {steps} after round {number}", base, steps, frozen=frozen)

    def train_alone(self, steps: int, *, still: Callable[[], bool] = lambda: True) -> bool:
        """Continue training without a coordinator, for example when none can be reached; return whether it trained.

        Training starts from the newest base, or continues where an earlier call ended. The trained shared tensors are
        not sent; the next round starts from the base that the coordinator sends. Once the node is idle, it calls
        `still`; if `still` returns False, the node does not train.

        Raises:
            DataError: no base has been received yet.
            TrainingError: see `worldloom.training.fit`.
        """
        with exclusive_lock(self.path / ".lock", None):
            if not still():
                return False
            number, base = self.store.base()
            self._align(self.own, base)
            self.own.train_alone(f"alone after round {number}", base, steps, at=self._at(number + 1))
            return True

    def _align(self, training: LocalTraining, base: Base) -> None:
        if self.constitution.align_steps:
            training.align(base, self.constitution.align_steps)

    def _train(self, asked: SignedMessage) -> bytes:
        (base, seen), number = self._take(asked), asked.body["round"]
        stored = self.path / "answers" / f"{number:05d}-{base.fingerprint[:16]}.msg"
        if (before := self._stored(stored)) is not None:
            return before
        contribution = self._contribution(number, base)
        tensors: Mapping[str, Tensor] = contribution.tensors
        spent: Mapping[str, Any] = {}
        if self.constitution.privacy is not None:
            spent = self._spend(self.constitution.privacy, number, None)
            tensors = clip_and_noise(tensors, self.constitution.privacy, secret_generator())
        codec = parse_component(CODECS, self.constitution.codec)
        payload, residual = codec.encode(tensors, self._residual(number), generator=secret_generator())
        save_tensors(self._residual_stem(number), residual, {"round": number}, kind=_RESIDUAL)
        body = {**contribution.body(), **origin(self.constitution, seen), "spent": dict(spent)}
        answer = seal("contribution", body, payload, key=self._key)
        write_atomic(stored, lambda temporary: temporary.write_bytes(answer))
        for old in sorted(stored.parent.glob("*.msg"))[:-_STORED_ANSWERS]:
            old.unlink(missing_ok=True)
        return answer

    def _stored(self, path: Path) -> bytes | None:
        """Return an earlier answer; None if there is none, or if its file is damaged."""
        if not path.is_file():
            return None
        limit = self.constitution.largest_bytes
        try:
            answer = read_bytes(path, limit)
            unseal(answer, kind="contribution", known={self._key.public: self.name}, limit=limit)
        except (DataError, StorageError) as error:
            _log.warning("%s trains again, because its stored answer is damaged: %s", self.name, error)
            return None
        return answer

    def _at(self, number: int) -> int:
        """Return the step of the learning rate's schedule at which a round begins."""
        rules = self.constitution
        return rules.align_steps + min(number, rules.rounds) * rules.inner_steps

    def _contribution(self, number: int, base: Base) -> Contribution:
        self.store.save_base(number, base)
        self._align(self._training, base)
        made = self._training.train(f"round {number}", base, self.constitution.inner_steps, at=self._at(number))
        return Contribution.of(
            self._training.partition.split(made.before),
            made.before,
            made.after,
            owner=self.name,
            round=number,
            base=base.fingerprint,
            steps=made.steps,
            frames=made.frames,
            data_class=self._class,
        )

    def _spend(self, config: PrivacyConfig, number: int, in_sum: float | None) -> dict[str, Any]:
        """Account for a round's privacy before its answer is sent; return the privacy spent so far.

        Without secure aggregation the owner adds all of the noise, and `in_sum` is None. With secure aggregation the
        owner adds a share of the noise; the account then uses `in_sum`, the least noise of the sum (see `noise_of`). If
        the process ends before the result is stored, the next call accounts for the round again.

        Raises:
            PrivacyBudgetSpent: the budget is too small.
        """
        path = self.path / "privacy.json"
        accountant = Accountant(config, read_json(path) if path.is_file() else [])
        # If the file was lost or replaced by an older one, the ledger still has what was sent.
        accountant = max(accountant, Accountant(config, self._recorded()), key=lambda one: one.epsilon)
        epsilon = accountant.spend(noise=in_sum)
        write_json(path, accountant.state())
        spent: dict[str, Any] = {"clip": config.clip, "noise": config.noise, "delta": config.delta, "round": number}
        if in_sum is not None:
            spent |= {"share": 1 / self.constitution.threshold, "in_sum": in_sum}
        return {**spent, "epsilon": epsilon if math.isfinite(epsilon) else None}

    def _recorded(self) -> list[dict[str, Any]]:
        """Return the rounds for which the ledger says that this owner spent privacy, as the accountant's state.

        Equal reports count once: several attempts at a secure sum are charged once, and a coordinator that takes over
        may record a contribution again.
        """
        entries = self.store.records.entries("contribution")
        own = [entry.body["facts"]["spent"] for entry in entries if entry.body["facts"]["owner"] == self.name]
        paid = {canonical(spent): spent.get("in_sum", spent["noise"]) for spent in own}
        return [{"rounds": 1, "noise": noise, "sample_rate": 1.0} for noise in paid.values()]

    def _judge(self, asked: SignedMessage) -> bytes:
        (base, seen), number = self._take(asked), asked.body["round"]
        if self.store.names(number, base.fingerprint):  # otherwise it is a trial
            self.store.save_base(number, base)
        losses = self._training.judge(base)
        if within(_LOSS, losses["total"]) is None:
            raise DataError(f"the held-out loss with this base is {losses['total']:.4g}, so the base is of no use")
        self._check.sends_loss(base.fingerprint, losses["total"])
        body = {"round": number, "base": base.fingerprint, "losses": losses, "countersigned": seen}
        return seal("verdict", body, {}, key=self._key)

    def _store(self, asked: SignedMessage) -> bytes:
        (base, seen), number = self._take(asked), asked.body["round"]
        self.store.save_base(number, base)
        return seal("receipt", {"round": number, "countersigned": seen}, {}, key=self._key)

    def _take(self, asked: SignedMessage) -> tuple[Base, dict[str, Any]]:
        """Store the base and the ledger entries of a message; return the base and the countersigned head.

        Raises:
            DataError: the base or the entries are missing or invalid.
        """
        base = self.store.receive(asked.body["base"], asked.tensors)
        entries = asked.body["ledger"]
        self._check.begin()
        seen = self.store.follow(entries["begin"], entries["lines"], request=asked.statement)
        self._check.compare(self._sent())
        return base, seen

    def _take_session(self, asked: SignedMessage) -> tuple[Base, dict[str, Any]]:
        """Take a request to begin a session of a secure sum; see `_take`.

        Raises:
            DataError: the ledger records too few sessions for this number. A node that joined session 1000000 would
                refuse every session of a coordinator that takes over.
        """
        taken, number, attempt = self._take(asked), asked.body["round"], asked.body["attempt"]
        recorded = sum(entry.body["round"] == number for entry in self.store.records.entries("session"))
        if attempt > recorded:
            raise DataError(
                f"session {attempt} of round {number} is not the next one: the ledger records {recorded} sessions of "
                f"this round; the coordinator must record each session"
            )
        return taken

    def _sent(self) -> set[int]:
        """Return the newest rounds to which this node sent a contribution."""
        if self._sums is not None:
            return set() if self._sums.advertised is None else {self._sums.advertised}
        return {int(path.name.partition("-")[0]) for path in (self.path / "answers").glob("*.msg")}

    def _residual(self, number: int) -> dict[str, Tensor] | None:
        """Return the codec's residual of the newest round before this one, or None if there is none."""
        rounds = [int(path.stem.split("-")[1]) for path in (self.path / "codec").glob("residual-?????.json")]
        before = [round for round in rounds if round < number]
        if not before:
            return None
        return load_tensors(self._residual_stem(max(before)), kind=_RESIDUAL)[0]

    def _residual_stem(self, number: int) -> Path:
        return self.path / "codec" / f"residual-{number:05d}"
