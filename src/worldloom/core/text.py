"""Text from other parties: what a terminal must not receive, and how such text is shown."""

import re
import unicodedata

# Control characters, and characters that are invisible or that reorder the text around them. Joiners (U+200C, U+200D)
# and direction marks (U+200E, U+200F) are ordinary in several scripts.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e0fff]"
)

# The characters that begin Markdown syntax within a line, the colon of a URL, and the dot of `www.`.
_MARKDOWN = re.compile(r"[\\`*_\[\]<>|~&$#@{}]|:(?=\S)|(?<=www)\.", re.IGNORECASE)


def hidden_character(text: str) -> str | None:
    """Return the first control or invisible character of a text as an escape such as `\\x1b`, or None."""
    found = _HIDDEN.search(text)
    return None if found is None else _escaped(found)


def printable(text: str) -> str:
    """Return the text with control and invisible characters as escapes such as `\\x1b`; line breaks and tabs remain.

    A terminal obeys control characters: they can erase what was printed, or change the title of the window.
    """
    return _HIDDEN.sub(_escaped, text)


def one_line(text: str) -> str:
    """Return the text as `printable` does, but on one line, so that it cannot pass for another line of output."""
    return printable(re.sub(r"\s*[\n\r\u2028\u2029]\s*", " ", text.strip()).replace("\t", " "))


def markdown(text: str) -> str:
    """Return the text on one line, with escapes so that Markdown shows it as it is: no links, pictures or HTML."""
    return _MARKDOWN.sub(lambda found: "&lt;" if found.group() == "<" else f"\\{found.group()}", one_line(text))


def comparable(text: str) -> str:
    """Return the Unicode NFKC form of a text, in which different encodings of the same characters are equal."""
    return unicodedata.normalize("NFKC", text)


def _escaped(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape", "surrogatepass").decode("ascii")
