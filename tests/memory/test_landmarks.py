"""The landmark graph: what it covers, the ways it knows, what it stops believing, and what it keeps on disk."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from worldloom.core.errors import CheckpointError, ConfigError, PlanningError
from worldloom.memory import LandmarkConfig, LandmarkGraph
from worldloom.models import load_tensors, save_tensors
from worldloom.testing import LinearWorld

SPEC = LinearWorld().spec


def graph_of(*, reversible: bool = False, **config: float) -> LandmarkGraph:
    return LandmarkGraph(SPEC, LandmarkConfig.parse(config), step_length=0.5, reversible=reversible)


def line_of(points: int, *, reversible: bool = False, **config: float) -> LandmarkGraph:
    """Landmarks at 0, 1, 2, ... along the first axis, seen one after another; a step is 0.5."""
    graph = graph_of(reversible=reversible, **config)
    places = torch.stack([torch.arange(points, dtype=torch.float32), torch.zeros(points)], dim=1)
    graph.learn(places, np.zeros(points, np.int64), np.arange(points))
    return graph


@given(seed=st.integers(0, 2**32), count=st.integers(1, 60), batch=st.integers(1, 7))
def test_landmarks_cover_all_that_was_seen_and_keep_their_distance(seed: int, count: int, batch: int) -> None:
    graph = graph_of()
    seen = 3 * torch.rand(count, 2, generator=torch.Generator().manual_seed(seed))
    for some in seen.split(batch):
        landmarks = graph.add(some)
        away = (graph.latents[torch.from_numpy(landmarks)] - some).norm(dim=1) / graph.step_length
        assert (away <= graph.config.spacing + 1e-4).all()
    gaps = torch.cdist(graph.latents, graph.latents) / graph.step_length + 100 * torch.eye(len(graph))
    assert gaps.min() > graph.config.spacing - 1e-4
    assert graph.visits.sum() == count


def test_a_way_is_the_cheapest_over_what_was_experienced() -> None:
    graph = line_of(6)
    route = graph.route(torch.tensor([5.0, 0.0]))
    assert route is not None
    assert route.blocks.tolist() == [5, 4, 3, 2, 1, 0]
    assert route.hop.tolist() == [1, 2, 3, 4, 5, -1]
    assert route.ahead(1, 2) == 3
    assert route.ahead(3, 9) == 5
    shortcut = graph.add(torch.tensor([[5.0, 0.0]]), np.array([0]))
    assert shortcut.tolist() == [5]
    again = graph.route(torch.tensor([5.0, 0.0]))
    assert again is not None
    assert again.blocks[0] == 1


def test_one_does_not_go_back_where_steps_cannot_be_undone() -> None:
    there = line_of(4).route(torch.tensor([0.0, 0.0]))
    back = line_of(4, reversible=True).route(torch.tensor([0.0, 0.0]))
    assert there is not None
    assert back is not None
    assert not there.knows(3)
    assert back.blocks.tolist() == [0, 1, 2, 3]
    assert not back.knows(4)  # a landmark that came later


def test_a_goal_far_from_all_landmarks_has_no_way() -> None:
    assert graph_of().route(torch.zeros(2)) is None
    assert line_of(3).route(torch.tensor([0.0, 9.0])) is None
    assert line_of(3).route(torch.tensor([0.0, 0.9])) is not None


def test_what_pruning_left_out_of_a_line_costs_as_many_blocks_as_it_took() -> None:
    graph = graph_of()
    places = torch.tensor([[0.0, 0.0], [1.0, 0.0], [9.0, 0.0], [50.0, 0.0]])
    graph.learn(places, np.array([0, 0, 0, 1]), np.array([0, 1, 5, 6]))
    route = graph.route(torch.tensor([9.0, 0.0]))
    assert route is not None
    blocks = dict(zip(graph.latents[:, 0].tolist(), route.blocks.tolist(), strict=True))
    assert blocks == {0: 5, 1: 4, 9: 0, 50: np.inf}  # another line is not joined


def test_learning_from_a_record_is_seeing_it_line_by_line() -> None:
    generator = torch.Generator().manual_seed(0)
    lines = torch.randn(5, 30, 2, generator=generator).cumsum(1) * 0.4
    at_once, one_by_one = graph_of(reversible=True), graph_of(reversible=True)
    shuffled = torch.randperm(150, generator=generator)
    number, step = torch.arange(5).repeat_interleave(30), torch.arange(30).repeat(5)
    at_once.learn(lines.flatten(0, 1)[shuffled], number[shuffled].numpy(), step[shuffled].numpy())
    before = None
    for now in lines.unbind(1):
        before = one_by_one.add(now, before)
    assert torch.equal(at_once.latents, one_by_one.latents)
    assert np.array_equal(at_once.edges, one_by_one.edges)


def test_prediction_joins_only_what_the_check_believes_and_is_dropped_by_one_failure() -> None:
    graph = graph_of(link=4.0)
    graph.add(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]))
    asked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def check(sources: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append((sources, targets))
        return torch.full((len(sources),), 2.0), targets[:, 1] == 0

    assert graph.link(check, range(3), among=True) == 4
    assert len(asked[0][0]) == 6
    assert graph.link(check) == 0
    assert sorted(graph.edges.tolist()) == [[0, 1], [1, 0], [2, 0], [2, 1]]
    graph.failed(0, 1)
    assert [0, 1] not in graph.edges.tolist()
    graph.link(check)
    assert [0, 1] not in graph.edges.tolist()  # what failed is not believed again on the model's word


def sure(sources: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Believe everything."""
    return torch.ones(len(sources)), torch.ones(len(sources), dtype=torch.bool)


