"""Writes docs/cli.md from the commands themselves: python scripts/cli_reference.py"""

from pathlib import Path
from typing import Any

import typer

from worldloom.cli.main import app

PATH = Path(__file__).parent.parent / "docs" / "cli.md"


def render() -> str:
    parts = ["# Command line\n\nWritten by `python scripts/cli_reference.py`; a test holds it to the commands.\n"]
    root = typer.main.get_command(app)
    parts += [text for name, command in root.commands.items() for text in describe(f"worldloom {name}", command)]
    return "\n".join([*parts, f"{root.epilog}\n"])


def describe(name: str, command: Any) -> list[str]:
    children = getattr(command, "commands", {})
    if children:
        return [text for child, inner in children.items() for text in describe(f"{name} {child}", inner)]
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option" and each.name != "help"]
    usage = " ".join([name, *(each.name.upper() for each in arguments), "[OPTIONS]"])
    lines = [f"## {name}\n", f"{command.help}\n", f"    {usage}\n"]
    lines += [f"- `{each.name.upper()}`: {each.help}" for each in arguments]
    lines += [f"- `{', '.join(each.opts)}`: {each.help}{default(each)}" for each in options]
    return ["\n".join(lines) + "\n"]


def default(option: Any) -> str:
    plain = isinstance(option.default, str | int | float | Path) and not isinstance(option.default, bool)
    return f" Default: `{option.default}`." if plain and str(option.default) else ""


if __name__ == "__main__":
    PATH.write_text(render(), encoding="utf-8")
