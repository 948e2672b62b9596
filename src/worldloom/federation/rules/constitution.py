"""The rules of a consortium: one YAML that every member signs, and against which no round runs."""

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from worldloom.core.chain import canonical
from worldloom.core.config import Config
from worldloom.core.errors import ConfigError, DataError
from worldloom.core.files import read_json, storage_errors, write_json
from worldloom.core.signing import SigningKey, verified
from worldloom.core.yaml_config import parse_yaml
from worldloom.federation.secure.privacy import PrivacyConfig

Name = Annotated[str, StringConstraints(pattern=r"\A[a-z0-9][a-z0-9_-]{0,63}\z")]  # it becomes a part of file names
Key = Annotated[str, StringConstraints(pattern=r"\A[0-9a-f]{64}\z")]

_KIND = "worldloom constitution signature"
_SIGNED_AS = b"worldloom constitution\n"  # a signature of a constitution is one of nothing else
_LARGEST = 2**20  # bytes
_OF_SUMS = ("mean",)  # aggregations that need no single contribution; a clipped mean needs the norm of each
_MASKABLE = ("float32",)  # codecs that leave a delta as it is; masks are added to whole numbers, not to a codec's parts
_REMAINING = (
    "what remains under it: signatures, round, base, data class and the shape of a message, and the held-out loss of "
    "the new base; not the size, direction or quality of one contribution"
)


class Member(Config):
    """An owner that takes part, known by its public key; `connection` is the one that its node connects by, if any.

    That one is in OpenSSH's format: what `worldloom weave keys` writes to NAME.ssh.pub.
    """

    key: Key
    connection: str = ""


class OutsideCoordinator(Config):
    """A coordinator that is no member."""

    name: Name
    key: Key


class Quality(Config):
    """A gate: by how much of its value the held-out loss may grow through a contribution."""

    max_worse: float = Field(default=0.1, ge=0)


class Release(Config):
    """Gates before a base leaves the consortium; by default none.

    It is of so many rounds, so many members have a part in it, its held-out loss (of the member in the middle) is at
    most so high, and so many members countersigned a ledger that names it.
    """

    rounds: int = Field(default=0, ge=0)
    contributors: int = Field(default=0, ge=0)
    max_loss: float | None = None
    countersigned: int = Field(default=0, ge=0)


