"""Text of other parties reaches a terminal without control characters."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldloom.core.errors import ConfigError
from worldloom.core.names import path_name
from worldloom.core.text import comparable, one_line, printable

HOSTILE = st.text(alphabet=st.characters(categories=["Cc", "Cf", "Zl", "Zp", "Ll"]), max_size=50)


@given(HOSTILE)
def test_no_control_character_is_left(text: str) -> None:
    left = {each for each in printable(text) if unicodedata.category(each) == "Cc"}
    assert left <= {"\n", "\t"}
    assert not {"\u202e", "\u2066", "\u200b", "\u2028"} & set(printable(text))
    assert "\n" not in one_line(text)
    assert "\t" not in one_line(text)


def test_escapes_show_what_was_there() -> None:
    assert one_line("a\x1b[2J\x1b]0;own\x07\r\nOK\n\u202egnp.exe\x9b") == r"a\x1b[2J\x1b]0;own\x07 OK \u202egnp.exe\x9b"
    assert printable("日\u200c本\t語\n") == "日\u200c本\t語\n"


@pytest.mark.parametrize(
    "other",
    [
        "\u043fit",
        "p\u0456t",
        "\u0440it",
        "p\u200dit",
        "p\u200eit",
        "pit\ufe0f",
        "p\u3164it",
        "\uff50it",
        "pit ",
        "p\u03b9t",
    ],
)
def test_texts_that_look_the_same_compare_as_equal(other: str) -> None:
    assert (comparable(other) == comparable("pit")) == (other != "\u043fit")  # this letter looks like none in Latin


def test_texts_that_look_different_compare_as_different() -> None:
    texts = ["pit", "Pit", "pits", "p it", "p\u00edt", "\u0434\u0430", "\u03bb", "\u65e5\u672c", "pit 1", "pit l"]
    assert len({comparable(text) for text in texts}) == len(texts)
    assert comparable("a  b\u00a0c") == comparable("a b c")


@pytest.mark.parametrize(
    "name",
    ["../evil", "a/b", "a\\b", "", ".", "..", ".hidden", "-o", "~root", " a", "a\n", "a\0", "a\x1b[2J", "x" * 201],
)
def test_a_name_stays_in_its_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be part of a path"):
        path_name(name, "the owner")


@pytest.mark.parametrize("name", ["north", "pit_depth", "Two words", "v1.2", "日本"])
def test_ordinary_names_are_accepted(name: str) -> None:
    assert path_name(name, "the owner") == name
