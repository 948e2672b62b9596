"""Options that several commands share."""

import importlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worldloom.core.config import parse_value
from worldloom.core.errors import ConfigError
from worldloom.core.files import storage_errors

if TYPE_CHECKING:
    from worldloom.core.picture_layout import PictureOptions
    from worldloom.workflow import Session

_KEY_FILE = 1_000_000  # bytes of a file of keys
_KEY = re.compile("((operator|site|community):)?[0-9a-fA-F]{64}")

Imports = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE", help="Import a module first, such as one that registers environments."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the recipe, such as training.steps=500."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
PictureAxes = Annotated[
    str | None,
    typer.Option(
        "--picture-axes",
        metavar="AXES",
        help="The order of a picture's axes, such as chw: h height, w width, c channels, s stacked frames.",
    ),
]
PictureRange = Annotated[
    str | None,
    typer.Option(
        "--picture-range",
        metavar="LOW:HIGH",
        help="For pictures that are not bytes: the values that become 0 and 255.",
    ),
]
Threads = Annotated[
    int, typer.Option("--threads", min=0, help="CPU threads for PyTorch; 0 measures which number is fastest.")
]
Audit = Annotated[Path | None, typer.Option("--audit", help="A directory for the log of every decision of the agent.")]
Rules = Annotated[
    list[Path] | None,
    typer.Option("--rules", metavar="FILE", help="A layer of the agents' rule set; one per layer, uppermost first."),
]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        "--trust",
        metavar="[LAYER:]KEY",
        help="A public key that may sign the rule set and margins, or a file of such keys.",
    ),
]
Unsigned = Annotated[
    bool, typer.Option("--unsigned", help="Skip the signature check of the rule set and the margins, for experiments.")
]

Simulator = Annotated[
    bool,
    typer.Option(
        "--simulator", help="Under a rule set: declare that the world is a simulator, if the world declares nothing."
    ),
]


def import_modules(names: list[str] | None) -> None:
    """Import modules by name, also from the working directory.

    The working directory comes last, so that no file in it replaces a module that is installed.
    """
    if names and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    for name in names or []:
        try:
            importlib.import_module(name)
        except Exception as error:  # any exception of the user's module, including a syntax error
            reason = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
            raise ConfigError(f"cannot import {name!r}: {reason}. Check --import and the working directory") from error


def key_values(assignments: list[str] | None, option: str) -> dict[str, Any]:
    """Parse `key=value` options; a value that is not JSON is text."""
    values: dict[str, Any] = {}
    for assignment in assignments or []:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"{option} {assignment!r} has no '='; expected KEY=VALUE")
        values[key] = parse_value(text)
    return values


def picture_options(axes: str | None, limits: str | None) -> "PictureOptions | None":
    """Parse `--picture-axes` and `--picture-range`; None if neither is set."""
    from worldloom.core.picture_layout import PictureOptions

    if axes is None and limits is None:
        return None
    return PictureOptions.parse({"axes": axes, "range": None if limits is None else limits.split(":")})


def set_threads(count: int) -> None:
    """Set PyTorch's number of threads; with 0, each long job measures which number is fastest."""
    from worldloom.core import hardware

    hardware.set_threads(count)


def trusted_keys(trust: list[str] | None, unsigned: bool) -> set[str] | None:
    """Return the public keys that may sign, given directly or in files with one key per line; None if unsigned.

    A key may be limited to one layer, as `LAYER:KEY`.
    """
    if unsigned:
        return None
    keys: set[str] = set()
    for given in trust or []:
        lines = [given] if _KEY.fullmatch(given) else _lines_of(Path(given))  # a file must not replace a key
        if wrong := [line for line in lines if not _KEY.fullmatch(line)]:
            raise ConfigError(
                f"--trust {given}: expected public keys of 64 hexadecimal digits, each optionally with the prefix "
                f"operator:, site: or community:; got {wrong[0]!r}"
            )
        keys |= {line.lower() for line in lines}
    if not keys:
        raise ConfigError(
            "no key is trusted to sign the rule set; add one with --trust KEY, or skip the check with --unsigned"
        )
    return keys


def _lines_of(path: Path) -> list[str]:
    """Return the keys in a file, unchecked; if there is no such file, return only the path as text."""
    if not path.is_file():
        return [str(path)]
    with storage_errors(path), path.open("rb") as file:
        content = file.read(_KEY_FILE + 1)
    try:
        lines = content.decode("utf-8").split()
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file; expected public keys, one per line") from None
    if len(content) > _KEY_FILE or not lines:
        raise ConfigError(
            f"{path} has {'no keys' if not lines else 'too many bytes'}; expected public keys, one per line"
        )
    return lines


def open_session(
    run: Path,
    threads: int = 0,
    imports: list[str] | None = None,
    rules: list[Path] | None = None,
    trust: list[str] | None = None,
    unsigned: bool = False,
    *,
    memory: Path | None = None,
    audit: Path | None = None,
    simulator: bool = False,
) -> "Session":
    """Open a run with the rules, memory and audit log of a command.

    Modules are imported first, and PyTorch's number of threads is set; see `set_threads`.
    """
    import_modules(imports)
    set_threads(threads)
    from worldloom.guardrails import read_rules
    from worldloom.workflow import Run, Session

    trusted = trusted_keys(trust, unsigned) if rules or trust or unsigned else set()
    rule_set = read_rules(rules, trusted=trusted) if rules else None
    return Session(Run.open(run, trusted=trusted), rules=rule_set, memory=memory, audit=audit, simulator=simulator)
