"""Rule sets: guardrails, objectives and a fallback as data, in layers. A layer may only tighten the layers above it."""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field

from worldloom.core.chain import canonical
from worldloom.core.config import Config
from worldloom.core.errors import CheckpointError, ConfigError, DataError
from worldloom.core.files import read_bytes
from worldloom.core.signing import Domain, SignedFile, read_signed, sign_file
from worldloom.core.text import comparable
from worldloom.core.yaml_config import parse_yaml, read_yaml
from worldloom.guardrails.fallback import Fallback, FallbackField
from worldloom.guardrails.objective_configs import ObjectiveConfig, ObjectiveField
from worldloom.guardrails.rails import Rail, RailField
from worldloom.guardrails.rule_versions import SignedLayer, check_versions
from worldloom.models import stored_digest

LAYERS = ("operator", "site", "community")
_LARGEST = 2**28  # bytes of a picture


class RuleLayer(Config):
    """One layer of a rule set: the rules of one `owner`.

    `guardrails` are hard limits; `objectives` are weighted costs. `risk` is the accepted fraction of episodes in which
    a guardrail is broken; margins are calibrated to keep this risk. `fallback` is how the agent acts when no plan
    satisfies the guardrails.

    `version` grows with each change that the owner signs, so that an older file is refused once a newer one was used;
    0 means that the layer has no version. If one owner signs several layers, `name` distinguishes them, so that each
    has its own versions. `rules` is the version of the format.
    """

    rules: Literal[1] = 1
    layer: Literal["operator", "site", "community"] = "operator"
    owner: str = Field(min_length=1)
    name: str = ""
    version: int = Field(default=0, ge=0, lt=2**53)
    risk: float | None = Field(default=None, gt=0, lt=1)
    guardrails: dict[str, RailField] = Field(default_factory=dict)
    objectives: dict[str, ObjectiveField] = Field(default_factory=dict)
    fallback: FallbackField | None = None

    @property
    def files(self) -> list[str]:
        """Other files whose content is part of the layer, such as pictures."""
        rails = [file for rail in self.guardrails.values() for file in rail.files]
        return rails + [file for objective in self.objectives.values() for file in objective.files]

    @property
    def peers(self) -> list[str]:
        """The folders of other runs whose models are part of the layer."""
        parts: list[Rail | ObjectiveConfig] = [*self.guardrails.values(), *self.objectives.values()]
        return [run for part in parts for run in part.peers]


@dataclass(frozen=True, kw_only=True)
class StatedRule:
    """A guardrail with its title, owner and layer."""

    title: str
    rail: RailField
    owner: str
    layer: str


@dataclass(frozen=True, kw_only=True)
class RuleSet:
    """The layers of a rule set, the uppermost first; each may only tighten the layers above it.

    `parts` are the signed digests of the pictures and runs that the layers name; see `part_digests`.

    Raises:
        ConfigError: the layers are out of order, one loosens a layer above it, two titles look the same but differ, or
            a guardrail forbids the action that a fallback declares; the message names the layers and the rule.
    """

    layers: tuple[RuleLayer, ...]
    parts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ConfigError("a rule set needs at least one layer; got none. Pass the path of a rule file")
        order = [LAYERS.index(layer.layer) for layer in self.layers]
        if order != sorted(set(order)):
            raise ConfigError(
                f"expected the layers of a rule set in the order {', '.join(LAYERS)}, each at most once; got "
                f"{', '.join(layer.layer for layer in self.layers)}. Pass the files in "
                f"the expected order, and set 'layer' in each file (default: operator)"
            )
        _check_titles(self.layers)
        for place, lower in enumerate(self.layers):
            for upper in self.layers[:place]:
                _check_tightens(lower, upper)
        _check_fallback(self.layers)

    @property
    def risk(self) -> float | None:
        """The accepted fraction of episodes in which a guardrail is broken: the smallest value of any layer."""
        return min((layer.risk for layer in self.layers if layer.risk is not None), default=None)

    @property
    def fallback(self) -> Fallback | None:
        """The fallback of the uppermost layer that has one."""
        return next((layer.fallback for layer in self.layers if layer.fallback is not None), None)

    @property
    def fingerprint(self) -> str:
        """A digest of the layers, which does not depend on their names and versions."""
        text = canonical([layer.model_dump(mode="json", exclude={"name", "version"}) for layer in self.layers])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def stated(self) -> list[StatedRule]:
        """Return the tightest version of each guardrail, from the lowest layer that contains it."""
        found = {
            title: StatedRule(title=title, rail=rail, owner=layer.owner, layer=layer.layer)
            for layer in self.layers
            for title, rail in layer.guardrails.items()
        }
        return list(found.values())

    @property
    def titles(self) -> list[str]:
        """The names of the guardrails, in order."""
        return [rule.title for rule in self.stated()]


