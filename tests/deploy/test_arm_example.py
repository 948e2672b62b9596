"""The arm of examples/: a separate process that steps MuJoCo in real time."""

import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from worldloom.agents import RandomAgent
from worldloom.core.types import Goal
from worldloom.deploy import ControlLoop, SocketLink
from worldloom.deploy.link import PlantReading

if find_spec("mujoco") is None:  # not imported here: that would settle what draws in this process
    pytest.skip("MuJoCo is not installed", allow_module_level=True)
ARM = Path(__file__).parents[2] / "examples" / "arm_plant.py"


def joints(reading: PlantReading | None) -> np.ndarray:
    assert reading is not None
    return reading.labels["joints"]


def test_the_arm_moves_while_it_is_driven_and_stands_still_afterwards(tmp_path: Path) -> None:
    command = [sys.executable, str(ARM), "--address", f"unix:{tmp_path / 's'}", "--log", str(tmp_path / "log.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().removeprefix("arm: ").strip()
        with SocketLink(address, silence=20.0) as link:
            first = link.receive(20.0)
            assert first is not None
            agent = RandomAgent(link.action, seed=0)
            loop = ControlLoop(agent, link, deadline=0.04, safe_action=[0.0, 0.0])
            report = loop.run(Goal(observations=first.observations()), duration=1.0)
            assert len(report.periods) == 20
            assert np.abs(joints(loop.reading) - joints(first)).max() > 0.02
        with SocketLink(address, silence=20.0) as link:
            time.sleep(0.5)  # the safe action is a speed of zero; friction does the rest
            still = joints(link.receive(20.0))
            time.sleep(0.2)
            np.testing.assert_allclose(joints(link.receive(20.0)), still, atol=1e-3)
        process.terminate()
    log = json.loads((tmp_path / "log.json").read_text())
    assert {kind for _, kind, _ in log["actions"]} <= {"agent", "safe", "watchdog"}
    assert log["sessions"] == 2
