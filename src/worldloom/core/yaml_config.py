"""Configurations in YAML, read as plain values. An error message gives the line of every mistake.

An unquoted word has the same meaning as in JSON and YAML 1.2. Many programs still use YAML 1.1, so words that YAML 1.1
reads differently (`1:30` as 90, `010` as 8, `yes` as true, dates) are refused.
"""

import math
import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from worldloom.core.config import Config, explain
from worldloom.core.errors import ConfigError
from worldloom.core.files import storage_errors
from worldloom.core.text import comparable, hidden_character

_LARGEST = 2**20  # bytes, far more than a configuration written by hand
_DEEPEST = 64
_DIGITS = 100  # characters of a number
_CONSTANTS = {"": None, "~": None, "null": None, "Null": None, "NULL": None} | {
    word: truth
    for truth, words in ((True, ("true", "True", "TRUE")), (False, ("false", "False", "FALSE")))
    for word in words
}
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*|0x[0-9a-fA-F]+)")
_REAL = re.compile(r"[-+]?(0|[1-9][0-9]*|(?=\.[0-9]))(\.[0-9]*)?([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_LIKE_A_NUMBER = re.compile(r"[-+]?(0o?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?|0b[01_]+)")  # read in different ways

ConfigT = TypeVar("ConfigT", bound=Config)
Place = tuple[int | str, ...]


def read_yaml(path: Path | str, kind: type[ConfigT]) -> ConfigT:
    """Read a configuration from a file; see `parse_yaml`.

    Raises:
        StorageError: the file cannot be read.
        ConfigError: see `parse_yaml`.
    """
    with storage_errors(path), Path(path).open("rb") as file:
        content = file.read(_LARGEST + 1)  # one byte above the limit, so that a larger file is rejected
    return parse_yaml(content, kind, source=str(path))


def parse_yaml(text: str | bytes, kind: type[ConfigT], *, source: str = "the text") -> ConfigT:
    """Build a configuration from YAML; bytes are decoded as UTF-8.

    Only plain values are read. Tags (which can construct objects), anchors (which can expand a small text enormously),
    duplicate keys, control characters and words that versions of YAML read differently are rejected.

    Raises:
        ConfigError: the text is not valid; for each wrong line, the message gives what was expected and found.
    """
    values, lines = _load(text, source)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        said = [f"line {_line(lines, place)}: {what}" for place, what in explain(kind, error)]
        raise ConfigError(f"{source}: {'; '.join(said)}") from None
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _load(text: str | bytes, source: str) -> tuple[dict[str, Any], dict[Place, int]]:
    import yaml

    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(content) > _LARGEST:
        raise ConfigError(f"{source} is larger than {_LARGEST} bytes, the limit for a configuration; shorten the text")
    try:
        text = text if isinstance(text, str) else content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8 text ({error}); save the text as UTF-8") from None
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = event.start_mark.line + 1
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise ConfigError(f"{source}, line {line}: nested too deeply; use at most {_DEEPEST} levels")
            if getattr(event, "anchor", None) or getattr(event, "tag", None):
                raise ConfigError(
                    f"{source}, line {line}: anchors, aliases and tags are not allowed; write the value in full"
                )
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(
            f"{source}{where} is not valid YAML ({getattr(error, 'problem', None) or error}); correct it"
        ) from None
    lines: dict[Place, int] = {(): 1}
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{source}: expected a mapping of keys and values; got {'nothing' if node is None else node.id}. Write one "
            f"'key: value' per line"
        )
    return _values(node, (), lines, source), lines


def _values(node: Any, place: Place, lines: dict[Place, int], source: str) -> Any:
    import yaml

    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*place, index)] = item.start_mark.line + 1
        return [_values(item, (*place, index), lines, source) for index, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        try:
            return _word(node)
        except ValueError as error:
            shown = node.value if len(node.value) <= _DIGITS else f"{node.value[:_DIGITS]}..."
            raise ConfigError(f"{source}, line {node.start_mark.line + 1}: {shown!r} {error}") from None
    found: dict[str, Any] = {}
    seen: set[str] = set()
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{source}, line {line}: a key must be plain text; got a {key.id}. Write a name")
        if comparable(key.value) in seen:
            twice = (
                "appears twice" if key.value in found else f"looks like an earlier key (in ASCII, it is {key.value!a})"
            )
            raise ConfigError(f"{source}, line {line}: the key {key.value!r} {twice}; remove one of the two")
        seen.add(comparable(key.value))
        if (hidden := hidden_character(key.value)) is not None:
            raise ConfigError(f"{source}, line {line}: the key {key.value!r} contains {hidden}; remove this character")
        lines[(*place, key.value)] = line
        found[key.value] = _values(value, (*place, key.value), lines, source)
    return found


def _word(node: Any) -> Any:
    """Return the value of a scalar.

    Raises:
        ValueError: versions of YAML read the word differently, or the number is not finite or has too many digits.
    """
    word: str = node.value
    if node.style is not None:  # in quotes, or a block of text
        if (hidden := hidden_character(word)) is not None:
            raise ValueError(f"contains the character {hidden}; remove it")
        return word
    if word in _CONSTANTS:
        return _CONSTANTS[word]
    if _INFINITE.fullmatch(word):
        raise ValueError("is not a finite number; write a finite number, or put text in quotes")
    if (whole := _WHOLE.fullmatch(word)) or _REAL.fullmatch(word):
        if len(word) > _DIGITS:
            raise ValueError(f"has {len(word)} characters; expected a number of at most {_DIGITS} characters")
        value = int(word, 0) if whole else float(word)
        if not math.isfinite(value):
            raise ValueError("is larger than any number that can be stored; write a finite number")
        return value
    if _LIKE_A_NUMBER.fullmatch(word) or not node.tag.endswith(":str"):
        raise ValueError(
            "means different things in different versions of YAML; write a number in plain decimal digits, a truth "
            "value as true or false, and anything else in quotes"
        )
    if (hidden := hidden_character(word)) is not None:
        raise ValueError(f"contains the character {hidden}; remove it")
    return word


def _line(lines: dict[Place, int], place: Place) -> int:
    """Return the line of a path, or of the longest prefix of the path that is in the text."""
    while place not in lines:
        place = place[:-1]
    return lines[place]
