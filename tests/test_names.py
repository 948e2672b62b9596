"""One name, one thing: no two classes and no two files of the library share a name."""

import ast
from collections import defaultdict
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "worldloom"


def repeated(names: list[tuple[str, str]]) -> dict[str, list[str]]:
    places = defaultdict(list)
    for name, place in names:
        places[name].append(place)
    return {name: found for name, found in places.items() if len(found) > 1}


def test_no_two_classes_share_a_name() -> None:
    classes = [
        (node.name, str(path.relative_to(SOURCE)))
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    assert len(classes) > 300
    assert repeated(classes) == {}


def test_no_two_files_share_a_name() -> None:
    # cli/ has a file for each command, by the command's name; __init__ is each package's face.
    files = [path for path in SOURCE.rglob("*.py") if path.stem != "__init__" and path.parent.name != "cli"]
    assert repeated([(path.stem, str(path.relative_to(SOURCE))) for path in files]) == {}
