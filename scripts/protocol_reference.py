"""Writes the descriptions of the named protocols into docs/protocols.md: python scripts/protocol_reference.py"""

from pathlib import Path

from worldloom.evaluation import PROTOCOLS

PATH = Path(__file__).parent.parent / "docs" / "protocols.md"
BEGIN, END = "## Named protocols\n", "## `results.json`\n"


def main() -> None:
    text = PATH.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    sections = [
        "\n".join([f"### `{title}`\n", *(f"- {line}" for line in PROTOCOLS[title].describe())]) for title in PROTOCOLS
    ]
    PATH.write_text(
        before + "\n".join([BEGIN, *(f"{section}\n" for section in sections), END]) + after, encoding="utf-8"
    )


if __name__ == "__main__":
    main()
