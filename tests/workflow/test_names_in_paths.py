"""A name that becomes part of a path stays in its folder, whether it comes from a command, a file or a message."""

from pathlib import Path

import pytest

from worldloom.core.errors import ConfigError
from worldloom.core.signing import make_key
from worldloom.core.yaml_config import parse_yaml
from worldloom.data import collect
from worldloom.envs import register_envs
from worldloom.federation import RoundStore, classify, make_node_keys
from worldloom.recipes import Recipe
from worldloom.workflow import ConsortiumConfig, make_keys

EVIL = ["../evil", "/nowhere/evil", "a/../../evil", "", ".", "evil\n", "ev\x00il", "\x1b[2J"]


@pytest.mark.parametrize("name", EVIL)
def test_no_secret_key_is_written_outside_of_its_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "keys"
    for made in (lambda: make_keys(folder, name), lambda: make_keys(folder, name, ("localhost",))):
        with pytest.raises(ConfigError, match="cannot be part of a path"):
            made()
    with pytest.raises(ConfigError, match="cannot be part of a path"):
        make_node_keys(folder, name)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("name", [*EVIL, "keys", "rounds", "coordinator"])
def test_an_owner_is_no_path_and_no_other_part_of_the_simulation(name: str) -> None:
    with pytest.raises(ConfigError, match="owners"):
        ConsortiumConfig.parse({"consortium": "c", "owners": {name: {}, "north": {}}})


def test_the_line_of_a_wrong_name_is_told() -> None:
    with pytest.raises(ConfigError, match=r"line 4: owners.*expected a name of 1 to 200 bytes"):
        parse_yaml("consortium: c\nowners:\n  north: {}\n  ../evil: {}\n", ConsortiumConfig)


@pytest.mark.parametrize("name", EVIL)
def test_a_probe_or_a_contribution_is_stored_in_its_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="probes"):
        Recipe.parse({"name": "r", "probes": {name: {"label": "position"}}})
    for path in (RoundStore(tmp_path).message, RoundStore(tmp_path).delta):
        with pytest.raises(ConfigError, match="cannot be part of a path"):
            path(1, name)


def test_an_owner_that_no_constitution_could_name_signs_no_card(tmp_path: Path) -> None:
    register_envs()
    collect(tmp_path / "data", env_id="worldloom/TwoRoom-v0", episodes=1, steps=2, num_envs=1, seed=0)
    make_key(tmp_path / "key.pem")
    with pytest.raises(ConfigError, match="owner"):
        classify(tmp_path / "data", owner="../evil", data_class="open", key=tmp_path / "key.pem")
