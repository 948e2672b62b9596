"""`worldloom memory`, over a memory of the demo's logs."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from worldloom.data import EpisodeDataset
from worldloom.memory import EpisodicMemory


@pytest.fixture(scope="module")
def remembered(demo, tmp_path_factory) -> str:
    from worldloom.workflow import Run, remember

    path = tmp_path_factory.mktemp("memory") / "m"
    run = Run.open(demo.run)
    with EpisodicMemory.create(path, spec=run.model.spec) as memory:
        remember(run, demo.data, memory)
    return str(path)


def test_logs_are_remembered_and_said(demo, worldloom, tmp_path) -> None:
    path = tmp_path / "m"
    dataset = EpisodeDataset.open(demo.data)
    block = json.loads((Path(demo.run) / "model" / "model.json").read_text())["metadata"]["config"]["block"]
    expected = int((dataset.lengths // block + 1).sum())
    assert f"{expected:,} memories appended" in worldloom("memory", "remember", str(path), demo.run, demo.data).out
    again = json.loads(worldloom("memory", "remember", str(path), demo.run, demo.data, "--json").out)
    assert again == {"memory": str(path), "appended": expected, "memories": 2 * expected}
    summary = json.loads(worldloom("memory", "inspect", str(path), "--json").out)
    assert (summary["memories"], summary["stretches"]) == (2 * expected, 2 * len(dataset))


def test_a_picture_is_recalled_and_drawn(demo, worldloom, remembered, tmp_path) -> None:
    frame = EpisodeDataset.open(demo.data).episode(3).pixels[0]
    picture, sheet = tmp_path / "start.png", tmp_path / "sheet.png"
    Image.fromarray(frame).save(picture)
    command = ("memory", "recall", remembered, "--image", str(picture), "--run", demo.run, "-k", "3", "--json")
    rows = json.loads(worldloom(*command, "--out", str(sheet)).out)
    assert len(rows) == 3
    assert (rows[0]["episode"], rows[0]["step"]) == (3, 0)
    assert rows[0]["distance"] == pytest.approx(0, abs=1e-3)
    with Image.open(sheet) as drawn:
        assert drawn.width > 3 * 100
    again = json.loads(worldloom("memory", "recall", remembered, "--id", str(rows[0]["id"]), "--json").out)
    assert again[0]["id"] == rows[0]["id"]


def test_the_newest_and_only_what_is_meant_are_shown(worldloom, remembered) -> None:
    rows = json.loads(worldloom("memory", "recall", remembered, "--episode", "2", "-k", "2", "--json").out)
    assert [row["episode"] for row in rows] == [2, 2]
    assert json.loads(worldloom("memory", "recall", remembered, "--until", "1d", "--json").out) == []
    assert len(json.loads(worldloom("memory", "recall", remembered, "--since", "2020-01-01", "--json").out)) == 6


def test_a_memory_is_exported(worldloom, remembered, tmp_path) -> None:
    assert "wrote" in worldloom("memory", "export", remembered, str(tmp_path / "m.parquet")).out
    answer = json.loads(worldloom("memory", "export", remembered, str(tmp_path / "m.jsonl"), "--json").out)
    table = pq.read_table(tmp_path / "m.parquet")
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert table["id"].to_pylist() == [line["id"] for line in lines]
    assert answer == {"path": str(tmp_path / "m.jsonl"), "memories": len(lines)}
    assert table["latent"][0].as_py() == lines[0]["latent"]
    assert table["image"][0].as_py().startswith(b"\x89PNG")


def test_what_cannot_be_done_is_said(demo, refused, remembered, tmp_path) -> None:
    assert "there is no memory" in refused(4, "memory", "inspect", str(tmp_path / "none"))
    assert ".parquet or .jsonl" in refused(2, "memory", "export", remembered, str(tmp_path / "m.csv"))
    assert "expected --since as a time" in refused(2, "memory", "recall", remembered, "--since", "yesterday")
    assert "no memory with id 999999" in refused(3, "memory", "recall", remembered, "--id", "999999")
    assert "--image together with --run" in refused(2, "memory", "recall", remembered, "--image", "a.png")


def test_pruning_and_encoding_anew_keep_the_memory_whole(demo, worldloom, tmp_path) -> None:
    path = str(tmp_path / "m")
    worldloom("memory", "remember", path, demo.run, demo.data)
    report = json.loads(worldloom("memory", "prune", path, "--keep", "20", "--json").out)
    assert report["kept"] == 20
    with EpisodicMemory.open(path, spec=None) as memory:
        before = memory.read()
    assert "20 memories" in worldloom("memory", "reencode", path, demo.run).out
    assert json.loads(worldloom("memory", "reencode", path, demo.run, "--json").out)["memories"] == 20
    assert "nothing to do" in worldloom("memory", "migrate", path).out
    assert len(json.loads(worldloom("memory", "migrate", path, "--json").out)["versions"]) == 1
    with EpisodicMemory.open(path, spec=None) as memory:
        after = memory.read()
    assert after.ids.tolist() == before.ids.tolist()
    assert abs(after.latents - before.latents).max() < 1e-4
