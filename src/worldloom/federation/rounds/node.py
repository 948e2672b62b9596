"""An owner's part of the weaving: it answers what a coordinator asks, and keeps everything else.

A node keeps, in its own folder, the run of its model, the answer of each round and what its codec left out. Asked again
for the same round and base it gives the same answer, so that a node or a coordinator that was killed loses nothing.
"""

import logging
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from worldloom.core.errors import ConfigError, DataError, StorageError, WorldloomError
from worldloom.core.files import exclusive_lock, read_json, storage_errors, whole_folder, write_atomic, write_json
from worldloom.core.signing import SigningKey
from worldloom.data import Frames
from worldloom.federation.record.envelope import SignedMessage, seal, unseal
from worldloom.federation.rounds.codecs import CODECS
from worldloom.federation.rounds.contribution import Contribution
from worldloom.federation.rounds.keeping import Absent, Forked, Keeping, Missing
from worldloom.federation.rounds.local import LocalTraining
from worldloom.federation.rules.constitution import Constitution
from worldloom.federation.rules.partition import fingerprint
from worldloom.federation.secure.privacy import Accountant, PrivacyConfig, clip_and_noise, secret_generator
from worldloom.federation.secure.secure_node import Helped, SecureNode
from worldloom.models import load_tensors, save_tensors

_log = logging.getLogger(__name__)
_RESIDUAL = "codec-residual"
_LONGEST_WHY = 500  # characters
_KEPT = 3  # rounds whose answers are kept: a coordinator that was set back by one asks for them again