def _check_tightens(lower: RuleLayer, upper: RuleLayer) -> None:
    """Raise an error if a layer loosens one above it."""

    def loosens(what: str, mine: object, theirs: object) -> ConfigError:
        return ConfigError(
            f"the {lower.layer} layer of {lower.owner!r} loosens {what}: it has {mine}, but the {upper.layer} layer of "
            f"{upper.owner!r} has {theirs}. A lower layer may only tighten the layers above it: change or remove the "
            f"entry in the {lower.layer} layer"
        )

    for title, theirs in upper.guardrails.items():
        mine = lower.guardrails.get(title)
        if mine is not None and not mine.tightens(theirs):
            raise loosens(f"the guardrail {title!r}", mine.model_dump(mode="json"), theirs.model_dump(mode="json"))
    if lower.risk is not None and upper.risk is not None and lower.risk > upper.risk:
        raise loosens("the risk", lower.risk, upper.risk)
    if lower.fallback is not None and upper.fallback is not None and lower.fallback != upper.fallback:
        raise loosens("the fallback", lower.fallback.name, upper.fallback.name)
    if again := sorted(lower.objectives.keys() & upper.objectives.keys()):
        raise loosens(f"the objective {again[0]!r}", "a definition of its own", "one already")


def _check_titles(layers: Sequence[RuleLayer]) -> None:
    """Raise an error if a person could take the title of one rule for that of another one."""
    known: dict[str, tuple[str, str]] = {}
    for layer in layers:
        for title in (*layer.guardrails, *layer.objectives):
            first, where = known.setdefault(comparable(title), (title, layer.layer))
            if first != title:
                raise ConfigError(
                    f"the title {title!a} in the {layer.layer} layer of {layer.owner!r} looks like the title {first!a} "
                    f"in the {where} layer, but differs from it. Use the same title for the same rule, and titles that "
                    f"people can tell apart for different rules"
                )


def keys_for(layer: str, trusted: Collection[str]) -> set[str]:
    """Return the trusted keys that may sign a layer; `trusted` contains them as `KEY` or `LAYER:KEY`."""
    return {key.rpartition(":")[2].lower() for key in trusted if key.rpartition(":")[0] in ("", layer)}


def _check_fallback(layers: Sequence[RuleLayer]) -> None:
    """Raise an error if a guardrail of any layer forbids the action that a fallback declares."""
    for layer in layers:
        action = None if layer.fallback is None else layer.fallback.declared
        if action is None:
            continue
        for other in layers:
            for title, rail in other.guardrails.items():
                if rail.forbids(action):
                    raise ConfigError(
                        f"the fallback of the {layer.layer} layer of {layer.owner!r} takes the action {list(action)}, "
                        f"but the guardrail {title!r} of the {other.layer} layer of {other.owner!r} forbids it. "
                        f"Declare an action that the guardrail allows"
                    )


