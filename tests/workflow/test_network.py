"""What a coordinator over the network begins with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from worldloom.core.errors import ConfigError
from worldloom.core.signing import SigningKey, make_key
from worldloom.federation import Base, Constitution, ratify
from worldloom.workflow import CoordinatorConfig, coordinate
from worldloom.workflow.network import _largest_message

pytest.importorskip("flwr", reason="needs pip install 'worldloom[weave]'")
STATISTICS = {"shared": ["encoder.*", "predictor.*", "normalise_actions.*"], "sovereign": ["norm.*"]}


class Serves(Exception):
    """The coordinator got as far as to listen."""


def test_a_constitution_that_allows_less_than_the_base_needs_is_named_before_anyone_connects(
    tmp_path: Path,
) -> None:
    for name in ("chair", "north"):
        make_key(tmp_path / f"{name}.pem")
    keys = {name: SigningKey(tmp_path / f"{name}.pem") for name in ("chair", "north")}
    values = {
        "consortium": "shards",
        "members": {"north": {"key": keys["north"].public}},
        "coordinators": [{"name": "chair", "key": keys["chair"].public}],
        "rounds": 1,
        "inner_steps": 1,
        "quorum": 1,
        "cap": 1.0,
    }
    base = Base.of({"encoder.w": torch.zeros(1000, 1000)})  # 4 MB
    with pytest.raises(ConfigError, match=r"largest_megabytes: 2 is too small .* 4 MB; raise it to at least"):
        _largest_message(base, Constitution.parse({**values, "largest_megabytes": 2.0}))
    assert _largest_message(base, Constitution.parse({**values, "largest_megabytes": 5.0})) == 5_000_000
    assert 8_000_000 < _largest_message(base, Constitution.parse(values)) < 10_000_000


def test_who_shares_statistics_begins_with_a_pilots_base_and_who_goes_on_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve(*_: Any, **__: Any) -> None:
        raise Serves

    monkeypatch.setattr("worldloom.federation.transport.flower.serve", serve)
    for name in ("chair", "north"):
        make_key(tmp_path / f"{name}.pem")
    keys = {name: SigningKey(tmp_path / f"{name}.pem") for name in ("chair", "north")}
    rules = tmp_path / "rules.yaml"
    rules.write_text(json.dumps({
        "consortium": "shards",
        "members": {"north": {"key": keys["north"].public, "connection": "ssh"}},
        "coordinators": [{"name": "chair", "key": keys["chair"].public}],
        "rounds": 1,
        "inner_steps": 1,
        "quorum": 1,
        "cap": 1.0,
        "partition": STATISTICS,
    }))  # fmt: skip
    ratify(rules, "north", keys["north"])
    paths = {"constitution": rules, "key": tmp_path / "chair.pem", "home": tmp_path / "hub", "tls": tmp_path}
    config = CoordinatorConfig(**paths, stems=False)
    with pytest.raises(ConfigError, match=r"weave pilot"):
        coordinate(config)
    (tmp_path / "hub" / "rounds" / "bases").mkdir(parents=True)  # what a killed one leaves, or one that it succeeds
    with pytest.raises(Serves):
        coordinate(config)