class Node:
    """Answers a coordinator's messages; `handle` is what a transport calls, from any process.

    `training` is what may shape the base; `own`, by default the same, trains in the same run for the owner alone, of
    data that may not shape the base too.

    Raises:
        ConfigError: statistics are shared under privacy, whose noise would spoil them.
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
        self._training, self._own, self._key = training, own or training, key
        self._class = data_class
        privacy = constitution.privacy
        if privacy is not None and privacy.noise > 0 and training.shared_statistics:
            raise ConfigError(
                f"partition.shared matches {training.shared_statistics[0]!r}, a statistic of the data, which the noise "
                f"of privacy would spoil; name it in partition.sovereign"
            )
        self._coordinators = {public: title for title, public in constitution.coordinator_keys().items()}
        self.keeping = Keeping(self.path / "consortium", constitution, key)
        self._left = self.path / "left.json"
        self.estranged = False  # whether the newest message was of a coordinator that no longer is one to this node
        self._answers: dict[str, Callable[[SignedMessage], bytes]] = {
            "train": self._train,
            "judge": self._judge,
            "keep": self._keep,
        }
        if constitution.secure_aggregation:
            sums = SecureNode(self.path / "secure", name=name, key=key, constitution=constitution)
            # Not to train: its answer would be a delta that anybody who reads it sees.
            self._answers = {
                "advertise": lambda asked: sums.advertise(self._told(asked), self._contribution),
                "share": sums.share,
                "mask": lambda asked: sums.mask(asked, self._spend),
                "unmask": sums.unmask,
                "judge": self._judge,
                "keep": self._keep,
            }

    @property
    def frames(self) -> Frames:
        """The owner's frames, for its own use."""
        return self._own.frames

    def handle(self, data: bytes) -> bytes:
        """Answer one message; what cannot be done is answered with why, signed, and nothing is lost.

        Raises:
            DataError: the message is not a coordinator's.
        """
        asked = unseal(data, kind="ask", known=self._coordinators, limit=self.constitution.largest_bytes)
        try:
            if asked.body.get("constitution") != self.constitution.fingerprint:
                raise DataError(
                    "the message is of another constitution than the one that this node signed; agree on one, and "
                    "start both with it"
                )
            answer = self._answers.get(str(asked.body.get("what")))
            if answer is None:
                raise DataError(f"a node is asked to {', '.join(self._answers)}; got {asked.body.get('what')!r}")
            # Asked again while it is still at it, it waits for itself, and then has the answer.
            with exclusive_lock(self.path / ".lock", None):
                if self.has_left:
                    said = {"round": asked.body.get("round"), "constitution": self.constitution.fingerprint}
                    return seal("refusal", {**said, **read_json(self._left)}, {}, key=self._key)
                if "about" in asked.body:
                    base = self.keeping.about(str(asked.body["about"]), asked.tensors)
                    asked = replace(asked, tensors=base)
                return answer(asked)
        except WorldloomError as error:
            _log.warning("%s refuses: %s", self.name, error)
            self.estranged = isinstance(error, Forked)
            body = {"round": asked.body.get("round"), "why": str(error)}
            if isinstance(error, Missing):
                body["length"] = error.length
            if isinstance(error, Absent):
                body["lacks"] = True
            if isinstance(error, Helped):
                body["helped"] = True
            return seal("refusal", body, {}, key=self._key)

    @property
    def has_left(self) -> bool:
        """Whether the owner left the consortium, and has not come back."""
        return self._left.is_file()

    def leave(self, why: str = "") -> None:
        """Leave the consortium: from now on nothing but that is answered. It needs nobody's leave.

        Raises:
            DataError: `why` is longer than what everybody keeps.
        """
        if len(why) > _LONGEST_WHY:
            raise DataError(f"why has {len(why)} characters; expected at most {_LONGEST_WHY}: everybody keeps it")
        with exclusive_lock(self.path / ".lock", None):
            write_json(self._left, {"left": True, "why": f"{self.name} left the consortium{': ' if why else ''}{why}"})

    def come_back(self) -> None:
        """Take part again, as if asked for the first time since.

        Raises:
            DataError: it has not left.
        """
        if not self.has_left:
            raise DataError(f"{self.name} has not left; it takes part as it is")
        self._left.unlink()

    def take_along(self, into: Path | str, rules: Path | str) -> None:
        """Copy what is this owner's into a new folder: run, base, ledger, and the constitution with its signatures.

        Raises:
            StorageError: the folder is there already, or the disk refuses.
        """
        into, rules = Path(into), Path(rules)
        with exclusive_lock(self.path / ".lock", None):
            if into.exists():
                raise StorageError(f"{into} is there already; choose another folder to leave with")
            with whole_folder(into) as begun:
                shutil.copytree(self._own.run.path, begun / "run")
                if self.keeping.path.is_dir():
                    shutil.copytree(self.keeping.path, begun / "consortium")
                for file in (rules, *rules.parent.glob(f"{rules.name}.*.sig")):
                    shutil.copy2(file, begun / file.name)

    def pilot(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Train alone from an untrained base for the `align_steps`, and return what may be the first base of all.

        It is trained on what may shape a base. Asked again it answers the same.

        Raises:
            DataError: the constitution has no such steps, or a base came already.
            TrainingError: see `worldloom.training.fit`.
        """
        steps = self.constitution.align_steps
        if not steps:
            raise DataError("a pilot trains for the constitution's align_steps, which are 0; agree on some, and sign")
        with exclusive_lock(self.path / ".lock", None):
            if self.keeping.known:
                raise DataError(f"{self.name} holds a base of this consortium already: a pilot goes before the first")
            return self._training.pilot(base, steps)

    def settle(self, steps: int, *, fixed: bool = False) -> None:
        """Let the newest base settle at home in so many steps, in which the learning rate falls to 0; once.

        With `fixed` the base does not move, and what is sovereign learns to meet it.

        Raises:
            DataError: no base came yet.
            TrainingError: see `worldloom.training.fit`.
        """
        with exclusive_lock(self.path / ".lock", None):
            number, base = self.keeping.base()
            self._align(self._own, base)
            self._own.settle(f"settle {steps} after round {number}", base, steps, fixed=fixed)

    def alone(self, steps: int, *, still: Callable[[], bool] = lambda: True) -> bool:
        """Train on for the owner alone, as when the coordinator is cut off; return whether it did.

        It sets out from the newest base, or from what this owner already made of it. What that makes of the shared part
        stays here; the next round begins with the base that comes. `still` says, once nothing else is done here,
        whether the coordinator is cut off.

        Raises:
            DataError: no base came yet.
            TrainingError: see `worldloom.training.fit`.
        """
        with exclusive_lock(self.path / ".lock", None):
            if not still():
                return False
            number, base = self.keeping.base()
            self._align(self._own, base)
            self._own.alone(f"alone after round {number}", base, steps, at=self._at(number + 1))
            return True

    def _align(self, training: LocalTraining, base: Mapping[str, Tensor]) -> None:
        if self.constitution.align_steps:
            training.align(base, self.constitution.align_steps)

    def _train(self, asked: SignedMessage) -> bytes:
        self._follow(asked)
        number, base = int(asked.body["round"]), asked.tensors
        kept = self.path / "answers" / f"{number:05d}-{fingerprint(base)[:16]}.msg"
        if kept.is_file():
            with storage_errors(kept):
                return kept.read_bytes()
        contribution = self._contribution(number, base)
        tensors: Mapping[str, Tensor] = contribution.tensors
        spent: Mapping[str, Any] = {}
        if self.constitution.privacy is not None:
            spent = self._spend(self.constitution.privacy, number, None)
            tensors = clip_and_noise(dict(tensors), self.constitution.privacy, secret_generator())
        codec = CODECS[str(self.constitution.codec["name"])].parse(self.constitution.codec)
        payload, residual = codec.encode(tensors, self._residual(number))
        save_tensors(self._residual_stem(number), residual, {"round": number}, kind=_RESIDUAL)
        answer = seal("contribution", {**contribution.body(), "spent": dict(spent)}, payload, key=self._key)
        write_atomic(kept, lambda temporary: temporary.write_bytes(answer))
        for old in sorted(kept.parent.glob("*.msg"))[:-_KEPT]:
            old.unlink(missing_ok=True)
        return answer

    def _at(self, number: int) -> int:
        """Return the step of the schedule that a round begins at, for whoever takes part in it."""
        rules = self.constitution
        return rules.align_steps + min(number, rules.rounds) * rules.inner_steps

    def _contribution(self, number: int, base: Mapping[str, Tensor]) -> Contribution:
        self.keeping.keep(number, base)
        self._align(self._training, base)
        made = self._training.stretch(f"round {number}", base, self.constitution.inner_steps, at=self._at(number))
        return Contribution.of(
            self._training.partition.split(made.before),
            made.before,
            made.after,
            owner=self.name,
            round=number,
            base=fingerprint(base),
            steps=made.steps,
            frames=made.frames,
            data_class=self._class,
        )

    def _spend(self, config: PrivacyConfig, number: int, in_sum: float | None) -> dict[str, Any]:
        """Pay for a round before anything of it can leave; return what is spent in all.

        Where the coordinator sees each contribution the noise is this owner's alone and whole; under secure aggregation
        it is a share, and what counts is the noise `in_sum`, to which others add theirs. A round that was paid for and
        whose answer was lost with the process is paid for again: its first noise may have been seen.

        Raises:
            PrivacyBudgetSpent: the budget does not reach.
        """
        path = self.path / "privacy.json"
        accountant = Accountant.of(config, read_json(path) if path.is_file() else [])
        epsilon = accountant.spend(noise=in_sum)
        write_json(path, accountant.state())
        told: dict[str, Any] = {"clip": config.clip, "noise": config.noise, "delta": config.delta, "round": number}
        if in_sum is not None:
            told |= {"share": 1 / self.constitution.threshold, "in_sum": in_sum}
        return {**told, "epsilon": epsilon if math.isfinite(epsilon) else None}

    def _judge(self, asked: SignedMessage) -> bytes:
        seen = self._follow(asked)
        number, known = int(asked.body["round"]), fingerprint(asked.tensors)
        if self.keeping.names(number, known):  # and not a trial
            self.keeping.keep(number, asked.tensors)
        losses = self._training.judge(asked.tensors)
        body = {"round": number, "base": known, "losses": losses, **seen}
        return seal("verdict", body, {}, key=self._key)

    def _keep(self, asked: SignedMessage) -> bytes:
        seen = self._follow(asked)
        self.keeping.keep(int(asked.body["round"]), asked.tensors)
        return seal("receipt", {"round": asked.body["round"], **seen}, {}, key=self._key)

    def _follow(self, asked: SignedMessage) -> dict[str, Any]:
        """Take over the entries that came with a base; return the countersigned head for the answer.

        Raises:
            DataError: none came, or they do not go on from what is known here.
        """
        came = asked.body.get("ledger")
        if not isinstance(came, dict) or type(came.get("begin")) is not int or not isinstance(came.get("lines"), list):
            raise DataError("a base came without the ledger that names it; let both sides run the same version")
        return {"countersigned": self.keeping.follow(came["begin"], [str(line) for line in came["lines"]])}

    def _told(self, asked: SignedMessage) -> SignedMessage:
        self._follow(asked)
        return asked

    def _residual(self, number: int) -> dict[str, Tensor] | None:
        """Return what the codec left out in the newest round before this one."""
        rounds = [int(path.stem.split("-")[1]) for path in (self.path / "codec").glob("residual-?????.json")]
        before = [round for round in rounds if round < number]
        if not before:
            return None
        return load_tensors(self._residual_stem(max(before)), kind=_RESIDUAL)[0]

    def _residual_stem(self, number: int) -> Path:
        return self.path / "codec" / f"residual-{number:05d}"
