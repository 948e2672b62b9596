"""The constitution: the rules of a consortium, in one YAML file that every member signs."""

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from worldloom.core.chain import canonical
from worldloom.core.config import Config
from worldloom.core.errors import ConfigError, DataError
from worldloom.core.files import read_document, storage_errors, write_document
from worldloom.core.names import PathName
from worldloom.core.signing import Domain, SigningKey, verified
from worldloom.core.yaml_config import parse_yaml
from worldloom.federation.rules.ranges import Count, Magnitude, Number, Seconds
from worldloom.federation.secure.privacy import PrivacyConfig

Name = Annotated[PathName, StringConstraints(pattern=r"\A[a-z0-9][a-z0-9_-]{0,63}\z")]
Key = Annotated[str, StringConstraints(pattern=r"\A[0-9a-f]{64}\z")]

_KIND = "worldloom constitution signature"
_LARGEST = 2**20  # bytes
_MOST_MEMBERS = 150  # an entry of the ledger has room for the digests and figures of so many
_OF_SUMS = ("mean",)  # aggregations that need only the sum; a clipped mean needs the norm of each contribution
_MASKABLE = ("float32",)  # codecs with a single part; masks are added to integers, not to a codec's parts
_REMAINING = (
    "the coordinator can still check signatures, round, base, data class, message shape and the held-out loss of the "
    "new base, but not the size, direction or quality of one contribution"
)


class Member(Config):
    """A member of a consortium.

    `key` is the public key that verifies the member's signatures. `connection` is the public key with which its node
    connects, in OpenSSH's format, or empty in a simulation. `worldloom weave keys` writes NAME.ssh.pub with this key.
    """

    key: Key
    connection: str = ""


class ExternalCoordinator(Config):
    """A coordinator that is not a member."""

    name: Name
    key: Key


class Quality(Config):
    """The quality gate: the largest relative growth of held-out losses from a base to the next (median of members)."""

    max_worse: float = Field(default=0.1, ge=0, le=1e30)


class Release(Config):
    """Conditions for the release of a base; by default there are none.

    At least `rounds` rounds must be complete, at least `contributors` members must have contributed, and at least
    `countersigned` members must have countersigned a ledger with this base. The median of the members' held-out losses
    must be at most `max_loss`.
    """

    rounds: Number = 0
    contributors: Number = 0
    max_loss: Magnitude | None = None
    countersigned: Number = 0


