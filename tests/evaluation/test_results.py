import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldloom.core.errors import ConfigError, StorageError
from worldloom.evaluation import (
    DistanceBins,
    EpisodeResult,
    Latency,
    Protocol,
    Results,
    Row,
    evaluate,
    pool,
    table_rows,
    wilson_interval,
)


@pytest.fixture
def results(protocol: Protocol, agents: dict[str, Any]) -> Results:
    return evaluate(
        protocol,
        {"homing": agents["homing"], "still": agents["still"]},
        model="c0ffee",
        training_seed=3,
        provenance={"commit": "abc", "steps": 10},
    )


def test_results_survive_their_file(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "evaluation" / "results.json"
    results.write(path)
    again = Results.read(path)
    assert again == results
    assert again.to_json() == results.to_json()
    assert again.recordings == ()
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_each_row_can_be_read_alone(results: Results) -> None:
    value = json.loads(json.dumps(results.to_json()))
    assert value["protocol"]["conventions"] == results.protocol.describe()
    row = value["rows"][0]
    assert (row["method"], row["split"], row["protocol"], row["n"], row["successes"]) == (
        "homing", "far", "dots@1", 12, 12,
    )  # fmt: skip
    assert row["interval"] == list(wilson_interval(12, 12))
    assert row["seeds"] == {"evaluation": 0, "training": 3}
    assert row["model"] == "c0ffee"
    assert row["threads"] >= 1
    assert row["latency"]["p95_ms"] >= row["latency"]["p50_ms"]
    assert sum(group["n"] for group in row["by_wall"]) == 12
    assert sum(group["n"] for group in row["by_distance"]["bins"]) == 12


def test_a_write_that_fails_leaves_the_old_file(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    results.write(path)
    before = path.read_bytes()

    def full(self: Path, *_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StorageError, match="disk is full"):
        results.write(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.update(format=2), "format 1"),
        (lambda value: value.update(kind="something"), "kind 'worldloom results'"),
        (lambda value: value["rows"][1].update(successes=12), "the file was changed"),
        (lambda value: value.pop("hardware"), "is damaged: hardware: Field required"),
        (lambda value: value["rows"][0]["episodes"][0].pop("seed"), "is damaged: rows.0.episodes.0.seed"),
        (
            lambda value: value["rows"][0]["episodes"][0].update(success="maybe"),
            "is damaged: .*success",
        ),
        (lambda value: value["protocol"].pop("budget"), "the protocol is damaged"),
    ],
)
def test_a_file_that_is_not_whole_or_was_changed_is_refused(results: Results, change: Any, message: str) -> None:
    value = json.loads(json.dumps(results.to_json()))
    change(value)
    with pytest.raises(StorageError, match=message):
        Results.from_json(value)


def episode(success: bool, steps: int, shortest: float | None, **more: Any) -> EpisodeResult:
    return EpisodeResult(index=0, seed=0, success=success, steps=steps, budget=100, shortest_steps=shortest, **more)


def row(*episodes: EpisodeResult) -> Row:
    return Row(method="m", split="s", episodes=episodes)


def test_path_length_figures_follow_their_definitions() -> None:
    mixed = row(episode(True, 20, 10.0), episode(True, 8, 10.0), episode(False, 100, 10.0), episode(True, 0, 0.0))
    assert mixed.spl == pytest.approx((0.5 + 1.0 + 0.0 + 1.0) / 4)
    assert mixed.steps_over_shortest == pytest.approx((2.0 + 0.8) / 2)
    unknown = row(episode(True, 20, None))
    assert (unknown.spl, unknown.steps_over_shortest) == (None, None)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 100), st.integers(0, 100)), min_size=1, max_size=30))
def test_spl_never_exceeds_the_rate(values: list[tuple[bool, int, int]]) -> None:
    some = row(*(episode(success, steps, float(shortest)) for success, steps, shortest in values))
    assert some.spl is not None
    assert 0 <= some.spl <= some.overall.rate + 1e-12


def test_walls_split_the_rate() -> None:
    split = row(
        episode(True, 1, 1.0, wall_between=True),
        episode(False, 1, 1.0, wall_between=True),
        episode(True, 1, 1.0, wall_between=False),
    )
    assert [(rate.label, rate.successes, rate.n) for rate in split.by_wall] == [
        ("wall between", 1, 2),
        ("no wall between", 1, 1),
    ]
    assert row(episode(True, 1, 1.0)).by_wall == []


@given(st.lists(st.floats(0, 500, allow_nan=False), min_size=1, max_size=120))
def test_distance_bins_hold_each_episode_once(distances: list[float]) -> None:
    episodes = [episode(True, 1, None, start_distance=distance) for distance in distances]
    bins = DistanceBins.of(episodes, "px")
    assert bins is not None
    assert bins.measure == "start-goal distance (px)"
    assert bins.edges[0] <= min(distances)
    assert max(distances) <= bins.edges[-1]
    assert list(bins.edges) == sorted(set(bins.edges))
    assert len(bins.edges) <= 6
    groups = bins.split(episodes)
    assert sum(rate.n for rate, _ in groups) == len(episodes)
    means = [mean for _, mean in groups]
    assert means == sorted(means)


