"""Starting, stopping and refusing."""

import io
import json

import pytest
from rich.console import Console

import worldloom.cli.console as console
from worldloom import __version__, workflow
from worldloom.core.errors import ConfigError, DataError, StorageError, WorldloomError


def test_the_version_and_the_help_name_every_command(worldloom) -> None:
    assert worldloom("--version").out == f"worldloom {__version__}\n"
    text = worldloom("--help").out
    for name in ("demo", "collect", "train", "evaluate", "plan", "data", "runs", "doctor"):
        assert f" {name} " in text
    for code in ("2 usage", "3 data", "8 planning", "130 interrupted"):
        assert code in " ".join(text.split())


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        (4, "no dataset exists at nowhere", ("data", "inspect", "nowhere")),
        (4, "no dataset exists at nowhere", ("data", "validate", "nowhere")),
        (4, "no dataset exists at nowhere", ("data", "preview", "nowhere")),
        (4, "no dataset exists at nowhere; check the path, or collect a dataset", ("train", "nowhere", "--out", "run")),
        (4, "is not a folder", ("runs", "list", "nowhere")),
        (4, "not a run", ("runs", "show", "nowhere")),
        (4, "not a run", ("plan", "nowhere")),
        (2, "did you mean 'two-room'", ("train", "nowhere", "--out", "run", "--recipe", "two-roms")),
        (2, "did you mean 'training'", ("train", "nowhere", "--out", "run", "--set", "trainig.steps=1")),
        (2, "unknown key 'training.stepz'; did you mean 'steps'", ("demo", "--set", "training.stepz=1")),
        (2, "training.steps", ("demo", "--set", "training.steps=many")),
        (2, "has no '='", ("demo", "--set", "training.steps")),
        (2, "did you mean 'directed-walk'", ("collect", "worldloom/Maze-v0", "--out", "d", "--policy", "directd-walk")),
        (2, "--env-arg", ("collect", "worldloom/Maze-v0", "--out", "d", "--env-arg", "size")),
        (6, "TwoRoom", ("collect", "worldloom/TwoRom-v0", "--out", "d")),
        (6, "size", ("collect", "worldloom/TwoRoom-v0", "--out", "d", "--env-arg", "size_of_it=1")),
    ],
)
def test_a_mistake_is_one_message_and_an_exit_code(
    refused, tmp_path, monkeypatch, code: int, message: str, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(code, *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [("bogus",), ("train",), ("runs", "list", "--bogus")])
def test_wrong_usage_is_code_2_on_standard_error(worldloom, arguments) -> None:
    done = worldloom(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "Usage: worldloom" in done.err


@pytest.mark.parametrize("error", [WorldloomError, ConfigError, DataError, StorageError])
def test_each_error_has_its_exit_code_and_debug_its_traceback(refused, monkeypatch, error) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error("expected a [b]this[/b]; got that")

    monkeypatch.setattr(workflow, "collect", fail)
    assert refused(error.exit_code, "demo", "--out", "never") == "error: expected a [b]this[/b]; got that"
    monkeypatch.setattr("sys.argv", ["worldloom", "--debug", "demo", "--out", "never"])
    from worldloom.cli.main import main

    with pytest.raises(error):
        main()


def test_an_interruption_says_that_the_work_is_kept(worldloom, monkeypatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(workflow, "collect", interrupt)
    done = worldloom("demo", "--out", "never")
    assert done.code == 130
    assert "are kept" in done.err
    assert "Traceback" not in done.err


def test_tables_and_lines_show_brackets_as_they_stand(capsys) -> None:
    made = console.table("the [red]run[/]", ["[b]a", "b"], [["[/x]", "[dim]y"]])
    console.answer(False, None, made, f"report: runs/[/a]/{'x' * 200}")
    text = capsys.readouterr().out
    for shown in ("the [red]run[/]", "[b]a", "[/x]", "[dim]y", f"runs/[/a]/{'x' * 200}"):
        assert shown in text


def test_progress_without_a_terminal_is_lines_on_standard_error(capsys, monkeypatch) -> None:
    monkeypatch.setattr(console.LineProgress, "interval", 0.0)
    with console.LineProgress().task("training", 2, "step") as task:
        task.advance(1, loss=0.5)
        task.advance(1, loss=0.25)
    captured = capsys.readouterr()
    first, last = captured.err.splitlines()
    assert captured.out == ""
    assert first.startswith("training: 1/2")
    assert "s left" in first
    assert last.startswith("training: 2/2")
    assert "loss 0.25" in last


def test_work_of_an_earlier_process_does_not_shorten_the_time_left(capsys, monkeypatch) -> None:
    clock = iter([0.0, 0.0, 0.0, 10.0, 10.0, 10.0])
    monkeypatch.setattr(console.time, "perf_counter", lambda: next(clock))
    with console.LineProgress().task("training", 120, "step") as task:
        task.advance(100)
        task.advance(10)
    first, _ = capsys.readouterr().err.splitlines()
    assert first == "training: 110/120  10 s left  1.0 step/s"


def test_a_task_inside_another_shares_its_display(capsys, monkeypatch) -> None:
    with console.LineProgress().task("rounds", 1) as outer:
        with console.LineProgress().task("training", 1) as inner:
            inner.advance()
        outer.advance()
    assert len(capsys.readouterr().err.splitlines()) == 2
    lines = console.LineProgress()
    with lines.task("rounds", 1) as outer:
        with lines.task("training", 1) as inner:
            inner.advance()
        outer.advance()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rounds: 1/1")
    screen = Console(file=io.StringIO(), force_terminal=True, width=100, highlight=False)
    monkeypatch.setattr(console, "err", screen)
    bars = console.BarProgress()
    with bars.task("rounds", 2) as outer:
        for _ in range(2):
            with bars.task("training", 3, "step") as inner:
                inner.advance(3)
            outer.advance()
    assert "2/2" in screen.file.getvalue()
    with bars.task("again", 1) as task:
        task.advance()
    assert "again" in screen.file.getvalue()


def test_the_doctor_reports_in_json_and_in_a_table(worldloom) -> None:
    done = worldloom("doctor", "--json")
    report = json.loads(done.out)
    assert {"python", "packages", "cores", "memory", "disk", "accelerator", "video"} <= set(report)
    assert done.code == (1 if any(check["remedy"] for check in report.values()) else 0)
    shown = worldloom("doctor").out
    assert all(name in shown for name in report)


def test_the_doctor_says_what_to_do(worldloom, monkeypatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2**20})())
    done = worldloom("doctor")
    assert done.code == 1
    assert "free some space" in done.out