def read_rules(paths: Sequence[Path | str], *, trusted: Collection[str] | None, revert: bool = False) -> RuleSet:
    """Read the layers of a rule set from files, uppermost first; a key in `trusted` must have signed each file.

    A plain `KEY` may sign any layer; `LAYER:KEY` may sign only that layer (operator, site or community). A community's
    key then cannot sign the operator's layer. The pictures and runs that a layer names must have the digests in its
    signature, because they are part of the rule; agents use them only while they have these digests. With
    `trusted=None` signatures are not checked; use this for experiments only.

    The newest version of each signed layer is remembered for the user (`state_folder`). An older layer is refused,
    unless `revert` is set: then the versions of these files count as the newest from now on.

    Raises:
        StorageError: a file, or its signature, is missing.
        DataError: a signature is wrong, its key is not trusted, a picture or a run was changed, or a newer version of a
            layer was used before.
        CheckpointError: a run that a layer names has no model, or its model is damaged.
        ConfigError: a line is invalid (the message names it), or the layers contradict each other.
    """
    if trusted is None:
        return RuleSet(layers=tuple(read_yaml(path, RuleLayer) for path in paths))
    layers, files = [], []
    for path in paths:
        file = read_signed(path, {key.rpartition(":")[2] for key in trusted}, Domain.RULE_LAYER)
        layer = parse_yaml(file.content, RuleLayer, source=str(path))
        if file.key not in keys_for(layer.layer, trusted):
            raise DataError(
                f"{path} is a layer of the {layer.layer}, but the key that signed the file, {file.key}, is trusted "
                f"only for another layer. Have the {layer.layer} sign the file"
            )
        layers.append(layer)
        files.append(file)
    parts = part_digests(layers)
    signed = []
    for path, layer, file in zip(paths, layers, files, strict=True):
        used = [parts[name] for name in _checked_parts(path, layer, file, parts)]
        series = (file.key, layer.layer, layer.owner, layer.name)
        signed.append(SignedLayer.of(path, file.content, used, series=series, version=layer.version))
    rules = RuleSet(layers=tuple(layers), parts=parts)
    check_versions(signed, revert=revert)
    return rules


def sign_rules(path: Path | str, key: Path | str) -> Path:
    """Sign a rule layer with the digests of the pictures and runs that it names; return the path of the signature.

    Raises:
        StorageError: a file cannot be read or written, or a picture is missing.
        ConfigError: the layer is invalid.
        DataError: the key is not an Ed25519 key, or the file has a signature of another domain.
        CheckpointError: a run has no model, or its model is damaged.
    """
    layer = read_yaml(path, RuleLayer)  # an invalid layer is not signed
    return sign_file(path, key, Domain.RULE_LAYER, part_digests([layer]))


def part_digests(layers: Iterable[RuleLayer]) -> dict[str, str]:
    """Return a digest of each picture (`file PATH`) and of the model of each run (`run PATH`) that layers name.

    Raises:
        StorageError: a picture is missing.
        CheckpointError: a run has no model, or its model is damaged.
    """
    found: dict[str, str] = {}
    for layer in layers:
        for file in layer.files:
            found[f"file {file}"] = hashlib.sha256(read_bytes(Path(file), _LARGEST)).hexdigest()
        for run in layer.peers:
            digest = stored_digest(Path(run) / "model" / "model")
            if digest is None:
                raise CheckpointError(f"a rule names the run {run}, which has no model. Check the path")
            found[f"run {run}"] = digest
    return found


def _checked_parts(path: Path | str, layer: RuleLayer, file: SignedFile, parts: Mapping[str, str]) -> list[str]:
    """Return the names of a layer's parts; raise an error unless the signature contains the digest of each."""
    names = [*(f"file {name}" for name in layer.files), *(f"run {name}" for name in layer.peers)]
    for name in names:
        if name not in file.parts:
            raise DataError(
                f"{path} uses the {name}, but its signature contains no digest of it, because an older version of "
                f"worldloom signed {path}. Ask the owner to sign {path} again"
            )
        if file.parts[name] != parts[name]:
            raise DataError(
                f"the {name} is not the one that the owner of {path} signed: it was changed or replaced. Restore it "
                f"from a copy, or ask the owner to sign {path} again"
            )
    return names
