"""What people write is read as plain values, and every mistake has its line."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from worldloom.core.config import Config
from worldloom.core.errors import ConfigError, StorageError
from worldloom.core.yaml_config import parse_yaml, read_yaml


class Rule(Config):
    name: str
    limit: float
    place: tuple[float, ...] = ()


class Policy(Config):
    owner: str
    rules: tuple[Rule, ...] = ()
    options: dict[str, int] = Field(default_factory=dict)


class Loose(Config):
    owner: str
    options: dict[str, Any] = Field(default_factory=dict)


TEXT = """\
owner: the site   # who answers for it
rules:
  - name: pit
    limit: 2.5
    place: [1, 2.0]
  - {name: wall, limit: -1}
options:
  tries: 3
"""


def test_what_was_written_is_read(tmp_path: Path) -> None:
    expected = Policy(
        owner="the site",
        rules=(Rule(name="pit", limit=2.5, place=(1.0, 2.0)), Rule(name="wall", limit=-1.0)),
        options={"tries": 3},
    )
    assert parse_yaml(TEXT, Policy) == expected
    (tmp_path / "p.yaml").write_text(TEXT)
    assert read_yaml(tmp_path / "p.yaml", Policy) == expected


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("limit: 2.5", "limit: high", r"line 4: rules.0.limit: .*got 'high'"),
        (
            "limit: 2.5",
            "limti: 2.5",
            r"line 4: unknown key 'rules.0.limti'.*line 3: rules.0.limit: Field required|"
            r"line 3: rules.0.limit: Field required.*line 4: unknown key 'rules.0.limti'",
        ),
        ("name: wall, ", "", r"line 6: rules.1.name: Field required"),
        ("tries: 3", "tries: many", r"line 8: options.tries"),
        ("owner: the site", "owener: the site", r"line 1: unknown key 'owener'; did you mean 'owner'"),
        ("    limit: 2.5\n", "    limit: 2.5\n    limit: 9\n", r"line 5: the key 'limit' appears twice"),
        ("limit: 2.5", "limit: &big 2.5", r"line 4: anchors, aliases and tags"),
        ("limit: 2.5", "limit: !!python/object/apply:os.system [ls]", r"line 4: anchors, aliases and tags"),
        ("limit: 2.5", "limit: [2.5", r"line \d+ is not valid YAML"),
        ("owner: the site", "? [a, b]\n: 1", r"line 1: a key must be plain text; got a sequence"),
        ("limit: 2.5", "limit: .nan", r"line 4: '.nan' is not a finite number"),
        ("limit: 2.5", "limit: 1e999", r"line 4: '1e999' is larger than any number"),
        ("limit: 2.5", "limit: 1." + "0" * 5000, r"line 4: '1.0{98}...' has 5002 characters"),
        ("limit: 2.5", "limit: true", r"line 4: rules.0.limit: expected a number.*got True"),
        ("tries: 3", f"tries: {2**63}", r"line 8: options.tries: expected a whole number of at most"),
        ("limit: 2.5", "limit: 2026-13-45", r"line 4"),
        ("limit: 2.5", f"limit: {':'.join(['1'] * 200)}.0", r"line 4: .* means different things"),
        ("name: wall", '"caf\u00e9": 1, "cafe\u0301": 1', r"line 6: the key .* looks like an earlier key"),
        ("name: wall", '"wa\\u200bll": 1', r"line 6: the key .* contains \\u200b"),
        ("owner: the site", 'owner: "\\e[2J"', r"line 1: .* contains the character \\x1b"),
    ],
)
def test_every_mistake_has_its_line(old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_yaml(TEXT.replace(old, new), Policy)


@pytest.mark.parametrize(
    "word", ["1:30", "010", "-010", "08", "1_000", "0b11", "0o17", "00.5", "yes", "Off", "2026-01-31", "=", "0_8.5"]
)
def test_words_that_versions_of_yaml_read_differently_are_refused(word: str) -> None:
    for kind in (Policy, Loose):
        with pytest.raises(ConfigError, match=r"line 2: .* means different things.*in quotes"):
            parse_yaml(f"owner: site\noptions: {{tries: {word}}}\n", kind)
    assert parse_yaml(f"owner: site\noptions: {{tries: '{word}'}}\n", Loose).options == {"tries": word}


@given(st.one_of(st.integers(-(2**63) + 1, 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False)))
def test_every_number_is_read_as_json_reads_it(number: float) -> None:
    read = parse_yaml(f"owner: site\noptions: {{tries: {json.dumps(number)}}}\n", Loose).options["tries"]
    assert read == number
    assert type(read) is type(number)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "word"])
def test_what_holds_no_keys_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a mapping of keys and values"):
        parse_yaml(text, Policy)


def test_what_is_too_large_or_too_deep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="larger than"):
        parse_yaml("owner: " + "x" * 2**21, Policy)
    for depth in (100, 100_000):
        with pytest.raises(ConfigError, match="deep"):
            parse_yaml("owner: " + "[" * depth + "]" * depth, Policy)
    (tmp_path / "p.yaml").write_bytes(b"\xff\xfeowner")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_yaml(tmp_path / "p.yaml", Policy)
    with pytest.raises(StorageError, match="does not exist"):
        read_yaml(tmp_path / "none.yaml", Policy)


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(parse_yaml(text, Policy), Policy)
