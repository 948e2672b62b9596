import json
import sys
from pathlib import Path

import pytest
from format_samples import make_store

from worldloom.cli.main import main
from worldloom.data import EpisodeDataset
from worldloom.formats import FORMATS


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["worldloom", "data", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_there_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ours = make_store(tmp_path / "ours")
    assert run(monkeypatch, "convert", tmp_path / "ours", tmp_path / "there", "--to", "folder", "--fps", 25) == 0
    said = capsys.readouterr()
    assert "4 episodes, 24 frames" in said.out
    assert "H.264" in said.out
    assert "convert: 4/4" in said.err
    back = ["convert", tmp_path / "there", tmp_path / "back", "--size", "8x12", "--rate", "12.5", "--json"]
    assert run(monkeypatch, *back) == 0
    report = json.loads(capsys.readouterr().out)
    dataset = EpisodeDataset.open(tmp_path / "back")
    assert dataset.spec.observation.pixels == (8, 12, 3)
    assert dataset.lengths.tolist() == [length // 2 for length in ours.lengths if length > 1]
    assert report["episodes"] == len(dataset) == 3
    assert [note["episode"] for note in report["notes"] if note["kind"] == "skipped"] == [1]


def test_mistakes_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_store(tmp_path / "ours")
    for arguments, code, message in (
        (["--size", "8"], 2, "size"),
        (["--size", "8xA"], 2, "size"),
        (["--gap", "0.5"], 2, "gap"),
        (["--actions", "sum"], 2, "actions"),
        (["--to", "folders"], 2, "did you mean 'folder'"),
        (["--from", "swm-hdf5"], 3, "expected one"),
        (["--columns", "action"], 2, "--columns 'action' has no '='"),
        (["--columns", "action=x"], 2, "the option 'columns' is not supported here"),
    ):
        assert run(monkeypatch, "convert", tmp_path / "ours", tmp_path / "t", *arguments) == code
        assert message in capsys.readouterr().err
    assert run(monkeypatch, "convert", tmp_path / "nothing", tmp_path / "t") == 4
    assert not (tmp_path / "t").exists()


def test_the_formats_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "formats", "--json") == 0
    listed = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert sorted(listed) == list(FORMATS)
    assert listed["folder"]["lossless_pixels"] is False
    assert run(monkeypatch, "formats") == 0
    table = capsys.readouterr().out
    assert all(name in table for name in FORMATS)
