import json
import shutil
from pathlib import Path

import pytest

from worldloom.workflow import jobs as workflow


@pytest.mark.slow
def test_the_demo_goes_from_aimless_motion_to_a_table_and_a_report(demo) -> None:
    assert demo.done.code == 0, demo.done.err
    for method in ("random", "behaviour cloning", "reactive policy", "tree search"):
        assert f"│ {method} " in demo.done.out
    assert "cross-room (n=2)" in demo.done.out
    assert "zero-shot success" in demo.done.out
    assert "training: 8/8" in demo.done.err
    # The path is printed whole, to be copied.
    (report,) = [line.removeprefix("report: ") for line in demo.done.out.splitlines() if line.startswith("report: ")]
    assert Path(report).is_relative_to(demo.root)
    assert "<html" in Path(report).read_text()
    rows = json.loads(Path(report).with_name("results.json").read_text())["rows"]
    assert {(row["split"], row["n"]) for row in rows} == {("cross-room", 2), ("same-room", 2)}


def kept(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for part in ("data", "run/model", "run/heads", "run/checkpoints")
        for path in sorted((root / part).rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
def test_a_second_demo_takes_up_what_is_there(demo, demo_command, worldloom, monkeypatch, tmp_path) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise AssertionError("it was made anew")

    for name in ("fit", "measure_geometry", "fit_distance", "fit_reactive", "fit_behaviour_cloning"):
        monkeypatch.setattr(workflow, name, broken)
    root = tmp_path / "moved"
    shutil.copytree(demo.root, root)
    before = kept(root)
    methods = 'methods={"random": {"name": "random"}, "tree search": {"name": "plan", "horizon": 2}}'
    done = worldloom(*demo_command(root), "--set", methods, "--json")
    assert done.code == 0, done.err
    assert {row["method"] for row in json.loads(done.out)["rows"]} == {"random", "tree search"}
    assert kept(root) == before


@pytest.mark.slow
def test_another_seed_is_refused_and_a_fresh_demo_begins_anew(demo, demo_command, refused, tmp_path) -> None:
    assert "seed" in refused(3, *demo_command(demo.root), "--seed", "1")
    (tmp_path / "old" / "data").mkdir(parents=True)
    (tmp_path / "old" / "data" / "left over").write_text("")
    refused(2, *demo_command(tmp_path / "old"), "--fresh", "--set", "collection.policy=none")
    assert not (tmp_path / "old" / "data" / "left over").exists()


def test_a_recipe_without_a_world_cannot_be_demonstrated(refused, tmp_path) -> None:
    assert "'generic' has no environment" in refused(2, "demo", "--recipe", "generic", "--out", str(tmp_path / "demo"))
