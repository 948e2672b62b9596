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
from worldloom.core.signing import SigningKey, verified
from worldloom.core.yaml_config import parse_yaml
from worldloom.federation.secure.privacy import PrivacyConfig

Name = Annotated[str, StringConstraints(pattern=r"\A[a-z0-9][a-z0-9_-]{0,63}\z")]  # used in file names
Key = Annotated[str, StringConstraints(pattern=r"\A[0-9a-f]{64}\z")]

_KIND = "worldloom constitution signature"
_SIGNED_AS = b"worldloom constitution\n"  # so that the signature is valid for nothing else
_LARGEST = 2**20  # bytes
_OF_SUMS = ("mean",)  # aggregations that need sums only; a clipped mean needs the norm of each contribution
_MASKABLE = ("float32",)  # lossless codecs; masks are added to integers, not to a codec's parts
_REMAINING = (
    "secure aggregation still allows checks of signatures, round, base, data class and message shape, and of the "
    "held-out loss of the new base; not of the size, direction or quality of one contribution"
)


class Member(Config):
    """A member and its public key; `connection` is the public key of its node's connections, if it has any.

    `connection` has OpenSSH's format: `worldloom weave keys` writes it to NAME.ssh.pub.
    """

    key: Key
    connection: str = ""


class ExternalCoordinator(Config):
    """A coordinator that is not a member."""

    name: Name
    key: Key


class Quality(Config):
    """The quality gate: the largest relative growth of the held-out loss that a contribution may cause."""

    max_worse: float = Field(default=0.1, ge=0)


class Release(Config):
    """Gates before a base leaves the consortium; by default none.

    Minima of the rounds behind it, the members that contributed, and the members that countersigned a ledger that names
    it; and the maximum of its held-out loss at the median member.
    """

    rounds: int = Field(default=0, ge=0)
    contributors: int = Field(default=0, ge=0)
    max_loss: float | None = None
    countersigned: int = Field(default=0, ge=0)


