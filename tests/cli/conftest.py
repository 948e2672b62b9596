"""One tiny demo, made by the installed command, for all tests of the command line."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from worldloom.cli.main import main

TINY = [
    "collection.episodes=16",
    "collection.steps=40",
    "training.steps=8",
    "training.validation_windows=16",
    "inverse.steps=4",
    "distance.steps=4",
    "reactive.steps=4",
    "reactive.problems=32",
    'goal_inverse={"steps": 4}',
    "cloning.steps=4",
]


class Done(NamedTuple):
    code: int
    out: str
    err: str


@dataclass
class Demo:
    """What `worldloom demo` left behind, and what it said."""

    root: Path
    done: Done

    @property
    def data(self) -> str:
        return str(self.root / "data")

    @property
    def run(self) -> str:
        return str(self.root / "run")


@pytest.fixture(scope="session")
def demo_command() -> Callable[[Path], list[str]]:
    overrides = [part for value in TINY for part in ("--set", value)]
    return lambda out: ["demo", "--out", str(out), "--episodes", "2", *overrides]


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, demo_command: Callable[[Path], list[str]]) -> Demo:
    root = tmp_path_factory.mktemp("a demo whose path is long enough to be wrapped in a narrow terminal") / "demo"
    command = [str(Path(sys.executable).parent / "worldloom"), *demo_command(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    return Demo(root, Done(done.returncode, done.stdout, done.stderr))


@pytest.fixture
def worldloom(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run the command within this process, as the installed script does."""

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["worldloom", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return Done(int(end.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def refused(worldloom: Callable[..., Done]) -> Callable[..., str]:
    """Run a command that must fail with this code and one message on standard error; return the message."""

    def run(code: int, *arguments: str) -> str:
        done = worldloom(*arguments)
        assert (done.code, done.out) == (code, "")
        (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert done.err.rstrip().endswith(line)
        return line

    return run
