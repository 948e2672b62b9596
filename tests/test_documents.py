"""The documents agree with the code."""

import re
import runpy
from pathlib import Path

import pytest

import worldloom.recipes
from worldloom.recipes import Recipe, load_recipe

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


TINY = [
    "collection.episodes=12",
    "collection.steps=40",
    "training.steps=8",
    "training.validation_windows=16",
    "inverse.steps=4",
    "distance.steps=4",
    "reactive.steps=4",
    "reactive.problems=32",
    'goal_inverse={"steps": 4}',
    "cloning.steps=4",
    'methods={"tree search": {"name": "plan", "solver": {"name": "random-shooting", "samples": 4}, "horizon": 2}}',
]


@pytest.mark.slow
def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(example.strip().splitlines()) <= 15

    def tiny(name: str) -> Recipe:
        return load_recipe(name).override(TINY)

    monkeypatch.setattr(worldloom.recipes, "load_recipe", tiny)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), scope)
    assert Path(str(scope["wl"].report_path(scope["run"], scope["results"]))).is_file()  # type: ignore[attr-defined]
