import json
import multiprocessing
import os
from pathlib import Path

import pytest

from worldloom.core.errors import StorageError, TrainingError
from worldloom.training import RunFolder, describe_provenance, git_commit


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", {"steps": 3}, {"seeds": {"training": 0}})


def test_a_folder_gives_back_what_it_was_made_with(run) -> None:
    again = RunFolder.open(run.path)
    assert again.config == {"steps": 3}
    assert again.provenance == {"seeds": {"training": 0}}
    assert again.metrics() == []
    assert again.diagnostics() == {}


def test_a_run_is_not_written_over_and_not_found_where_none_is(run, tmp_path) -> None:
    with pytest.raises(StorageError, match="already contains a run; resume it"):
        RunFolder.create(run.path, {}, {})
    with pytest.raises(StorageError, match="is not a run"):
        RunFolder.open(tmp_path)


def test_metrics_are_whole_lines_of_strict_json(run) -> None:
    run.log(1, {"loss": 2.0, "broken": float("nan")})
    run.log(2, {"loss": 1.0})
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    run.close()


def test_a_line_cut_off_by_a_crash_is_not_read_and_does_not_spoil_the_next(run) -> None:
    run.log(1, {"loss": 2.0})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert run.metrics() == [{"step": 1, "loss": 2.0}]
    run.forget_after(1)
    run.log(2, {"loss": 1.0})
    assert run.metrics() == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    run.close()


def test_a_damaged_line_is_named(run) -> None:
    run.log(1, {"loss": 1.0})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step\n')
    with pytest.raises(StorageError, match=r"line 2 of .*metrics.jsonl is not valid JSON.*delete the line"):
        run.metrics()


def test_a_line_of_any_length_is_not_read_whole(run) -> None:
    run.log(1, {"loss": 1.0})
    os.truncate(run.path / "metrics.jsonl", 2**27)
    with pytest.raises(StorageError, match=r"line 2 of .*metrics.jsonl is longer than"):
        run.metrics()


def test_a_folder_in_which_nothing_was_trained_can_be_had_by_another(run) -> None:
    run.withdraw()
    again = RunFolder.create(run.path, {}, {})
    again.log(1, {"loss": 1.0})
    again.withdraw()
    with pytest.raises(StorageError, match="already contains a run"):
        RunFolder.create(run.path, {}, {})


def test_resuming_forgets_what_came_after(run) -> None:
    for step in range(1, 6):
        run.log(step, {"loss": float(step)})
    run.forget_after(3)
    assert [line["step"] for line in run.metrics()] == [1, 2, 3]
    run.close()


def test_tensorboard_holds_the_same_figures(run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run.log(1, {"loss/prediction": 2.0})
    run.log(5, {"loss/prediction": 1.0})
    run.close()
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/prediction")] == [(1, 2.0), (5, 1.0)]


def hold(path: Path, held: "multiprocessing.synchronize.Event") -> None:
    with RunFolder.open(path).lock():
        held.set()
        held.wait()
        multiprocessing.Event().wait(60)


def test_two_trainings_cannot_have_one_folder_and_a_killed_one_gives_it_back(run) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=hold, args=(run.path, held))
    process.start()
    assert held.wait(120)
    with pytest.raises(TrainingError, match="another process is training"), run.lock():
        pass
    process.kill()
    process.join()
    with run.lock():
        pass


def test_only_the_first_rank_writes(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    run = RunFolder.create(tmp_path / "run", {}, {})
    with run.lock():
        run.log(1, {"loss": 1.0})
        run.write_diagnostics({})
    assert not (tmp_path / "run").exists()


def test_provenance_says_what_is_needed_to_repeat_a_run(tmp_path) -> None:
    provenance = describe_provenance(data_fingerprint="abc", seeds={"training": 3})
    assert provenance["data"] == "abc"
    assert provenance["seeds"] == {"training": 3}
    assert provenance["versions"]["torch"]
    assert provenance["hardware"]["threads"] >= 1
    json.dumps(provenance, allow_nan=False)
    assert git_commit(tmp_path) is None


def test_figures_that_are_not_finite_are_read_back(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {}, {})
    run.write_diagnostics({"step": 4, "figures": {"open_loop": None, "effective_rank": 2.0}, "alarms": []})
    assert run.diagnostics()["figures"] == {"open_loop": None, "effective_rank": 2.0}
