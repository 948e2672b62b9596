"""Writes the descriptions of the named protocols into docs/protocols.md: python scripts/protocol_reference.py"""

import re
from pathlib import Path

from worldloom.evaluation import FIELD, LOGS, PROTOCOLS, RULES, field_title

PATH = Path(__file__).parent.parent / "docs" / "protocols.md"
BEGIN, END = "## Named protocols\n", "## `results.json`\n"
FAMILIES = """## The field's protocols

[The field's table](field.md) explains the three rules. OFFSET is the number of steps from start to goal; the budget
follows from it. All of these protocols share:
"""


def render(text: str) -> str:
    """Return the text of docs/protocols.md with current descriptions."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    families = [Family(world, log) for world, log in LOGS]
    alone = [title for title in PROTOCOLS if not any(title in family.titles for family in families)]
    sections = [
        "\n".join([f"### `{title}`\n", *(f"- {line}" for line in PROTOCOLS[title].describe())]) for title in alone
    ]
    shared = [part for part in families[0].common if all(part in family.common for family in families)]
    sections.append("\n".join([FAMILIES, *bullets(shared)]))
    sections += [family.section(shared) for family in families]
    return before + "\n".join([BEGIN, *(f"{section}\n" for section in sections), END]) + after


class Family:
    """The protocols of a world of the field's tables for one kind of log, which share most of their conventions."""

    def __init__(self, world: str, log: str) -> None:
        self.offsets = FIELD[world].offsets
        self.rules = [rule for rule in RULES if field_title(world, log, self.offsets[0], rule) in PROTOCOLS]
        self.title = field_title(world, log, self.offsets[0], "historical").replace(f"-{self.offsets[0]}@", "-OFFSET@")
        self.table = {offset: [field_title(world, log, offset, rule) for rule in self.rules] for offset in self.offsets}
        self.titles = [title for row in self.table.values() for title in row]
        self.common = [part for part in conventions(self.titles[0]) if all(part in conventions(t) for t in self.titles)]

    def section(self, shared: list[tuple[str, str]]) -> str:
        """Return the conventions beside the `shared` ones, what each rule adds, and a table of digests."""
        lines = [f"### `{self.title}`\n", *bullets([part for part in self.common if part not in shared])]
        for index, rule in enumerate(self.rules):
            titles = [row[index] for row in self.table.values()]
            first, *others = (conventions(title) for title in titles)
            assert all(other == first for other in others), f"{titles} differ in more than offset and budget"
            if own := [part for part in first if part not in self.common]:
                lines += ["", f"Rule *{rule}*:\n", *bullets(own)]
        header = ["OFFSET", "budget", *(f"digest of `{title}`" for title in self.headings())]
        lines += ["", *(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header)))]
        for offset, titles in self.table.items():
            digests = [PROTOCOLS[title].fingerprint for title in titles]
            lines.append(f"| {' | '.join([str(offset), str(PROTOCOLS[titles[0]].budget), *digests])} |")
        return "\n".join(lines)

    def headings(self) -> list[str]:
        """Return the titles of the rules' protocols with OFFSET in place of the number."""
        offset, titles = next(iter(self.table.items()))
        return [re.sub(rf"-{offset}([-@])", r"-OFFSET\1", title) for title in titles]


def conventions(title: str) -> list[tuple[str, str]]:
    """Return each sentence of a protocol's conventions under its label, in words that do not depend on the offset.

    Title and digest are left out.
    """
    protocol = PROTOCOLS[title]
    (split,) = protocol.splits.values()
    parts = []
    for line in protocol.describe()[1:]:
        line = line.replace(f"{split.goal_offset} steps", "OFFSET steps").replace(f"-{split.goal_offset}@", "-OFFSET@")
        label, text = line.replace(f"Budget: {protocol.budget} ", "Budget: see the table, in ").split(": ", 1)
        parts += [(label, sentence) for sentence in re.split(r"(?<=\.) (?=[A-Z])", text)]
    return parts


def bullets(parts: list[tuple[str, str]]) -> list[str]:
    """Return one line for each label, with its sentences."""
    labels = dict.fromkeys(label for label, _ in parts)
    return [f"- {label}: {' '.join(text for of, text in parts if of == label)}" for label in labels]


if __name__ == "__main__":
    PATH.write_text(render(PATH.read_text(encoding="utf-8")), encoding="utf-8")
