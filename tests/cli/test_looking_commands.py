"""Commands that look at what is there: data, runs, plan, doctor."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from worldloom.training import RunFolder

pytestmark = pytest.mark.slow  # all wait for the demo


def test_data_are_inspected_validated_and_previewed(demo, worldloom, tmp_path) -> None:
    summary = json.loads(worldloom("data", "inspect", demo.data, "--json").out)
    assert (summary["episodes"], summary["frames"]) == (16, 16 * 41)
    assert summary["environment"]["id"] == "worldloom/TwoRoom-v0"
    assert "656" in worldloom("data", "inspect", demo.data).out
    assert json.loads(worldloom("data", "validate", demo.data, "--json").out) == []
    assert "no problem found" in worldloom("data", "validate", demo.data).out
    done = worldloom("data", "preview", demo.data, "--out", str(tmp_path))
    written = [Path(line.removeprefix("wrote ")) for line in done.out.splitlines()]
    answer = json.loads(worldloom("data", "preview", demo.data, "--out", str(tmp_path), "--json").out)
    assert [Path(answer[name]) for name in ("contact_sheet", "video")] == written
    assert [path.name for path in written] == ["data.png", "data.mp4"]
    with Image.open(written[0]) as sheet:
        assert sheet.width > 64
    assert written[1].stat().st_size > 1000


def test_damaged_data_are_found(demo, worldloom, tmp_path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(demo.data, copy)
    (file,) = (copy / "data").iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 64] = bytes(64)
    file.write_bytes(content)
    done = worldloom("data", "validate", str(copy), "--json")
    assert done.code == 3
    problems = json.loads(done.out)
    assert problems
    assert all(problem["where"] and problem["what"] and problem["remedy"] for problem in problems)
    assert worldloom("data", "validate", str(copy)).code == 3


def test_runs_are_listed_and_shown(demo, worldloom) -> None:
    (summary,) = json.loads(worldloom("runs", "list", str(demo.root), "--json").out)
    assert (summary["run"], summary["recipe"], summary["steps"]) == (demo.run, "two-room", 8)
    assert 0 <= summary["success"] <= 1
    assert any(name.startswith(f"success/{summary['evaluation']}/") for name in summary)
    assert "two-room" in worldloom("runs", "list", str(demo.root)).out
    shown = json.loads(worldloom("runs", "show", demo.run, "--json").out)
    assert shown["summary"] == summary
    assert shown["config"]["recipe"]["training"]["steps"] == 8
    assert shown["provenance"]["data"]
    assert "recipe.training.steps" in worldloom("runs", "show", demo.run).out


def test_a_damaged_run_is_named_and_the_others_are_listed(demo, worldloom, tmp_path) -> None:
    for name in ("a", "b", "c", "d"):
        shutil.copytree(demo.run, tmp_path / name)
    (tmp_path / "b" / "config.json").write_text('{"recipe": ')
    (tmp_path / "c" / "config.json").write_text('{"recipe": {}}')
    entries = {
        Path(entry["run"]).name: entry for entry in json.loads(worldloom("runs", "list", str(tmp_path), "--json").out)
    }
    assert [name for name, entry in entries.items() if "recipe" in entry] == ["a", "d"]
    assert "is not valid JSON" in entries["b"]["error"]
    assert str(tmp_path / "c") in entries["c"]["error"]
    text = worldloom("runs", "list", str(tmp_path)).out
    assert "2 runs below" in text
    assert f"{tmp_path / 'b'} is left out" in text


def test_a_training_without_a_recipe_beside_the_runs_is_passed_over(demo, worldloom, refused, tmp_path) -> None:
    RunFolder.create(tmp_path / "bare", {"steps": 3}, {})
    shutil.copytree(demo.run, tmp_path / "run")
    (summary,) = json.loads(worldloom("runs", "list", str(tmp_path), "--json").out)
    assert summary["run"] == str(tmp_path / "run")
    assert "has no recipe" in refused(4, "runs", "show", str(tmp_path / "bare"))
    assert "has no recipe" in refused(4, "train", demo.data, "--out", str(tmp_path / "bare"), "--resume")


def test_a_run_with_a_part_that_is_not_imported_is_still_listed(demo, worldloom, refused, tmp_path) -> None:
    shutil.copytree(demo.run, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["recipe"]["model"]["predictor"] = {"name": "from-elsewhere"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    (summary,) = json.loads(worldloom("runs", "list", str(tmp_path), "--json").out)
    assert summary["recipe"] == "two-room"
    assert "from-elsewhere" in refused(2, "evaluate", str(tmp_path / "run"))


def test_compared_runs_show_what_differs_and_nothing_else(demo, worldloom, refused, tmp_path) -> None:
    other = tmp_path / "other"
    shutil.copytree(demo.run, other)
    config = json.loads((other / "config.json").read_text())
    config["recipe"]["training"]["clip"] = 1.25
    (other / "config.json").write_text(json.dumps(config))
    differing = json.loads(worldloom("runs", "compare", demo.run, str(other), "--json").out)
    assert differing == {"config.recipe.training.clip": [5.0, 1.25], "summary.run": [demo.run, str(other)]}
    shown = worldloom("runs", "compare", demo.run, str(other)).out
    assert "training.clip" in shown.replace("\n", "")
    assert "1.25" in shown
    assert "at least two run folders" in refused(2, "runs", "compare", demo.run)


@pytest.fixture
def picture(tmp_path):
    def write(name: str, *shape: int) -> str:
        pixels = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        return str(tmp_path / name)

    return write


def test_a_plan_is_made_for_a_task_that_the_protocol_draws(demo, worldloom) -> None:
    plan = json.loads(worldloom("plan", demo.run, "--json").out)
    actions = np.array(plan["actions"])
    assert actions.shape[1] == 2
    assert len(actions) % 4 == 0
    assert np.abs(actions).max() <= 1
    assert plan["rollouts"] > 1
    assert plan["milliseconds"] > 0
    assert plan["method"] == "tree search"
    again = json.loads(worldloom("plan", demo.run, "--json").out)
    assert {**again, "milliseconds": 0} == {**plan, "milliseconds": 0}
    other = json.loads(
        worldloom(
            "plan", demo.run, "--json", "--split", "same-room", "--episode", "1", "--method", "CEM, latent L2"
        ).out
    )
    assert other["gap"] != plan["gap"]
    assert other["method"] == "CEM, latent L2"
    assert "predicted_gap" in worldloom("plan", demo.run).out


def test_a_plan_is_made_between_two_pictures(demo, worldloom, picture) -> None:
    start, goal = picture("start.png", 64, 64, 3), picture("with alpha.png", 64, 64, 4)
    apart = json.loads(worldloom("plan", demo.run, "--start", start, "--goal", goal, "--json").out)
    there = json.loads(worldloom("plan", demo.run, "--start", start, "--goal", start, "--json").out)
    assert apart["gap"] > there["gap"] == 0


def test_pictures_that_do_not_fit_are_refused(demo, refused, picture, tmp_path) -> None:
    start = picture("start.png", 64, 64, 3)
    (tmp_path / "cut.png").write_bytes(Path(start).read_bytes()[:3000])
    (tmp_path / "text.png").write_text("no")

    def plan(code: int, goal: str) -> str:
        return refused(code, "plan", demo.run, "--start", start, "--goal", goal)

    wrong = plan(3, picture("small.png", 64, 40, 3))
    assert "(64, 40, 3)" in wrong
    assert "(64, 64, 3)" in wrong
    assert "truncated" in plan(3, str(tmp_path / "cut.png"))
    assert "not a picture" in plan(3, str(tmp_path / "text.png"))
    assert "directory" in plan(4, str(tmp_path))
    assert "does not exist" in plan(4, str(tmp_path / "none.png"))
    assert "both --start and --goal" in refused(2, "plan", demo.run, "--start", start)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "random"), "does not plan"),
        (("--method", "tree serch"), "did you mean 'tree search'"),
        (("--split", "cross-rom"), "did you mean 'cross-room'"),
        (("--protocol", "two-rom@1"), "did you mean 'two-room@1'"),
    ],
)
def test_what_cannot_be_planned_is_said(demo, refused, arguments, message) -> None:
    assert message in refused(2, "plan", demo.run, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "random", "--method", "tree serch"), "did you mean 'tree search'"),
        (("--protocol", "maze-far"), "did you mean 'maze-far@1'"),
        (("--success", "position:3"), "leave out 'success'"),
        (("--env-arg", "size"), "has no '='"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_anything_runs(demo, refused, arguments, message) -> None:
    assert message in refused(2, "evaluate", demo.run, *arguments)


def test_a_file_in_the_place_of_a_folder_is_said(demo, refused, tmp_path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert str(file) in refused(4, "data", "preview", demo.data, "--out", str(file))
    assert str(file) in refused(4, "train", demo.data, "--out", str(file / "run"))
    assert str(file) in refused(4, "data", "inspect", str(file))
    assert str(file) in refused(4, "runs", "list", str(file))


def test_a_world_that_looks_otherwise_is_refused(demo, refused) -> None:
    command = ("evaluate", demo.run, "--env-arg", "size=32", "--method", "tree search", "--episodes", "1")
    message = refused(3, *command)
    assert "(64, 64, 3)" in message
    assert "(32, 32, 3)" in message


def test_one_method_is_evaluated_under_another_protocol(demo, worldloom) -> None:
    command = ("evaluate", demo.run, "--protocol", "maze-far@1", "--method", "random", "--episodes", "1", "--seed", "3")
    results = json.loads(worldloom(*command, "--json").out)
    assert [(row["method"], row["n"]) for row in results["rows"]] == [("random", 1)]
    assert results["protocol"]["seed"] == 3
    shown = json.loads(worldloom("runs", "show", demo.run, "--json").out)["summary"]
    assert not any("maze" in name for name in shown)  # the recipe's own method was not evaluated there
    for folder in (Path(demo.run) / "evaluation").glob("maze-far-custom@1*"):
        shutil.rmtree(folder)
