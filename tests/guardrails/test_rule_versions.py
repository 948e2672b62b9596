"""An older rule layer is refused once a newer one was read, in every later process, until the user reverts."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldloom.core.errors import DataError, StorageError
from worldloom.core.signing import Domain, make_key, sign_file
from worldloom.guardrails import RuleSet, read_rules, sign_rules

LAYER = """
owner: Acme
version: {version}
name: {name}
guardrails:
  gently: {{name: magnitude, limit: {limit}}}
"""


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WORLDLOOM_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


class Owner:
    """Signs layers and reads them again."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.public = folder, make_key(folder / "key.pem")

    def layer(self, version: int, limit: float = 1.0, name: str = "crane") -> Path:
        path = self.folder / f"{name}-{version}-{limit}.yaml"
        path.write_text(LAYER.format(version=version, limit=limit, name=name))
        sign_file(path, self.folder / "key.pem", Domain.RULE_LAYER)
        return path

    def read(self, path: Path, *, revert: bool = False) -> RuleSet:
        return read_rules([path], trusted={self.public}, revert=revert)


@pytest.fixture
def owner(tmp_path: Path) -> Owner:
    return Owner(tmp_path / "owner")


def test_an_older_version_is_refused_once_a_newer_was_read(owner: Owner) -> None:
    older, newer = owner.layer(1, limit=9.0), owner.layer(2)
    owner.read(older)
    owner.read(newer)
    for old in (older, owner.layer(0)):
        with pytest.raises(DataError, match="but version 2 of this rule layer was read before"):
            owner.read(old)
    assert owner.read(newer).layers[0].version == 2


def test_one_version_has_one_content(owner: Owner) -> None:
    owner.read(owner.layer(3, limit=1.0))
    with pytest.raises(DataError, match="has version 3, but differs from the version 3 that was read before"):
        owner.read(owner.layer(3, limit=9.0))


def test_a_picture_is_part_of_a_version(owner: Owner) -> None:
    path, picture = owner.folder / "site.yaml", owner.folder / "fire.png"
    path.write_text(f"owner: Acme\nversion: 1\nguardrails: {{n: {{name: unlike, pictures: [{picture}], distance: 1}}}}")
    for content, accepted in ((b"a fire", True), (b"a meadow", False)):  # both signed by the owner
        picture.write_bytes(content)
        sign_rules(path, owner.folder / "key.pem")
        if accepted:
            owner.read(path)
    with pytest.raises(DataError, match="differs from the version 1"):
        owner.read(path)


def test_a_user_may_go_back_on_purpose(owner: Owner) -> None:
    older, newer = owner.layer(1), owner.layer(2)
    owner.read(newer)
    owner.read(older, revert=True)
    owner.read(older)
    owner.read(newer)  # newer than what was reverted to
    with pytest.raises(DataError, match="'worldloom rules revert'"):
        owner.read(older)


def test_layers_of_other_signers_and_names_have_versions_of_their_own(owner: Owner, tmp_path: Path) -> None:
    owner.read(owner.layer(5))
    owner.read(owner.layer(1, name="welder"))
    other = Owner(tmp_path / "other")
    other.read(other.layer(1))


def test_a_version_without_a_signature_counts_for_nothing(owner: Owner, state: Path) -> None:
    read_rules([owner.layer(9)], trusted=None)
    assert not state.exists()
    owner.read(owner.layer(1))
    stranger = Owner(owner.folder / "stranger")
    with pytest.raises(DataError, match="not a trusted key"):
        owner.read(stranger.layer(7))
    owner.read(owner.layer(1))


def test_versions_are_no_part_of_what_margins_were_calibrated_for(owner: Owner) -> None:
    assert owner.read(owner.layer(1)).fingerprint == owner.read(owner.layer(2)).fingerprint


@pytest.mark.parametrize("content", ["", "[]", '{"kind": "worldloom rule versions", "format": 1, "newest": {"a": 1}}'])
def test_a_damaged_record_is_no_empty_record(owner: Owner, state: Path, content: str) -> None:
    owner.read(owner.layer(2))
    (state / "rule-versions.json").write_text(content)
    with pytest.raises(StorageError, match=r"rule-versions\.json"):
        owner.read(owner.layer(1))


def test_without_a_place_to_remember_a_version_it_is_not_accepted(owner: Owner, monkeypatch) -> None:
    monkeypatch.setenv("WORLDLOOM_STATE", "/dev/null/state")
    owner.read(owner.layer(0))
    with pytest.raises(StorageError, match="set WORLDLOOM_STATE to use another"):
        owner.read(owner.layer(1))


@given(versions=st.lists(st.integers(1, 6), min_size=1, max_size=8))
def test_the_versions_that_are_accepted_never_fall(tmp_path_factory, versions: list[int]) -> None:
    folder = tmp_path_factory.mktemp("series")
    owner, newest = Owner(folder / "owner"), 0
    paths = {version: owner.layer(version) for version in set(versions)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLDLOOM_STATE", str(folder / "state"))
        for version in versions:
            if version < newest:
                with pytest.raises(DataError, match="was read before"):
                    owner.read(paths[version])
            else:
                owner.read(paths[version])
                newest = version
