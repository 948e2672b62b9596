"""Options that several commands share."""

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from worldloom.core.config import parse_value
from worldloom.core.errors import ConfigError

Imports = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE", help="Import a module first, such as one that registers environments."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the recipe, such as training.steps=500."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Threads = Annotated[int, typer.Option("--threads", min=0, help="CPU threads for PyTorch; 0 takes all cores.")]


def import_modules(names: list[str] | None) -> None:
    """Import the modules that the user named; the working directory counts."""
    if names and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    for name in names or []:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever the user's module raises, a syntax error too
            reason = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
            raise ConfigError(f"cannot import {name!r}: {reason}. Check --import and the working directory") from error


def key_values(assignments: list[str] | None, option: str) -> dict[str, Any]:
    """Read `key=value` options; values are JSON, else text."""
    values: dict[str, Any] = {}
    for assignment in assignments or []:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"{option} {assignment!r} has no '='; expected KEY=VALUE")
        values[key] = parse_value(text)
    return values


def set_threads(count: int) -> None:
    """Pin PyTorch's threads; 0 leaves PyTorch's own choice."""
    import torch

    if count:
        torch.set_num_threads(count)
