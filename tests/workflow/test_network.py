"""What a coordinator over the network begins with."""

import json
from pathlib import Path
from typing import Any

import pytest

from worldloom.core.errors import ConfigError
from worldloom.core.signing import SigningKey, make_key
from worldloom.federation import ratify
from worldloom.workflow import CoordinatorConfig, coordinate

pytest.importorskip("flwr", reason="needs pip install 'worldloom[weave]'")
STATISTICS = {"shared": ["encoder.*", "predictor.*", "normalise_actions.*"], "sovereign": ["norm.*"]}


class Serves(Exception):
    """The coordinator got as far as to listen."""


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
