"""JSON has limits, and each refusal names the line."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldloom.core.json_text import parse_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(VALUES)
def test_plain_values_are_read_as_they_were_written(value: object) -> None:
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n"b": ' + "9" * 5000 + "}", r"line 2: 9{20}\.\.\. has 5000 digits"),
        ('{"a":\n1.' + "0" * 5000 + "}", r"line 2: .* has 5002 digits"),
        ('{"a": 1,\n"b": {"c": 1, "c": 2}}', r'line 2: "c" is twice in an object'),
        ("[1,\n1e999]", r"line 2: 1e999 is larger than any number"),
        ("[\n\nNaN]", r"line 3: NaN is not valid JSON"),
        ("[" * 65 + "]" * 65, "nested too deeply"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a": 1,\n}', "line 2 column 1"),
        (b"\xff\xfe", "utf-8"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_line(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_foreign_files_may_contain_numbers_that_are_not_finite() -> None:
    assert parse_json("[Infinity, 1e999]", strict=False) == [float("inf")] * 2


@given(st.binary(max_size=200) | st.text(alphabet='[]{}",:0123456789.eE-+tfn\\u ', max_size=200))
def test_any_text_is_read_or_refused(text: str | bytes) -> None:
    with contextlib.suppress(ValueError):
        parse_json(text)
