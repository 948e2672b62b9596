"""Text from other parties: what a terminal must not receive, and how such text is shown."""

import re
import unicodedata

# Control characters, and characters that are invisible or that reorder the text around them. Joiners (U+200C, U+200D)
# and direction marks (U+200E, U+200F) are ordinary in several scripts.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e0fff]"
)

# Cyrillic, Greek, Armenian and other letters that look like a Latin letter in most fonts, and these Latin letters.
_LOOKS_LATIN = str.maketrans(
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0455\u0456\u0458\u0501\u04bb\u051b\u051d\u04cf"
    "\u0410\u0412\u0415\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0423\u0425\u0405\u0406\u0408"
    "\u03b1\u03b3\u03b9\u03bd\u03bf\u03c1\u03c5"
    "\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7"
    "\u0570\u0578\u057d\u0581\u0585\u0131\u0251\u0261",
    "aeopcyxsijdhqwlABEKMHOPCTYXSIJayivopuABEZHIKMNOPTYXhnugoiag",
)

# Characters that are not shown, beyond those in `_HIDDEN`: joiners, direction marks, fillers and variation selectors.
_NOT_SHOWN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\ufe00-\ufe0f]")

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
    """Return the form in which two texts that a person can hardly tell apart compare as equal.

    This is Unicode NFKC without characters that are not shown and repeated blanks, and with Latin letters in place of
    the most common letters of other scripts that look like them.
    """
    shown = _NOT_SHOWN.sub("", unicodedata.normalize("NFKC", text))
    return " ".join(shown.translate(_LOOKS_LATIN).split())


def _escaped(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape", "surrogatepass").decode("ascii")
