"""JSON from files and messages, with limits on nesting depth and on the number of digits in a number."""

import json
from typing import Any

_DEEPEST = 64  # levels of nested lists and objects
_DIGITS = 64  # of a whole number, far more than the 39 digits of a 128-bit seed
_FLOAT_DIGITS = 1000  # of any other number


def parse_json(text: str | bytes, *, strict: bool = True) -> Any:
    """Return the value of a JSON text; bytes are decoded as UTF-8.

    If not `strict`, repeated keys are accepted, and so are NaN and infinities, which Python and other libraries write.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, repeats a key in an object, or contains a number that
            has too many digits or is not finite. The message gives the line, except for the nesting.
    """
    content = text.decode("utf-8") if isinstance(text, bytes) else text

    def refused(literal: str, why: str) -> ValueError:
        line = content.count("\n", 0, content.find(literal)) + 1
        shown = literal if len(literal) <= 20 else f"{literal[:20]}..."
        return ValueError(f"line {line}: {shown} {why}")

    def whole(literal: str) -> int:
        if len(literal) > _DIGITS:
            raise refused(literal, f"has {len(literal)} digits; expected at most {_DIGITS}")
        return int(literal)

    def real(literal: str) -> float:
        if len(literal) > _FLOAT_DIGITS:
            raise refused(literal, f"has {len(literal)} digits; expected at most {_FLOAT_DIGITS}")
        value = float(literal)
        if strict and value in (float("inf"), float("-inf")):
            raise refused(literal, "is larger than any number that can be stored; expected a finite number")
        return value

    def constant(literal: str) -> float:
        if strict:
            raise refused(literal, "is not valid JSON; expected a finite number")
        return float(literal)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if strict and len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise refused(json.dumps(twice), "is twice in an object; expected each key once")
        return found

    try:
        value = json.loads(
            content, parse_int=whole, parse_float=real, parse_constant=constant, object_pairs_hook=unique
        )
        _check_depth(value, _DEEPEST)
    except RecursionError:
        raise ValueError(f"it is nested too deeply; expected at most {_DEEPEST} levels") from None
    return value


def _check_depth(value: Any, left: int) -> None:
    if isinstance(value, dict | list):
        if not left:
            raise ValueError(f"it is nested too deeply; expected at most {_DEEPEST} levels")
        for part in value.values() if isinstance(value, dict) else value:
            if isinstance(part, dict | list):
                _check_depth(part, left - 1)
