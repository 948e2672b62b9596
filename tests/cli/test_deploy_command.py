"""`worldloom deploy`, with a run that was logged from the plant which it then drives."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worldloom.core.types import ActionSpec, ObservationSpec
from worldloom.data import collect
from worldloom.deploy.link import PlantReading
from worldloom.deploy.plant import PlantServer
from worldloom.recipes import load_recipe
from worldloom.workflow import Run, jobs, train

TINY = [
    "model.context=1",
    "model.block=1",
    "training.steps=4",
    "training.validation_windows=16",
    "inverse.steps=4",
    "distance.steps=4",
    "reactive.steps=4",
    "reactive.problems=16",
    "cloning.steps=4",
    'methods={"plan": {"name": "plan", "horizon": 2, "replan": 1}}',
    "default_method=plan",
]


class Point:
    def __init__(self) -> None:
        self.place, self.command = np.zeros(2, np.float32), np.zeros(2, np.float32)

    def read(self) -> PlantReading:
        self.place = (self.place + np.float32(0.1) * self.command).astype(np.float32)
        return PlantReading(vector=self.place.copy())

    def write(self, action: np.ndarray) -> None:
        self.command = action.astype(np.float32)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    point = Point()
    server = PlantServer(
        point.read,
        point.write,
        observation=ObservationSpec(vector=2),
        action=ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0)),
        rate=20.0,
        safe_action=np.zeros(2, np.float32),
        address=f"unix:{tmp_path_factory.mktemp('plant') / 's'}",
        silence=10.0,
    )
    serving = threading.Thread(target=server.serve)
    serving.start()
    yield server.address
    server.stop()
    serving.join(timeout=20)


@pytest.fixture(scope="module")
def run(address: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("deployed")
    options: dict[str, Any] = {"env_id": "worldloom/Plant-v0", "env_kwargs": {"address": address}, "num_envs": 1}
    dataset = collect(root / "data", **options, episodes=3, steps=30, seed=0)
    recipe = load_recipe("generic").override([*TINY, "training.validation_share=0.34"])
    return str(train(recipe, dataset, root / "run").path)


def goal(tmp_path: Path, values: Any) -> str:
    (tmp_path / "goal.json").write_text(json.dumps(values))
    return str(tmp_path / "goal.json")


def test_a_run_drives_the_plant_and_keeps_its_report(
    run: str, address: str, tmp_path: Path, worldloom: Callable[..., Any]
) -> None:
    wanted = goal(tmp_path, {"vector": [0.5, 0.5]})
    common = ("--connect", address, "--goal", wanted, "--duration", "0.5")
    done = worldloom("deploy", run, *common, "--safe-action", "0,0", "--json")
    assert done.code == 0, done.err
    figures = json.loads(done.out)
    assert (figures["periods"], figures["ended"]) == (10, "done")
    (folder,) = (Path(run) / "deployments").iterdir()
    assert json.loads((folder / "report.json").read_text()) == figures
    assert (folder / "timeline.svg").read_text().lstrip().startswith("<?xml")
    done = worldloom("deploy", run, *common, "--safe-action", "hold", "--late", "use")
    assert "10 periods" in done.out


def test_a_plant_that_only_files_name_is_not_driven(run: str, address: str, refused: Callable[..., str]) -> None:
    said = refused(2, "evaluate", run, "--success", "position:0.1", "--episodes", "1")
    assert f"the data are from worldloom/Plant-v0 with {{'address': '{address}'}}, which is not a simulator" in said
    run_, named = Run.open(run), {"address": "unix:/another"}
    protocol = jobs._protocol(run_, None, "position:0.1", env_kwargs=named)
    assert protocol.env_kwargs == named


@pytest.mark.parametrize(
    ("code", "change", "message"),
    [
        (2, {"--safe-action": "still"}, "zero, hold or 2 comma-separated values"),
        (2, {"--safe-action": "5,0"}, "does not accept the safe action"),
        (2, {"--rate": "10"}, "sends 20 observations per second"),
        (2, {"--deadline-ms": "60"}, "at most the period"),
        (2, {"--late": "never"}, "discard or use"),
        (2, {"--connect": "nowhere"}, "expected tcp://HOST:PORT or unix:PATH"),
        (6, {"--connect": "tcp://127.0.0.1:1"}, "no plant answers"),
        (3, {"vector": [1.0]}, "a vector of 2 values; got"),
        (3, {"vector": "far"}, "vector: Input should be a valid tuple"),
        (3, {"vector": [1.0, 1e300]}, "has numbers above 3.4"),
        (3, {"vektor": [1.0]}, "with 'vector', 'pixels' or both"),
        (4, {"--goal": "missing.json"}, "does not exist"),
        (3, {"--goal": "picture.png"}, "write the goal as JSON"),
    ],
)
def test_what_cannot_be_is_said(
    run: str,
    address: str,
    tmp_path: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    change: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr("worldloom.deploy.wire.Address.connect", _impatient())
    values = {name: value for name, value in change.items() if not name.startswith("--")}
    options = {"--connect": address, "--goal": goal(tmp_path, values or {"vector": [0, 0]}), "--safe-action": "zero"}
    options |= {name: value for name, value in change.items() if name.startswith("--")}
    said = refused(code, "deploy", run, "--duration", "0.5", *(part for pair in options.items() for part in pair))
    assert message in said


def _impatient() -> Callable[..., Any]:
    from worldloom.deploy.wire import Address

    connect = Address.connect
    return lambda self, timeout: connect(self, 0.2)
