"""The documents agree with the code."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_command_reference_is_up_to_date() -> None:
    rendered = runpy.run_path(str(ROOT / "scripts" / "cli_reference.py"))["render"]()
    assert rendered == (ROOT / "docs" / "cli.md").read_text(), "run python scripts/cli_reference.py"


@pytest.mark.parametrize("document", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md")), ids=str)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_rooms_of_the_architecture_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"^  (\w+)/ ", text, re.M))
    there = {path.name for path in (ROOT / "src" / "worldloom").iterdir() if (path / "__init__.py").exists()}
    assert named == there
