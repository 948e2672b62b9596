"""For all tests: how long an example of a property takes says nothing on a machine that others use too."""

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from forging import contribution

os.environ["XDG_STATE_HOME"] = os.environ["WORLDLOOM_STATE"] = tempfile.mkdtemp(prefix="worldloom-state-")

settings.register_profile("worldloom", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("worldloom")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first: begun last, one of them would keep a single worker busy at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of one file on one worker, and those of tests/cli, which share a demo: each is made once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "tests/cli" if file.startswith("tests/cli/") else file

    return ByFile(config, log)


class Chronicle:
    """A consortium of which only the ledger is written, by hand: no training, no transport."""

    owners = ("north", "east", "south", "vault")

    def __init__(self, path: Path, **rules: Any) -> None:
        from worldloom.core.signing import SigningKey, make_key
        from worldloom.federation import Constitution, Ledger, ratify

        (path / "keys").mkdir(parents=True)
        for name in ("chair", *self.owners):
            make_key(path / "keys" / f"{name}.pem")
        self.keys = {name: SigningKey(path / "keys" / f"{name}.pem") for name in ("chair", *self.owners)}
        self.constitution = Constitution.parse({
            "consortium": "looms & sons",
            "members": {name: {"key": self.keys[name].public} for name in self.owners},
            "coordinators": [{"name": "chair", "key": self.keys["chair"].public}],
            "rounds": 2,
            "inner_steps": 10,
            "quorum": 1,
            "cap": 1.0,
            "privacy": {"clip": 1.0, "noise": 0.8, "epsilon_budget": 8.0},
            **rules,
        })  # fmt: skip
        self.rules = path / "constitution.yaml"
        self.rules.write_text(json.dumps(self.constitution.model_dump(mode="json")))
        for name in self.owners:
            ratify(self.rules, name, self.keys[name])
        self.rounds = path / "rounds"
        self.rounds.mkdir()
        self.ledger = Ledger(self.rounds / "ledger.jsonl", self.keys["chair"], durable=False)

    def begin(self) -> None:
        from worldloom.federation.record.ledger import constitution_facts

        self.ledger.append("constitution", constitution_facts(self.constitution))
        self.ledger.append("base", {"fingerprint": "ba5e0"}, round=0)
        self.base = "ba5e0"

    def contribute(self, number: int, owner: str, *, size: int = 1_600_000, epsilon: float | None = None) -> None:
        spent = {"clip": 1.0, "noise": 0.8, "delta": 1e-5, "round": number, "epsilon": epsilon or 1.5 * (number + 1)}
        facts = contribution(
            self.constitution, self.keys[owner], owner, number, self.base, self.ledger.head, steps=10, spent=spent,
            size=size,
        )  # fmt: skip
        self.ledger.append("contribution", facts, round=number)

    def refuse(self, number: int, owner: str, reason: str) -> None:
        self.ledger.append("refusal", {"owner": owner, "reason": reason}, round=number)

    def weave(
        self,
        number: int,
        weights: Mapping[str, float],
        *,
        left_out: Sequence[str] = (),
        first: float = 8,
        losses: Mapping[str, list[float]] | None = None,
    ) -> None:
        losses = losses or {
            name: [(first + place / 4) / (number + 1), (first + place / 4) / (number + 1.6)]
            for place, name in enumerate(self.owners)
        }
        before, after = (statistics.median(times) for times in zip(*losses.values(), strict=True))
        evaluation = {"before": before, "after": after, "owners": losses}
        facts = {"weights": dict(weights), "notes": {}, "left_out": list(left_out), "evaluation": evaluation}
        self.ledger.append("round", facts, round=number)
        previous, self.base = self.base, f"ba5e{number + 1}" if weights else self.base
        self.ledger.append("base", {"fingerprint": self.base, "previous": previous}, round=number + 1)

    def two_rounds(self, reason: str = "it is of private data") -> None:
        """Write all of it: one owner never comes, and one is left out of the second round."""
        self.begin()
        for number in range(2):
            for owner in self.owners[:3]:
                self.contribute(number, owner)
            self.refuse(number, "vault", reason)
            if number:
                self.refuse(number, "south", "with it, held-out losses grow by 40.0%")
            weights = {"north": 0.5, "east": 0.5} if number else {"north": 0.4, "east": 0.35, "south": 0.25}
            self.weave(number, weights, left_out=["south"] if number else [])


@pytest.fixture
def new_chronicle(tmp_path: Path) -> Iterator[Callable[..., Chronicle]]:
    """Return what makes a consortium by some rules, with a ledger that is still to be written."""
    made: list[Chronicle] = []

    def make(**rules: Any) -> Chronicle:
        made.append(Chronicle(tmp_path / f"chronicle-{len(made)}", **rules))
        return made[-1]

    yield make
    for one in made:
        one.ledger.close()


@pytest.fixture
def chronicle(new_chronicle: Callable[..., Chronicle]) -> Chronicle:
    """Return one under privacy, of two rounds."""
    return new_chronicle()
