"""Rule sets: guardrails, objectives and a fallback as data, in layers. A layer may only tighten the layers above it."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from worldloom.core.chain import canonical
from worldloom.core.config import Config
from worldloom.core.errors import ConfigError, DataError
from worldloom.core.signing import Domain, read_signed
from worldloom.core.yaml_config import parse_yaml, read_yaml
from worldloom.guardrails.fallback import Fallback, FallbackField
from worldloom.guardrails.objective_configs import ObjectiveConfig, ObjectiveField
from worldloom.guardrails.rails import Rail, RailField
from worldloom.guardrails.rule_versions import SignedLayer, check_versions

LAYERS = ("operator", "site", "community")


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

    Raises:
        ConfigError: the layers are out of order, one loosens a layer above it, or a guardrail forbids the action that a
            fallback declares; the message names the layers and the rule.
    """

    layers: tuple[RuleLayer, ...]

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
    key then cannot sign the operator's layer. The pictures that a layer forbids must be signed too, because they are
    part of the rule. With `trusted=None` signatures are not checked; use this for experiments only.

    The newest version of each signed layer is remembered for the user (`state_folder`). An older layer is refused,
    unless `revert` is set: then the versions of these files count as the newest from now on.

    Raises:
        StorageError: a file, or its signature, is missing.
        DataError: a signature is wrong, its key is not trusted, or a newer version of a layer was used before.
        ConfigError: a line is invalid (the message names it), or the layers contradict each other.
    """
    layers, signed = [], []
    for path in paths:
        if trusted is None:
            layers.append(read_yaml(path, RuleLayer))
            continue
        content, signer = read_signed(path, {key.rpartition(":")[2] for key in trusted}, Domain.RULE_LAYER)
        layer = parse_yaml(content, RuleLayer, source=str(path))
        able = keys_for(layer.layer, trusted)
        if signer not in able:
            raise DataError(
                f"{path} is a layer of the {layer.layer}, but the key that signed the file, {signer}, is trusted only "
                f"for another layer. Have the {layer.layer} sign the file"
            )
        pictures = [read_signed(file, able, Domain.PICTURE)[0] for file in layer.files]
        series = (signer, layer.layer, layer.owner, layer.name)
        signed.append(SignedLayer.of(path, content, pictures, series=series, version=layer.version))
        layers.append(layer)
    rules = RuleSet(layers=tuple(layers))
    check_versions(signed, revert=revert)
    return rules