class Constitution(Config):
    """The rules of a consortium.

    Before its first round a member trains its sovereign tensors for `align_steps`, with the shared tensors frozen.
    `coordinators` are in order of succession: each is the name of a member, or a name and a key. A round needs
    contributions of at least `quorum` members, and no member's weight in it exceeds `cap`. `aggregation`, `outer`
    and `codec` each name a component and set its options; `partition` contains patterns of tensors' names. Under
    `secure_aggregation` the coordinator receives only sums of at least `threshold` contributions, never a single one.
    `constitution` is the version of the format.
    """

    constitution: Literal[1] = 1
    consortium: str = Field(min_length=1)
    members: dict[Name, Member] = Field(min_length=1, max_length=_MOST_MEMBERS)
    coordinators: tuple[Name | ExternalCoordinator, ...] = Field(min_length=1)
    rounds: Annotated[Number, Field(gt=0)]
    inner_steps: Annotated[Count, Field(gt=0)]
    align_steps: Count = 0
    quorum: int = Field(gt=0)
    timeout_seconds: Seconds = 600.0
    cap: float = Field(gt=0, le=1)
    weighting: Literal["equal", "frames", "sqrt-frames"] = "equal"
    aggregation: dict[str, Any] = Field(default_factory=lambda: {"name": "clipped-mean"})
    outer: dict[str, Any] = Field(default_factory=lambda: {"name": "diloco"})
    codec: dict[str, Any] = Field(default_factory=lambda: {"name": "float32"})
    partition: dict[str, Any] = Field(default_factory=dict)
    privacy: PrivacyConfig | None = None
    secure_aggregation: bool = False
    quality: Quality = Quality()
    classes: tuple[Literal["open", "unique-open", "controlled"], ...] = Field(
        default=("open", "unique-open"), min_length=1
    )
    largest_megabytes: float = Field(default=1024.0, gt=0, le=1e6)
    release: Release = Release()

    @model_validator(mode="after")
    def _consistent(self) -> "Constitution":
        count = len(self.members)
        if self.quorum > count:
            raise ConfigError(f"quorum: {self.quorum} is above the {count} members; lower it to at most {count}")
        for what, number in (("all", count), ("a quorum of", self.quorum)):
            if number * self.cap < 1 - 1e-9:  # the weights of a round sum to one
                raise ConfigError(
                    f"cap: the weights of {what} {number} members, at most {self.cap} each, cannot sum to 1. Raise the "
                    f"cap to at least {1 / number:.6g}"
                )
        for what, number in (
            ("contributors", self.release.contributors),
            ("countersigned", self.release.countersigned),
        ):
            if number > count:
                raise ConfigError(f"release.{what}: {number} is above the {count} members; lower it to at most {count}")
        for part in ("aggregation", "outer", "codec"):
            if not isinstance(getattr(self, part).get("name"), str):
                raise ConfigError(f"{part}: expected a mapping with a 'name'; got {getattr(self, part)!r}")
        if self.secure_aggregation:
            self._can_be_summed()
        private = self.privacy is not None and self.privacy.noise > 0 and self.privacy.epsilon_budget is not None
        if "controlled" in self.classes and not private:
            raise ConfigError(
                "classes: controlled data may train the base only under differential privacy; set privacy with noise "
                "and an epsilon_budget, or remove 'controlled'"
            )
        names = [one if isinstance(one, str) else one.name for one in self.coordinators]
        for one in self.coordinators:
            if isinstance(one, str) and one not in self.members:
                raise ConfigError(f"coordinators: {one!r} is not a member; write its name and key, or name a member")
            if isinstance(one, ExternalCoordinator) and one.name in self.members:
                raise ConfigError(f"coordinators: {one.name!r} is a member; write only its name")
        keys = [member.key for member in self.members.values()]
        keys += [one.key for one in self.coordinators if isinstance(one, ExternalCoordinator)]
        if len(set(keys)) < len(keys) or len(set(names)) < len(names):
            raise ConfigError(
                "members, coordinators: a key or a name appears twice; give each party its own key and name"
            )
        return self

    def _can_be_summed(self) -> None:
        name, codec = str(self.aggregation["name"]), str(self.codec["name"])
        if name not in _OF_SUMS:
            raise ConfigError(
                f"aggregation: {name!r} needs single contributions, which secure_aggregation hides; {_REMAINING}. "
                f"Choose mean, or set secure_aggregation to false"
            )
        if codec not in _MASKABLE:
            raise ConfigError(
                f"codec: the output of {codec!r} cannot be summed under masks; secure_aggregation has its own integer "
                f"encoding. Choose float32, or set secure_aggregation to false"
            )
        if len(self.members) < 3:
            raise ConfigError(
                f"secure_aggregation: with {len(self.members)} members, one could subtract its own contribution from "
                f"the sum and learn the other's. Add members (at least 3), or set secure_aggregation to false"
            )
        inside = [one for one in self.coordinators if isinstance(one, str)]
        if inside and self.threshold < 3:
            raise ConfigError(
                f"secure_aggregation: the coordinator {inside[0]!r} is a member, and could subtract its own "
                f"contribution from a sum of only {self.threshold}; raise the quorum to 3, or choose a coordinator "
                f"that is not a member"
            )

    @property
    def threshold(self) -> int:
        """The number of members that must complete a secure sum: at least the quorum, and over half of all members."""
        return max(self.quorum, len(self.members) // 2 + 1)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the rules, independent of the layout of their file."""
        return hashlib.sha256(canonical(self.model_dump(mode="json")).encode("ascii")).hexdigest()

    @property
    def largest_bytes(self) -> int:
        """The largest size of a message, in bytes."""
        return int(self.largest_megabytes * 1_000_000)

    def member_keys(self) -> dict[str, str]:
        """Return a mapping from members' names to their public keys."""
        return {name: member.key for name, member in self.members.items()}

    def member_names(self) -> dict[str, str]:
        """Return a mapping from public keys to members' names."""
        return {member.key: name for name, member in self.members.items()}

    def coordinator_keys(self) -> dict[str, str]:
        """Return a mapping from coordinators' names to their public keys, in order of succession."""
        return {
            name: self.members[name].key if key is None else key
            for name, key in ((one, None) if isinstance(one, str) else (one.name, one.key) for one in self.coordinators)
        }

    def known(self) -> dict[str, str]:
        """Return a mapping from the public keys of members and coordinators to their names."""
        return {key: name for name, key in {**self.member_keys(), **self.coordinator_keys()}.items()}


def ratify(path: Path | str, member: str, key: SigningKey) -> Path:
    """Sign the current text of a constitution as one of its members; return the path of the signature.

    Raises:
        ConfigError: the file is not a constitution.
        DataError: `member` is not a member, or `key` is not the member's key.
    """
    content = _read(path)
    constitution = parse_yaml(content, Constitution, source=str(path))
    if member not in constitution.members:
        raise DataError(f"{member!r} is not a member in {path}; expected one of {', '.join(constitution.members)}")
    if constitution.members[member].key != key.public:
        raise DataError(
            f"{key.public} is not the key of {member} in {path}; sign with the key that the file lists for {member}"
        )
    where = ratification_path(path, member)
    signature = key.sign(content, Domain.CONSTITUTION)
    write_document(where, _KIND, {"member": member, "key": key.public, "signature": signature})
    return where


def ratification_path(path: Path | str, member: str) -> Path:
    """Return the path of a member's signature of a constitution."""
    return Path(path).with_name(f"{Path(path).name}.{member}.sig")


def read_constitution(path: Path | str, *, require: Collection[str] | None = None) -> Constitution:
    """Read a constitution and check that all its members, or those in `require`, have signed it.

    Raises:
        ConfigError: the file is not a constitution, or contradicts itself.
        StorageError: a signature file is damaged, or has a different kind or version.
        DataError: a signature is missing, is for a different text, or is not from a member.
    """
    content = _read(path)
    constitution = parse_yaml(content, Constitution, source=str(path))
    required = set(constitution.members if require is None else require)
    before, after = f"{Path(path).name}.", ".sig"
    with storage_errors(path):
        signers = {
            file.name[len(before) : -len(after)]
            for file in Path(path).parent.iterdir()
            if file.name.startswith(before) and file.name.endswith(after)
        }
    if strangers := sorted(signers - set(constitution.members)):
        raise DataError(f"{path} is signed by non-members {', '.join(strangers)}; remove their signatures")
    if missing := sorted(required - signers):
        raise DataError(f"{path} is not signed by {', '.join(missing)}; they must sign it before a round can run")
    for member in sorted(signers):
        where = ratification_path(path, member)
        values = read_document(where, _KIND)
        key = constitution.members[member].key
        if (values.get("member"), values.get("key")) != (member, key):
            raise DataError(f"{where} is for a different member or key; {member} must sign again")
        if not verified(content, str(values.get("signature")), key, Domain.CONSTITUTION):
            raise DataError(
                f"{path} was changed after {member} signed it. Restore it, or ask all members to sign again"
            )
    return constitution


def _read(path: Path | str) -> bytes:
    with storage_errors(path), Path(path).open("rb") as file:
        return file.read(_LARGEST + 1)  # one byte more than allowed, so that a larger file is refused
