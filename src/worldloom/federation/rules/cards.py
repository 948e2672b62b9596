"""Data cards: the permitted uses of a dataset, signed by its owner and enforced where the data is read.

A card and its signature are separate files next to the dataset (`NAME.card.yaml`, `NAME.card.yaml.sig`), so that
signing a card does not change the dataset's fingerprint. Data without a trusted card is treated as private.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from worldloom.core.config import Config
from worldloom.core.errors import DataError, StorageError, WorldloomError
from worldloom.core.files import beside, require_writable, write_json
from worldloom.core.signing import Domain, read_signed, sign_file
from worldloom.core.yaml_config import parse_yaml
from worldloom.data import EpisodeDataset, Frames
from worldloom.federation.rules.constitution import Constitution, Name

_log = logging.getLogger(__name__)

DataClass = Literal["open", "unique-open", "controlled", "sovereign", "private"]
Purpose = Literal["base", "private"]
CLASSES: tuple[DataClass, ...] = ("open", "unique-open", "controlled", "sovereign", "private")
"""The data classes from the least strict to the strictest."""


class DataCard(Config):
    """An owner's statement about a dataset: its fingerprint (`dataset`), class and permitted uses (`purposes`).

    The purpose "base" permits training of the shared base, and "private" training of the owner's own model.
    `environment` is a digest of the dataset's description of its world, because the fingerprint does not cover this
    description. Cards of earlier versions of worldloom have no such digest.
    """

    dataset: str = Field(min_length=1)
    title: str = Field(min_length=1)
    owner: Name
    data_class: DataClass
    licence: str = ""
    purposes: tuple[Purpose, ...] = ("base", "private")
    environment: str = ""


class Permission(Config):
    """Whether data may train the shared base, whether only under differential privacy, and the reason as text."""

    allowed: bool
    needs_privacy: bool
    why: str


def card_path(dataset: Path | str) -> Path:
    """Return the path of the card of a dataset."""
    return beside(Path(dataset), ".card.yaml")


def classify(
    dataset: Path | str, *, owner: str, data_class: DataClass, key: Path | str, title: str = "", licence: str = ""
) -> Path:
    """Write and sign the card of a dataset, and return its path. An earlier card is replaced.

    Raises:
        ConfigError: the owner is not a valid name.
        StorageError: the dataset does not exist, or the card cannot be written.
        DataError: the dataset was changed after it was written, or the key is not an Ed25519 key.
    """
    path = card_path(dataset)
    require_writable(path)
    opened = EpisodeDataset.open(dataset)
    card = DataCard.parse({
        "dataset": opened.verify(),
        "environment": _environment(opened),
        "title": title or Path(dataset).name,
        "owner": owner,
        "data_class": data_class,
        "licence": licence,
    })  # fmt: skip
    write_json(path, card.model_dump(mode="json"))  # JSON is YAML
    sign_file(path, key, Domain.DATA_CARD)
    return path


def card_of(dataset: Path | str, trusted: Mapping[str, str], *, fingerprint: str | None = None) -> DataCard:
    """Return the card of a dataset; without a trusted card, log the reason and return a card of class private.

    `trusted` maps public keys to owners. The whole dataset is read and checked, because a card is valid only for the
    content for which it was signed. If `load_frames` has already read and checked the data, pass the `fingerprint` of
    its frames: the data is then not read again.

    Raises:
        StorageError: the dataset does not exist.
    """
    opened = EpisodeDataset.open(dataset) if fingerprint is None else None
    actual = fingerprint if opened is None else opened.fingerprint()
    path = card_path(dataset)
    try:
        if not path.is_file():
            raise StorageError(
                f"the dataset has no card {path.name}; its owner can sign one with 'worldloom weave classify'"
            )
        signed = read_signed(path, trusted, Domain.DATA_CARD)
        card = parse_yaml(signed.content, DataCard, source=str(path))
        owner = {public.strip().lower(): name for public, name in trusted.items()}[signed.key]
        if card.owner != owner:
            raise DataError(
                f"the card names {card.owner} as the owner, but {owner} signed the card; {card.owner} must sign it"
            )
        if card.dataset != actual:
            raise DataError(
                f"the card is for dataset {card.dataset}, but this is dataset {actual}; its owner must sign a new card"
            )
        if card.environment and card.environment != _environment(opened or EpisodeDataset.open(dataset)):
            raise DataError(
                "the dataset's description of its environment was changed after its owner signed the card; the owner "
                "must sign a new card"
            )
        if opened is not None:
            opened.verify()
    except WorldloomError as error:
        _log.warning("%s is treated as private: %s", dataset, error)
        return DataCard(
            dataset=actual, title="without a card", owner="unknown", data_class="private", purposes=("private",)
        )
    return card


def _environment(dataset: EpisodeDataset) -> str:
    text = json.dumps(json.loads(dataset.spec.to_json())["environment"], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def strictest(classes: Iterable[DataClass]) -> DataClass:
    """Return the strictest of some data classes, or private if there are none."""
    return max(classes, key=CLASSES.index, default="private")


def derive(cards: Iterable[DataCard], *, dataset: str, title: str, owner: str) -> DataCard:
    """Return the card of data derived from several datasets: their strictest class and their common purposes."""
    sources = list(cards)
    common = set.intersection(*(set(card.purposes) for card in sources)) if sources else set()
    return DataCard(
        dataset=dataset,
        title=title,
        owner=owner,
        data_class=strictest(card.data_class for card in sources),
        licence="; ".join(sorted({card.licence for card in sources if card.licence})),
        purposes=tuple(purpose for purpose in ("base", "private") if purpose in common),
    )


def may_shape_base(card: DataCard, constitution: Constitution) -> Permission:
    """Return whether a constitution permits data with this card to train the shared base."""
    needs = card.data_class == "controlled"
    if "base" not in card.purposes:
        why = f"the card of {card.title!r} does not list 'base' in its purposes"
    elif card.data_class not in constitution.classes:
        why = f"{card.data_class} data may not train the base of {constitution.consortium}"
    elif needs and constitution.privacy is None:
        why = "controlled data may train the base only under differential privacy, which the constitution does not set"
    else:
        how = " under privacy" if needs else ""
        return Permission(allowed=True, needs_privacy=needs, why=f"{card.data_class} data may train the base{how}")
    return Permission(allowed=False, needs_privacy=needs, why=why)


def guarded_frames(frames: Frames, card: DataCard, purpose: Purpose, constitution: Constitution) -> Frames:
    """Return the frames; if their card does not allow this purpose, reading their values raises `DataError`."""
    known = card.dataset == frames.fingerprint
    refused: str | None = None
    if purpose == "private":
        if known and "private" not in card.purposes:
            refused = f"the card of {card.title!r} does not list 'private' in its purposes"
    elif not known:
        refused = f"the card is for dataset {card.dataset}, but these frames are from {frames.fingerprint}"
    else:
        permission = may_shape_base(card, constitution)
        refused = None if permission.allowed else permission.why
    return frames if refused is None else _Withheld(frames=frames, refused=refused, **vars(frames))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class _Withheld(Frames):
    """Frames whose observations, actions and labels may not be read; the layout of the episodes stays visible."""

    frames: Frames
    refused: str

    def __getattribute__(self, name: str) -> Any:
        if name in ("pixels", "vector", "actions", "labels"):
            raise DataError(
                f"this data may not be read: {self.refused}. Use other data, or ask its owner for a card that allows it"
            )
        return super().__getattribute__(name)

    def close(self) -> None:
        self.frames.close()
