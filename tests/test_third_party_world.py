"""A world that this project never saw, from the command line alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORLD = '''
import gymnasium
import numpy as np
from gymnasium import spaces


class Sled(gymnasium.Env):
    """A dot on ice: actions push it, and no single frame shows its velocity."""

    metadata = {"render_modes": []}

    def __init__(self):
        self.observation_space = spaces.Box(0, 255, (24, 40, 3), np.uint8)
        self.action_space = spaces.Box(np.array([-1.0, -0.5], np.float32), np.array([1.0, 2.0], np.float32))

    def _look(self):
        frame = np.full((24, 40, 3), 30, np.uint8)
        x, y = self.position.astype(int)
        frame[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2] = (250, 200, 40)
        return frame, {"position": self.position.astype(np.float32)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.uniform([2, 2], [38, 22])
        self.velocity = np.zeros(2)
        return self._look()

    def step(self, action):
        push = np.asarray(action, float) - [0.0, 0.75]
        self.velocity = 0.8 * self.velocity + 0.5 * push
        moved = self.position + self.velocity
        self.position = np.clip(moved, [1, 1], [39, 23])
        self.velocity[moved != self.position] = 0
        frame, info = self._look()
        return frame, 0.0, False, False, info


gymnasium.register("elsewhere/Sled-v0", Sled)
'''

TINY = [
    "training.steps=12",
    "training.validation_windows=16",
    "training.horizon=4",
    "inverse.steps=5",
    "distance.steps=5",
    "reactive.steps=5",
    "reactive.problems=64",
    "cloning.steps=5",
]


def worldloom(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "worldloom"), *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.slow
def test_it_is_collected_trained_on_and_evaluated_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").write_text(WORLD)
    imported = ("--import", "elsewhere")
    collected = worldloom(
        tmp_path,
        "collect",
        "elsewhere/Sled-v0",
        *imported,
        "--out",
        "data",
        "--episodes",
        "12",
        "--steps",
        "40",
        "--json",
    )
    assert collected.returncode == 0, collected.stderr
    overrides = [part for value in TINY for part in ("--set", value)]
    trained = worldloom(tmp_path, "train", "data", "--out", "run", *overrides, "--json")
    assert trained.returncode == 0, trained.stderr
    summary = json.loads(trained.stdout)
    assert summary["recipe"] == "generic"
    assert summary["steps"] == 12
    chosen = ("--success", "position:3", "--goal-offset", "8", "--episodes", "4")
    evaluated = worldloom(tmp_path, "evaluate", "run", *imported, *chosen, "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    rows = json.loads(evaluated.stdout)["rows"]
    assert {row["method"] for row in rows} >= {"random", "behaviour cloning", "reactive policy", "tree search"}
    assert all(row["n"] == 4 for row in rows)
    (report,) = (tmp_path / "run" / "evaluation").glob("*/report.html")
    text = report.read_text()
    assert 'src="http' not in text
    assert 'href="http' not in text
    # Without the module, and without saying what success is, the message says what to do.
    lost = worldloom(tmp_path, "evaluate", "run", *chosen)
    assert lost.returncode == 6
    assert "--import MODULE" in lost.stderr
    unsaid = worldloom(tmp_path, "evaluate", "run", *imported)
    assert unsaid.returncode == 2
    assert "--success position:3" in unsaid.stderr
    assert "Traceback" not in lost.stderr + unsaid.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("train", "nowhere", "--out", "run"), 4, "no dataset exists at nowhere"),
        (("train", "nowhere", "--out", "run", "--recipe", "two-rom"), 2, "did you mean 'two-room'"),
        (("demo", "--set", "trainig.steps=1"), 2, "did you mean 'training'"),
        (("collect", "worldloom/TwoRoom-v0", "--out", "d", "--import", "not_there"), 2, "cannot import"),
        (("evaluate", "nowhere"), 4, "not a run"),
    ],
)
def test_a_mistake_is_one_message_and_an_exit_code(
    tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = worldloom(tmp_path, *arguments)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == code


def test_what_takes_long_to_load_is_loaded_where_it_is_used() -> None:
    slow = ("matplotlib", "lightning_fabric", "torch.distributed.tensor", "torch._dynamo", "scipy.optimize")
    program = f"import sys, worldloom.workflow; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_the_command_line_starts_light() -> None:
    heavy = ("torch", "gymnasium", "lance", "matplotlib", "pyarrow", "av")
    program = f"import sys, worldloom.cli.main; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
