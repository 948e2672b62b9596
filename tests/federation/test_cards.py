"""What a card does not allow is not read; without a card that can be trusted, nothing leaves its owner."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from worldloom.core.errors import DataError
from worldloom.core.signing import Domain, make_key, sign_file
from worldloom.core.types import ActionSpec, Episode, ObservationSpec
from worldloom.data import DatasetSpec, EpisodeDataset, Frames, WindowSampler
from worldloom.federation import (
    CLASSES,
    Constitution,
    DataCard,
    card_of,
    card_path,
    classify,
    derive,
    guarded_frames,
    may_shape_base,
    strictest,
)

_CLASSES = st.lists(st.sampled_from(CLASSES), max_size=5)


def _rules(**changed: Any) -> Constitution:
    members = {"acme": {"key": f"{1:064x}"}}
    values = {"consortium": "Looms", "members": members, "coordinators": ["acme"], "rounds": 1, "inner_steps": 1}
    return Constitution.parse({**values, "quorum": 1, "cap": 1.0, **changed})


_PRIVATE = {"privacy": {"clip": 1.0, "noise": 1.0, "epsilon_budget": 8.0}, "classes": ["open", "controlled"]}


def _card(**changed: Any) -> DataCard:
    return DataCard.parse({"dataset": "f1", "title": "Hall", "owner": "acme", "data_class": "open", **changed})


def _frames() -> Frames:
    return Frames(
        spec=DatasetSpec(observation=ObservationSpec(vector=2), action=ActionSpec(low=(-1.0,), high=(1.0,))),
        fingerprint="f1",
        pixels=None,
        vector=np.zeros((6, 2), np.float32),
        actions=np.zeros((6, 1), np.float32),
        labels={},
        starts=np.array([0], np.int64),
        lengths=np.array([5], np.int64),
    )


def _signed(folder: Path, name: str = "acme", **changed: Any) -> dict[str, str]:
    """Write a signed card beside a dataset, and return whom to trust."""
    path = card_path(folder / "hall.lance")
    path.write_text(yaml.safe_dump(_card(**changed).model_dump(mode="json")))
    public = make_key(folder / "key.pem")
    sign_file(path, folder / "key.pem", Domain.DATA_CARD)
    return {public: name}


def test_a_signed_card_is_believed(tmp_path: Path) -> None:
    trusted = _signed(tmp_path)
    assert card_of(tmp_path / "hall.lance", trusted, fingerprint="f1") == _card()


@pytest.mark.parametrize(
    "case", ["none", "changed", "unsigned", "stranger", "other data", "other owner", "no card", "other domain"]
)
def test_what_cannot_be_trusted_is_private_and_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    data = tmp_path / "hall.lance"
    trusted = _signed(tmp_path, name="bolt" if case == "other owner" else "acme")
    path, said = card_path(data), "the dataset has no card"
    if case == "none":
        path.unlink()
    elif case == "changed":
        path.write_text(path.read_text().replace("Hall", "Hell"))
        said = "was changed or replaced"
    elif case == "unsigned":
        path.with_name(f"{path.name}.sig").unlink()
        said = "not signed"
    elif case == "stranger":
        trusted, said = {}, "not a trusted key"
    elif case == "other owner":
        said = "bolt signed the card"
    elif case == "other domain":  # as if its owner had signed the card as a rule layer
        path.with_name(f"{path.name}.sig").unlink()
        sign_file(path, tmp_path / "key.pem", Domain.RULE_LAYER)
        said = "signed as 'rule layer'; expected 'data card'"
    elif case == "no card":
        path.write_bytes(b"title: \xff")
        sign_file(path, tmp_path / "key.pem", Domain.DATA_CARD)
        said = "decode"
    else:
        said = "this is dataset f2"
    with caplog.at_level(logging.WARNING):
        card = card_of(data, trusted, fingerprint="f2" if case == "other data" else "f1")
    assert card.data_class == "private"
    assert not may_shape_base(card, _rules(**_PRIVATE)).allowed
    assert said in caplog.text


@given(one=_CLASSES, other=_CLASSES)
def test_what_is_derived_is_as_strict_as_the_strictest(one: list[Any], other: list[Any]) -> None:
    cards = [_card(data_class=name) for name in one + other]
    made = derive(cards, dataset="f9", title="Both", owner="acme")
    ranks = [CLASSES.index(name) for name in one + other]
    assert CLASSES.index(made.data_class) == max(ranks, default=len(CLASSES) - 1)
    assert strictest([*one, *other]) == strictest([*other, *one])


def test_a_purpose_that_one_source_lacks_is_lost() -> None:
    made = derive([_card(), _card(purposes=["private"])], dataset="f9", title="Both", owner="acme")
    assert made.purposes == ("private",)
    assert not may_shape_base(made, _rules()).allowed


@pytest.mark.parametrize(
    ("name", "plain", "private"),
    [("open", True, True), ("unique-open", True, False), ("controlled", False, True), ("sovereign", False, False)],
)
def test_the_class_and_the_rules_decide(name: str, plain: bool, private: bool) -> None:
    card = _card(data_class=name)
    assert may_shape_base(card, _rules()).allowed is plain
    permission = may_shape_base(card, _rules(**_PRIVATE))
    assert permission.allowed is private
    assert permission.needs_privacy is (name == "controlled")


@pytest.mark.parametrize("part", ["pixels", "vector", "actions", "labels"])
@pytest.mark.parametrize("name", ["controlled", "sovereign", "private"])
def test_what_may_not_shape_the_base_cannot_be_read_for_it(part: str, name: str) -> None:
    frames = _frames()
    guarded = guarded_frames(frames, _card(data_class=name), "base", _rules())
    with pytest.raises(DataError, match="may not be read"):
        getattr(guarded, part)
    for allowed in (
        guarded_frames(frames, _card(data_class=name), "private", _rules()),
        guarded_frames(frames, _card(), "base", _rules()),
    ):
        assert getattr(allowed, part) is getattr(frames, part)


def test_the_guard_holds_in_what_training_reads_through() -> None:
    def draw(card: DataCard) -> WindowSampler:
        return WindowSampler(guarded_frames(_frames(), card, "base", _rules()), context=1, horizon=1, block=1)

    draw(_card()).sample(2, np.random.default_rng(0))
    with pytest.raises(DataError, match="private data may not train the base"):
        draw(_card(data_class="private")).sample(2, np.random.default_rng(0))


def test_a_card_of_other_data_opens_nothing() -> None:
    with pytest.raises(DataError, match="these frames are from f1"):
        _ = guarded_frames(_frames(), _card(dataset="f2"), "base", _rules()).vector


def test_a_card_does_not_count_if_another_environment_is_stated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, public = tmp_path / "hall.lance", make_key(tmp_path / "key.pem")
    vector, prints = np.arange(12, dtype=np.float32).reshape(6, 2), []
    for world in ("Hall-v0", "worldloom/Plant-v0"):
        shutil.rmtree(path, ignore_errors=True)
        dataset = EpisodeDataset.create(path, replace(_frames().spec, environment={"id": world}))
        dataset.append([Episode(vector=vector, actions=np.zeros((5, 1), np.float32))])
        prints.append(dataset.fingerprint())
        if world == "Hall-v0":
            classify(path, owner="acme", data_class="open", key=tmp_path / "key.pem")
            assert card_of(path, {public: "acme"}).data_class == "open"
    assert prints[0] == prints[1]
    for known in (None, prints[1]):
        assert card_of(path, {public: "acme"}, fingerprint=known).data_class == "private"
    assert "the dataset's description of its environment was changed" in caplog.text


def test_a_card_does_not_count_for_content_that_was_exchanged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, spec = tmp_path / "hall.lance", _frames().spec
    vector = np.arange(12, dtype=np.float32).reshape(6, 2)
    EpisodeDataset.create(path, spec).append([Episode(vector=vector, actions=np.zeros((5, 1), np.float32))])
    public = make_key(tmp_path / "key.pem")
    classify(path, owner="acme", data_class="open", key=tmp_path / "key.pem")
    assert card_of(path, {public: "acme"}).data_class == "open"

    table = lance.dataset(str(path)).to_table()
    columns = {**table.to_pydict(), "vector": (vector + 1).tolist()}  # with the digests of the signed content
    lance.write_dataset(pa.table(columns, schema=table.schema), str(path), mode="overwrite", schema=table.schema)
    with caplog.at_level(logging.WARNING):
        assert card_of(path, {public: "acme"}).data_class == "private"
    assert "was changed after it was written" in caplog.text
    with pytest.raises(DataError, match="was changed after it was written"):
        classify(path, owner="acme", data_class="open", key=tmp_path / "key.pem")
