"""Names that become parts of paths, such as those of owners, probes and protocols."""

from typing import Annotated

from pydantic import AfterValidator

from worldloom.core.errors import ConfigError
from worldloom.core.text import hidden_character

_LONGEST = 200  # bytes, so that a suffix still fits into the 255 bytes of a file name


def _part(name: str) -> str:
    size = len(name.encode("utf-8", "surrogatepass"))
    if (
        not 0 < size <= _LONGEST
        or name[0] in ".-~"
        or name != name.strip()
        or "/" in name
        or "\\" in name
        or "\n" in name
        or "\t" in name
        or hidden_character(name) is not None
    ):
        raise ValueError(
            f"expected a name of 1 to {_LONGEST} bytes without slashes, line breaks or control characters, which does "
            f"not begin with '.', '-' or '~'"
        )
    return name


PathName = Annotated[str, AfterValidator(_part)]
"""The type of a field whose value becomes a part of a path. It names an entry of a folder, and cannot leave the folder.
"""


def path_name(name: str, what: str) -> str:
    """Return `name` if it can be a part of a path; see `PathName`. `what` describes the name in the error.

    Raises:
        ConfigError: the name could point into another folder, or is not printable.
    """
    try:
        return _part(name)
    except ValueError as error:
        raise ConfigError(
            f"{what} {name[:_LONGEST]!r} cannot be part of a path: {error}. Choose another name"
        ) from None