def test_prediction_does_not_join_worlds_that_only_look_alike() -> None:
    graph = graph_of(link=4.0, spacing=0.5, reach=0.5)
    one = graph.add(torch.tensor([[0.0, 0.0]]))
    one = graph.add(torch.tensor([[1.0, 0.0]]), one)
    other = graph.add(torch.tensor([[0.0, 0.5]]))
    graph.add(torch.tensor([[1.0, 0.5]]), other)
    assert graph.link(sure) == 2  # back from the second place of each to its first
    # Who comes from one world and sees what is almost as near in the other is still in the one.
    assert graph.add(torch.tensor([[0.0, 0.2]]), one).tolist() == [0]
    assert graph.add(torch.tensor([[0.0, 0.3]]), np.array([2])).tolist() == [2]


def test_a_world_that_looks_otherwise_is_remembered_as_a_second_picture() -> None:
    graph = line_of(5, reversible=True, link=2.5)
    shift = torch.tensor([0.0, 5.0])

    def shut(sources: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A door between 2 and 3, seen to be shut where the second coordinate is 5."""
        across = ((sources[:, 0] - 2.5) * (targets[:, 0] - 2.5) < 0) & (sources[:, 1] == 5)
        return torch.ones(len(sources)), ~across

    graph.changed(0, shift, shut)
    assert len(graph) == 10
    end = torch.tensor([4.0, 0.0])
    route = graph.route(end, end + shift)
    assert route is not None
    at = int(graph.nearest(torch.tensor([[0.0, 5.0]]))[0][0])
    assert route.knows(0)
    assert not route.knows(at)
    assert route.knows(int(graph.nearest(torch.tensor([[3.0, 5.0]]))[0][0]))
    graph.changed(at, -shift, shut)  # and back: nothing new
    assert len(graph) == 10


def test_a_small_change_takes_and_gives_back_the_ways_that_it_shows() -> None:
    graph = line_of(5, reversible=True)
    shift = torch.tensor([0.0, 0.3])

    def shut(sources: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        across = ((sources[:, 0] - 2.5) * (targets[:, 0] - 2.5) < 0) & (sources[:, 1] > 0.1)
        return torch.ones(len(sources)), ~across

    graph.changed(0, shift, shut)
    assert len(graph) == 5
    assert [2, 3] not in graph.edges.tolist()
    assert [1, 2] in graph.edges.tolist()
    graph.changed(0, torch.zeros(2), lambda a, b: shut(a - shift, b - shift))
    assert [2, 3] not in graph.edges.tolist()  # a change that shows nothing of the door gives nothing back


def test_what_lies_aside_of_all_that_is_known_is_told() -> None:
    graph = graph_of(spacing=0.1)
    generator = torch.Generator().manual_seed(0)
    flat = torch.cat([torch.rand(60, 1, generator=generator) * 4, torch.zeros(60, 1)], dim=1)
    graph.learn(flat, np.zeros(60, np.int64), np.arange(60))
    off = graph.off(torch.tensor([[1.0, 0.0], [2.0, 1.0]]))
    assert off[0] < 0.01
    assert off[1] == pytest.approx(2.0, rel=0.05)  # a step is 0.5


def test_a_wall_is_told_from_both_sides_and_in_this_world_only() -> None:
    graph = line_of(6, reversible=True, blame=4.0, forgive=1)  # radius 2
    other = graph.add(torch.tensor([[2.0, 0.9]]))
    graph.add(torch.tensor([[3.0, 0.9]]), other)
    before = len(graph.edges)
    graph.failed(2, 3)
    gone = before - len(graph.edges)
    assert gone == 2
    assert [2, 3] not in graph.edges.tolist()
    assert [3, 2] not in graph.edges.tolist()
    assert [6, 7] in graph.edges.tolist()
    assert [1, 2] in graph.edges.tolist()


def test_experience_is_doubted_before_it_is_dropped_and_believed_when_it_is_made_again() -> None:
    graph = line_of(3, penalty=8.0, forgive=2, blame=0.5)
    goal = torch.tensor([2.0, 0.0])
    graph.failed(1, 2)
    doubted = graph.route(goal)
    assert doubted is not None
    assert doubted.blocks[0] == 1 + 1 + 8
    graph.failed(1, 2)
    dropped = graph.route(goal)
    assert dropped is not None
    assert not dropped.knows(0)
    graph.add(torch.tensor([[2.0, 0.0]]), np.array([1]))
    believed = graph.route(goal)
    assert believed is not None
    assert believed.blocks[0] == 2


def test_edges_beside_a_failed_one_fail_with_it() -> None:
    graph = graph_of(blame=2.5, forgive=1)
    across = torch.tensor([[[0.0, 0.0], [2.0, 0.0]], [[0.0, 0.6], [2.0, 0.6]], [[0.0, 5.0], [2.0, 5.0]]])
    before = graph.add(across[:, 0])
    graph.add(across[:, 1], before)
    for first, second in ((0, 1), (1, 2)):  # one world
        graph.add(across[second : second + 1, 0], before[first : first + 1])
    assert len(graph.edges) == 5
    graph.failed(0, 3)
    assert graph.edges.tolist() == [[2, 5], [0, 1], [1, 2]]


def test_a_graph_is_read_as_it_was_written_with_what_it_no_longer_believes(tmp_path: Path) -> None:
    graph = line_of(40, reversible=True, forgive=1)
    graph.failed(20, 21)
    graph.save(tmp_path / "landmarks")
    read, _ = LandmarkGraph.load(tmp_path / "landmarks", SPEC)
    assert torch.equal(read.latents, graph.latents)
    assert np.array_equal(read.edges, graph.edges)
    assert np.array_equal(read.visits, graph.visits)
    assert (read.config, read.step_length, read.reversible) == (graph.config, graph.step_length, graph.reversible)
    read.add(torch.tensor([[100.0, 0.0]]), np.array([39]))
    route = read.route(torch.tensor([100.0, 0.0]))
    assert route is not None
    assert route.blocks[21] == 19
    assert not route.knows(20)
    with pytest.raises(CheckpointError, match="landmarks of model 'linear-world', but this model is 'other'"):
        LandmarkGraph.load(
            tmp_path / "landmarks", LinearWorld(block=2).spec.__class__(**{**vars(SPEC), "fingerprint": "other"})
        )


def test_bad_values_are_refused() -> None:
    with pytest.raises(PlanningError, match="longer than 0"):
        LandmarkGraph(SPEC, step_length=0.0, reversible=True)
    with pytest.raises(ConfigError, match="expected reach >= spacing"):
        LandmarkConfig.parse({"spacing": 3.0, "reach": 2.0})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda tensors: tensors.pop("ends"), "'ends' is missing"),
        (lambda tensors: tensors.update(ends=tensors["ends"] - 7), "does not exist"),
        (lambda tensors: tensors.update(visits=tensors["visits"][:-1]), "'visits' is torch.int64 of shape"),
        (lambda tensors: tensors.update(blocks=tensors["blocks"] - 99), "negative cost"),
        (lambda tensors: tensors.update(kinds=tensors["kinds"] + 9), "unknown kind"),
        (lambda tensors: tensors["latents"].fill_(torch.nan), "not finite"),
    ],
)
def test_a_damaged_graph_is_refused(change: Any, why: str, tmp_path: Path) -> None:
    line_of(4).save(tmp_path / "whole")
    tensors, metadata = load_tensors(tmp_path / "whole", kind="landmark-graph")
    change(tensors)
    save_tensors(tmp_path / "damaged", tensors, metadata, kind="landmark-graph")
    with pytest.raises(CheckpointError, match=why):
        LandmarkGraph.load(tmp_path / "damaged", SPEC)
    del metadata["step_length"]
    save_tensors(tmp_path / "less", tensors, metadata, kind="landmark-graph")
    with pytest.raises(CheckpointError, match="step_length"):
        LandmarkGraph.load(tmp_path / "less", SPEC)