def test_bins_hold_like_counts_prefer_the_shortest_path_and_may_be_missing() -> None:
    skewed = [episode(True, 1, float(steps**2), start_distance=1.0) for steps in range(60)]
    bins = DistanceBins.of(skewed)
    assert bins is not None
    assert bins.measure == "shortest path (steps)"
    assert all(13 <= rate.n <= 17 for rate, _ in bins.split(skewed))
    assert DistanceBins.of([episode(True, 1, None)]) is None
    assert DistanceBins.of([]) is None


def test_latency_is_per_decision_and_environment() -> None:
    latency = Latency.of("act", [0.1, 0.2, 0.3], [10, 10, 5])
    assert latency is not None
    assert latency.mean_ms == pytest.approx(600 / 25)
    assert latency.batch_ms == pytest.approx(200)
    assert latency.p50_ms == pytest.approx(20)
    assert Latency.of("act", [], []) is None


def test_several_models_are_pooled_with_their_range(protocol: Protocol, agents: dict[str, Any]) -> None:
    tight = protocol.model_copy(update={"budget": 8})
    good = evaluate(protocol.model_copy(update={"budget": 8}), {"m": agents["homing"]}, training_seed=0)
    bad = evaluate(tight, {"m": agents["still"]}, training_seed=1)
    pooled = pool([good, bad])
    first = pooled.rows[0]
    counts = [result.row("m", "far").overall for result in (good, bad)]
    assert (first.overall.n, first.overall.successes) == (24, counts[0].successes)
    assert first.overall.interval == wilson_interval(counts[0].successes, 24)
    assert first.range == (0.0, counts[0].rate)
    assert pooled.training_seeds == (0, 1)
    value = json.loads(json.dumps(pooled.to_json()))
    assert value["rows"][0]["rates"] == [counts[0].rate, 0.0]
    assert "independent" in value["interval_meaning"]
    assert f"models 0.0 to {100 * counts[0].rate:.1f}" in table_rows(pooled)[1][1]


def test_other_protocols_and_methods_are_not_pooled(
    results: Results, protocol: Protocol, agents: dict[str, Any]
) -> None:
    other = evaluate(protocol.customise(budget=9), {"homing": agents["homing"], "still": agents["still"]})
    with pytest.raises(ConfigError, match="under one protocol"):
        pool([results, other])
    with pytest.raises(ConfigError, match="cannot pool '"):
        pool([results, evaluate(protocol, {"homing": agents["homing"]})])
    with pytest.raises(ConfigError, match="at least one"):
        pool([])


def test_the_table_has_a_row_for_each_method_and_a_column_for_each_split(results: Results) -> None:
    header, *rows = table_rows(results)
    assert header[:3] == ["method", "far (n=12)", "near (n=7)"]
    assert [cells[0] for cells in rows] == ["homing", "still"]
    assert rows[0][1] == "100.0% [75.8, 100.0]"
    assert rows[1][1] == "0.0% [0.0, 24.2]"
    assert all(len(cells) == len(header) for cells in rows)


def test_a_floor_is_taken_off_in_every_table(protocol: Protocol, agents: dict[str, Any]) -> None:
    results = evaluate(protocol.customise(budget=6), {"random": agents["still"], "homing": agents["homing"]})
    header, random, homing = table_rows(results)
    assert header[3] == "above the floor"
    assert random[3].split(" / ")[0] == "0.0%"
    rate = results.row("homing", "far").overall
    assert homing[3].split(" / ")[0] == f"{rate.rate:.1%}"  # the floor is 0
    value = results.to_json()["rows"][1]
    assert (value["method"], value["floor"]) == ("homing", 0.0)
    assert value["above_floor"]["rate"] == pytest.approx(rate.rate)
    pooled = pool([results, results]).to_json()["rows"][1]
    assert pooled["above_floor"]["rate"] == pytest.approx(rate.rate)
    assert pooled["above_floor"]["interval"][0] > value["above_floor"]["interval"][0]
    assert "above the floor" not in table_rows(evaluate(protocol, {"homing": agents["homing"]}))[0]


def test_equal_pairs_have_equal_digests(protocol: Protocol, agents: dict[str, Any]) -> None:
    def pairs(some: Protocol) -> set[str]:
        return {row["pairs"] for row in evaluate(some, agents, record=0).to_json()["rows"] if row["split"] == "far"}

    first = pairs(protocol)
    assert len(first) == 1
    assert pairs(protocol.customise(budget=3).model_copy(update={"pairs_of": "dots"})) == first
    assert pairs(protocol.customise(seed=1)) != first
