"""Every command: its help, its `--json`, and how fast the help comes."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from worldloom.cli.main import app


def commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    children = getattr(command, "commands", {})
    for child, inner in children.items():
        yield from commands(f"{name} {child}".strip(), inner)
    if not children:
        yield name, command


COMMANDS = dict(commands("", typer.main.get_command(app)))


def test_all_commands_are_walked() -> None:
    assert len(COMMANDS) > 45
    assert {"demo", "data preview", "weave ledger card"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_json_on_demand(name: str) -> None:
    (option,) = [each for each in COMMANDS[name].params if "--json" in each.opts]
    assert option.is_flag


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_a_summary_of_one_line_and_whole_sentences(name: str) -> None:
    command = COMMANDS[name]
    texts = [command.help, *(option.help for option in command.params if option.name != "help")]
    assert len(command.help.split("\n\n")[0].splitlines()) == 1
    for text in texts:
        assert text
        assert text.split("\n\n")[0].rstrip().endswith("."), text
        assert "who " not in f"{text} ".lower(), text


def test_help_loads_no_numerical_library() -> None:
    heavy = ("torch", "numpy", "pyarrow", "lance", "gymnasium", "PIL", "scipy")
    code = f"import sys, worldloom.cli.main; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