class Constitution(Config):
    """The rules of a consortium.

    Before its first round a member trains what is sovereign for `align_steps`, and what is shared stays as it came.
    `coordinators` are in order of succession: the name of a member, or a name and a key. `aggregation`, `outer`,
    `codec` and `partition` are parsed by the component that they name. Under `secure_aggregation` the coordinator sees
    sums of `threshold` contributions or more, and no single one.
    """

    consortium: str = Field(min_length=1)
    members: dict[Name, Member] = Field(min_length=1)
    coordinators: tuple[Name | OutsideCoordinator, ...] = Field(min_length=1)
    rounds: int = Field(gt=0)
    inner_steps: int = Field(gt=0)
    align_steps: int = Field(default=0, ge=0)
    quorum: int = Field(gt=0)
    patience_seconds: float = Field(default=600.0, gt=0)
    cap: float = Field(gt=0, le=1)
    weighting: Literal["equal", "frames", "sqrt-frames"] = "equal"
    aggregation: dict[str, Any] = Field(default_factory=lambda: {"name": "clipped-mean"})
    outer: dict[str, Any] = Field(default_factory=lambda: {"name": "diloco"})
    codec: dict[str, Any] = Field(default_factory=lambda: {"name": "float32"})
    partition: dict[str, Any] = Field(default_factory=dict)
    privacy: PrivacyConfig | None = None
    secure_aggregation: bool = False
    quality: Quality = Quality()
    classes: tuple[Literal["open", "unique-open", "controlled"], ...] = ("open", "unique-open")
    largest_megabytes: float = Field(default=1024.0, gt=0)
    release: Release = Release()

    @model_validator(mode="after")
    def _consistent(self) -> "Constitution":
        count = len(self.members)
        if self.quorum > count:
            raise ConfigError(f"quorum: {self.quorum} of {count} members; expected at most all. Lower the quorum")
        for what, number in (("members", count), ("members of a quorum", self.quorum)):
            if number * self.cap < 1 - 1e-9:  # the weights of a round sum to one
                raise ConfigError(
                    f"cap: {number} {what} with at most {self.cap} each have less than the whole; expected a cap of "
                    f"at least {1 / number:.6g}. Raise the cap or the quorum"
                )
        for what, number in (
            ("contributors", self.release.contributors),
            ("countersigned", self.release.countersigned),
        ):
            if number > count:
                raise ConfigError(f"release.{what}: {number} of {count} members; expected at most all. Ask for fewer")
        for part in ("aggregation", "outer", "codec"):
            if not isinstance(getattr(self, part).get("name"), str):
                raise ConfigError(f"{part}: expected a mapping with a 'name'; got {getattr(self, part)!r}")
        if self.secure_aggregation:
            self._can_be_summed()
        private = self.privacy is not None and self.privacy.noise > 0 and self.privacy.epsilon_budget is not None
        if "controlled" in self.classes and not private:
            raise ConfigError(
                "classes: controlled data shapes the base only under privacy; state privacy with noise and an "
                "epsilon_budget, or leave controlled data out"
            )
        seats = [seat if isinstance(seat, str) else seat.name for seat in self.coordinators]
        for seat in self.coordinators:
            if isinstance(seat, str) and seat not in self.members:
                raise ConfigError(f"coordinators: {seat!r} is no member; write its name and key, or name a member")
            if isinstance(seat, OutsideCoordinator) and seat.name in self.members:
                raise ConfigError(f"coordinators: {seat.name!r} is a member; write the name alone")
        keys = [member.key for member in self.members.values()]
        keys += [seat.key for seat in self.coordinators if isinstance(seat, OutsideCoordinator)]
        if len(set(keys)) < len(keys) or len(set(seats)) < len(seats):
            raise ConfigError("members, coordinators: a key or a seat stands twice; give each its own")
        return self

    def _can_be_summed(self) -> None:
        name, codec = str(self.aggregation["name"]), str(self.codec["name"])
        if name not in _OF_SUMS:
            raise ConfigError(
                f"aggregation: {name!r} must see single contributions, which secure_aggregation hides; {_REMAINING}. "
                f"Choose mean, or set secure_aggregation to false"
            )
        if codec not in _MASKABLE:
            raise ConfigError(
                f"codec: {codec!r} writes no numbers that can be added up under masks; secure_aggregation writes "
                f"whole numbers of its own. Choose float32, or set secure_aggregation to false"
            )
        if len(self.members) < 3:
            raise ConfigError(
                f"secure_aggregation: of a sum of {len(self.members)} each member can take off its own part and has "
                f"the other's; expected 3 members or more"
            )
        inside = [seat for seat in self.coordinators if isinstance(seat, str)]
        if inside and self.threshold < 3:
            raise ConfigError(
                f"secure_aggregation: the coordinator {inside[0]!r} is a member, and could take its own part off a sum "
                f"of {self.threshold}; raise the quorum to 3 or more, or let one coordinate who is no member"
            )

    @property
    def threshold(self) -> int:
        """How many members must last through a sum under secure aggregation: the quorum, and over half of all."""
        return max(self.quorum, len(self.members) // 2 + 1)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the rules, however their file is laid out."""
        return hashlib.sha256(canonical(self.model_dump(mode="json")).encode("ascii")).hexdigest()

    @property
    def largest_bytes(self) -> int:
        """The largest message."""
        return int(self.largest_megabytes * 1_000_000)

    def member_keys(self) -> dict[str, str]:
        """Return the public key of each member."""
        return {name: member.key for name, member in self.members.items()}

    def coordinator_keys(self) -> dict[str, str]:
        """Return the public key of each coordinator, in order of succession."""
        return dict(self._seat(seat) for seat in self.coordinators)

    def known(self) -> dict[str, str]:
        """Return the name behind each public key, of members and coordinators."""
        return {key: name for name, key in {**self.member_keys(), **self.coordinator_keys()}.items()}

    def _seat(self, seat: str | OutsideCoordinator) -> tuple[str, str]:
        return (seat, self.members[seat].key) if isinstance(seat, str) else (seat.name, seat.key)


def ratify(path: Path | str, member: str, key: SigningKey) -> Path:
    """Sign a constitution as it is now, as one of its members; return where the signature is kept.

    Raises:
        ConfigError: it is no constitution.
        DataError: there is no such member, or the key is another's.
    """
    content = _read(path)
    constitution = _parse(content, path)
    if member not in constitution.members:
        raise DataError(f"{member!r} is no member of {path}; expected one of {', '.join(constitution.members)}")
    if constitution.members[member].key != key.public:
        raise DataError(f"{path} knows {member} by another key than {key.public}; sign with the one that it names")
    where = ratification_path(path, member)
    values = {"kind": _KIND, "format": 1, "member": member, "key": key.public}
    write_json(where, {**values, "signature": key.sign(_SIGNED_AS + content)})
    return where


def ratification_path(path: Path | str, member: str) -> Path:
    """Return where a member's signature of a constitution is kept."""
    return Path(path).with_name(f"{Path(path).name}.{member}.sig")


def read_constitution(path: Path | str, *, require: Collection[str] | None = None) -> Constitution:
    """Read a constitution that its members signed: all of them, or those that `require` names.

    Raises:
        ConfigError: it is no constitution, or contradicts itself.
        DataError: a member has not signed, signed another text, or somebody signed who is no member; names who.
    """
    content = _read(path)
    constitution = _parse(content, path)
    required = set(constitution.members if require is None else require)
    before, after = f"{Path(path).name}.", ".sig"
    with storage_errors(path):
        signers = {
            file.name[len(before) : -len(after)]
            for file in Path(path).parent.iterdir()
            if file.name.startswith(before) and file.name.endswith(after)
        }
    if strangers := sorted(signers - set(constitution.members)):
        raise DataError(f"{path} is signed by {', '.join(strangers)}, no member of it; remove what they signed")
    if missing := sorted(required - signers):
        raise DataError(f"{path} is not signed by {', '.join(missing)}; no round runs before they sign it")
    for member in sorted(signers):
        where = ratification_path(path, member)
        values = read_json(where)
        if not isinstance(values, dict) or (values.get("kind"), values.get("format")) != (_KIND, 1):
            raise DataError(f"{where} is no signature of a constitution; let {member} sign again")
        key = constitution.members[member].key
        if (values.get("member"), values.get("key")) != (member, key):
            raise DataError(f"{where} is of another member or key; let {member} sign again")
        if not verified(_SIGNED_AS + content, str(values.get("signature")), key):
            raise DataError(f"{path} is not what {member} signed: it was changed. Restore it, or let all sign again")
    return constitution


def _read(path: Path | str) -> bytes:
    with storage_errors(path), Path(path).open("rb") as file:
        return file.read(_LARGEST + 1)  # one more than is read, so that a larger file is refused


def _parse(content: bytes, path: Path | str) -> Constitution:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no UTF-8 text ({error}); save it as UTF-8") from None
    if len(content) > _LARGEST:
        raise ConfigError(f"{path} is larger than {_LARGEST} bytes; expected what a person writes")
    return parse_yaml(text, Constitution, source=str(path))