class Constitution(Config):
    """The rules of a consortium.

    Before its first round a member trains its sovereign tensors for `align_steps`, with the shared ones frozen.
    `coordinators` are in order of succession: each is the name of a member, or a name and a key. `aggregation`,
    `outer`, `codec` and `partition` are parsed by the component that they name. Under `secure_aggregation` the
    coordinator sees sums of `threshold` contributions or more, and never a single one. `constitution` is the version of
    the format.
    """

    constitution: Literal[1] = 1
    consortium: str = Field(min_length=1)
    members: dict[Name, Member] = Field(min_length=1)
    coordinators: tuple[Name | ExternalCoordinator, ...] = Field(min_length=1)
    rounds: int = Field(gt=0)
    inner_steps: int = Field(gt=0)
    align_steps: int = Field(default=0, ge=0)
    quorum: int = Field(gt=0)
    timeout_seconds: float = Field(default=600.0, gt=0)
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
            raise ConfigError(f"quorum: {self.quorum} of {count} members; expected at most {count}. Lower the quorum")
        for what, number in (("members", count), ("members of a quorum", self.quorum)):
            if number * self.cap < 1 - 1e-9:  # the weights of a round sum to one
                raise ConfigError(
                    f"cap: {number} {what} with a weight of at most {self.cap} each cannot sum to 1; expected a cap of "
                    f"at least {1 / number:.6g}. Raise the cap or the quorum"
                )
        for what, number in (
            ("contributors", self.release.contributors),
            ("countersigned", self.release.countersigned),
        ):
            if number > count:
                raise ConfigError(f"release.{what}: {number} of {count} members; expected at most {count}. Lower it")
        for part in ("aggregation", "outer", "codec"):
            if not isinstance(getattr(self, part).get("name"), str):
                raise ConfigError(f"{part}: expected a mapping with a 'name'; got {getattr(self, part)!r}")
        if self.secure_aggregation:
            self._can_be_summed()
        private = self.privacy is not None and self.privacy.noise > 0 and self.privacy.epsilon_budget is not None
        if "controlled" in self.classes and not private:
            raise ConfigError(
                "classes: controlled data may shape the base only under privacy; set privacy with noise and an "
                "epsilon_budget, or remove controlled data"
            )
        names = [one if isinstance(one, str) else one.name for one in self.coordinators]
        for one in self.coordinators:
            if isinstance(one, str) and one not in self.members:
                raise ConfigError(f"coordinators: {one!r} is not a member; write its name and key, or name a member")
            if isinstance(one, ExternalCoordinator) and one.name in self.members:
                raise ConfigError(f"coordinators: {one.name!r} is a member; write the name alone")
        keys = [member.key for member in self.members.values()]
        keys += [one.key for one in self.coordinators if isinstance(one, ExternalCoordinator)]
        if len(set(keys)) < len(keys) or len(set(names)) < len(names):
            raise ConfigError("members, coordinators: a key or a name appears twice; each needs its own")
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
                f"codec: the numbers of {codec!r} cannot be summed under masks; secure_aggregation has its own integer "
                f"encoding. Choose float32, or set secure_aggregation to false"
            )
        if len(self.members) < 3:
            raise ConfigError(
                f"secure_aggregation: in a sum of {len(self.members)} a member can subtract its own part and learn "
                f"the other's; expected 3 members or more"
            )
        inside = [one for one in self.coordinators if isinstance(one, str)]
        if inside and self.threshold < 3:
            raise ConfigError(
                f"secure_aggregation: the coordinator {inside[0]!r} is a member, and could subtract its own part "
                f"from a sum of {self.threshold}; raise the quorum to 3, or choose a coordinator that is not a member"
            )

    @property
    def threshold(self) -> int:
        """The members that must stay to the end of a secure sum: at least the quorum, and over half of all."""
        return max(self.quorum, len(self.members) // 2 + 1)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the rules, independent of the layout of their file."""
        return hashlib.sha256(canonical(self.model_dump(mode="json")).encode("ascii")).hexdigest()

    @property
    def largest_bytes(self) -> int:
        """The largest size of a message."""
        return int(self.largest_megabytes * 1_000_000)

    def member_keys(self) -> dict[str, str]:
        """Return the public key of each member."""
        return {name: member.key for name, member in self.members.items()}

    def member_names(self) -> dict[str, str]:
        """Return the name of the member behind each public key."""
        return {member.key: name for name, member in self.members.items()}

    def coordinator_keys(self) -> dict[str, str]:
        """Return the public key of each coordinator, in order of succession."""
        return {
            name: self.members[name].key if key is None else key
            for name, key in ((one, None) if isinstance(one, str) else (one.name, one.key) for one in self.coordinators)
        }

    def known(self) -> dict[str, str]:
        """Return the name behind each public key, of members and coordinators."""
        return {key: name for name, key in {**self.member_keys(), **self.coordinator_keys()}.items()}


def ratify(path: Path | str, member: str, key: SigningKey) -> Path:
    """Sign a constitution in its present text, as one of its members; return the path of the signature.

    Raises:
        ConfigError: the file is not a constitution.
        DataError: there is no such member, or the key is not the member's.
    """
    content = _read(path)
    constitution = parse_yaml(content, Constitution, source=str(path))
    if member not in constitution.members:
        raise DataError(f"{member!r} is not a member in {path}; expected one of {', '.join(constitution.members)}")
    if constitution.members[member].key != key.public:
        raise DataError(f"{path} names another key for {member} than {key.public}; sign with the key that it names")
    where = ratification_path(path, member)
    write_document(where, _KIND, {"member": member, "key": key.public, "signature": key.sign(_SIGNED_AS + content)})
    return where


def ratification_path(path: Path | str, member: str) -> Path:
    """Return the path of a member's signature of a constitution."""
    return Path(path).with_name(f"{Path(path).name}.{member}.sig")


def read_constitution(path: Path | str, *, require: Collection[str] | None = None) -> Constitution:
    """Read a constitution that all its members signed, or those in `require`.

    Raises:
        ConfigError: the file is not a constitution, or contradicts itself.
        StorageError: a signature is damaged, or of another kind or version.
        DataError: a signature is missing, of another text, or of a signer that is not a member; the signer is named.
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
        raise DataError(f"{path} is signed by {', '.join(strangers)}, which it does not name; remove the signatures")
    if missing := sorted(required - signers):
        raise DataError(f"{path} is not signed by {', '.join(missing)}; no round runs before they sign it")
    for member in sorted(signers):
        where = ratification_path(path, member)
        values = read_document(where, _KIND)
        key = constitution.members[member].key
        if (values.get("member"), values.get("key")) != (member, key):
            raise DataError(f"{where} is of another member or key; let {member} sign again")
        if not verified(_SIGNED_AS + content, str(values.get("signature")), key):
            raise DataError(f"{path} was changed after {member} signed it. Restore it, or let all members sign again")
    return constitution


def _read(path: Path | str) -> bytes:
    with storage_errors(path), Path(path).open("rb") as file:
        return file.read(_LARGEST + 1)  # one byte more than allowed, so that a larger file is refused
