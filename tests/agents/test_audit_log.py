"""Every decision is on the disk before it is acted on, can be made again bit for bit, and cannot be changed unseen."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from worldloom.agents import AuditLog, PlanningAgent, damaged_situations, log_path, read_situation, replay
from worldloom.core.chain import entries, verify
from worldloom.core.errors import DataError, StorageError
from worldloom.core.types import Goal, Observations, Rollouts
from worldloom.guardrails import Custom, Hold, Recalibration
from worldloom.planning import GoalObjective, LatentL2, Planner, PlanningProblem
from worldloom.planning.solvers import CEM, Solution
from worldloom.testing import LinearWorld

WORLD = LinearWorld()


def _beyond(rollouts: Rollouts) -> Tensor:
    return rollouts.latents[..., 0] - 2.0


LINE = Custom(function=_beyond).over("line")


def agent_of(log: AuditLog | None, seed: int = 0, budget: float | None = None) -> PlanningAgent:
    planner = Planner(WORLD, CEM(samples=32, iterations=3), horizon=3, guardrails=[LINE], noise=0.01)
    return PlanningAgent(
        WORLD,
        planner,
        lambda goal: GoalObjective(LatentL2(), goal),
        replan=1,
        auditor=log,
        seed=seed,
        budget=budget,
    )


def at(*positions: tuple[float, float]) -> Observations:
    return Observations(vector=torch.tensor(positions, dtype=torch.float32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two environments, of which one is pushed over the line on the way, and is gone after that."""
    path = tmp_path_factory.mktemp("audit") / "log"
    with AuditLog(path, WORLD, [LINE], about={"run": "linear"}) as log:
        agent = agent_of(log)
        agent.reset(Goal(observations=at((8, 0), (1, 1))))
        here = torch.zeros(2, 2)
        for step in range(4):
            here = here + agent.act(Observations(vector=here))
            if step == 1:
                here[0, 0] = 3.0
        agent.select([1])
        agent.act(Observations(vector=here[1:]))
    return path


def test_every_decision_says_what_was_seen_chosen_and_refused_and_what_then_happened(folder: Path) -> None:
    found = list(entries(log_path(folder)))
    events = [entry.body["event"] for entry in found]
    assert events == ["opened", "began", "decided", "decided", "decided", "decided", "went on", "decided"]
    assert found[0].body["run"] == "linear"
    decided = [entry.body for entry in found if entry.body["event"] == "decided"]
    assert decided[0]["happened"] is None
    assert decided[0]["refused"] == []
    assert decided[2]["refused"] == [0]  # it stands beyond the line: nothing holds
    assert decided[2]["happened"]["seen"]["line"][0] == pytest.approx(1.0)  # by how much it was pushed over it
    assert decided[2]["happened"]["gap"][0] > 1.0
    assert decided[1]["happened"]["gap"] == pytest.approx([0.0, 0.0], abs=1e-5)  # else as predicted
    assert len(decided[4]["cost"]) == 1
    assert decided[4]["happened"]["gap"] == pytest.approx([0.0], abs=1e-5)
    observations, _ = read_situation(folder, found[4])
    assert observations.vector is not None
    assert observations.vector[0, 0] == 3.0


def test_each_decision_can_be_made_again_bit_for_bit(folder: Path) -> None:
    agent = agent_of(None, seed=99)  # what it draws comes from the log
    for entry in entries(log_path(folder)):
        if entry.body["event"] == "decided":
            assert not replay(folder, entry, agent.decide, WORLD)[1]


def test_an_agent_whose_log_is_rotated_away_stops(tmp_path: Path) -> None:
    with AuditLog(tmp_path / "log", WORLD, [LINE], about={}) as log:
        agent = agent_of(log)
        agent.reset(Goal(observations=at((1, 1))))
        agent.act(at((0, 0)))
        log_path(tmp_path / "log").rename(tmp_path / "log.1")
        with pytest.raises(StorageError, match="deleted, moved or replaced"):
            agent.act(at((0, 0)))


def test_another_agent_does_not_decide_the_same(folder: Path) -> None:
    entry = next(entry for entry in entries(log_path(folder)) if entry.body["event"] == "decided")
    other = PlanningAgent(
        WORLD,
        Planner(WORLD, CEM(samples=31, iterations=3), horizon=3),
        lambda goal: GoalObjective(LatentL2(), goal),
        replan=1,
    )
    assert "plan" in replay(folder, entry, other.decide, WORLD)[1]


def test_how_episodes_end_is_written_with_what_is_seen_there(tmp_path: Path) -> None:
    with AuditLog(tmp_path / "log", WORLD, [LINE], about={}) as log:
        agent = agent_of(log)
        agent.reset(Goal(observations=at((1, 1), (1, 1), (1, 1))))
        agent.conclude([0], at((1, 1)), ["reached"])  # before anything was decided there is nothing to tell of
        here = torch.zeros(3, 2) + agent.act(Observations(vector=torch.zeros(3, 2)))
        fell = here[[0, 2]].clone()
        fell[1, 0] = 3.0
        agent.conclude([0, 2], Observations(vector=fell), ["not reached", "limit broken"])
        agent.select([1])
        agent.act(Observations(vector=here[1:2]))
    found = [entry.body for entry in entries(log_path(tmp_path / "log"))]
    assert [body["event"] for body in found] == ["opened", "began", "decided", "ended", "went on", "decided"]
    assert found[3]["environments"] == [0, 2]
    assert found[3]["outcomes"] == ["not reached", "limit broken"]
    assert found[3]["happened"]["seen"]["line"][0] < 0
    assert found[3]["happened"]["seen"]["line"][1] == pytest.approx(1.0)
    assert found[3]["happened"]["gap"][0] == pytest.approx(0.0, abs=1e-5)
    assert found[5]["happened"]["gap"] == pytest.approx([0.0], abs=1e-5)


def test_in_the_middle_of_a_block_its_predicted_end_says_nothing(tmp_path: Path) -> None:
    world = LinearWorld(block=2)
    with AuditLog(tmp_path / "log", world, [LINE], about={}) as log:
        planner = Planner(world, CEM(samples=32, iterations=2), horizon=3, guardrails=[LINE])
        agent = PlanningAgent(world, planner, lambda goal: GoalObjective(LatentL2(), goal), replan=4, auditor=log)
        agent.reset(Goal(observations=at((1, 1))))
        here = torch.zeros(1, 2)
        for step in range(4):
            here = here + agent.act(Observations(vector=here))
            if step:
                agent.conclude([0], Observations(vector=here), ["reached"])
    ended = [entry.body["happened"] for entry in entries(log_path(tmp_path / "log")) if entry.body["event"] == "ended"]
    first, middle, second = (body["gap"] for body in ended)
    assert first == pytest.approx([0.0], abs=1e-5)
    assert middle is None
    assert second == pytest.approx([0.0], abs=1e-5)


@pytest.mark.parametrize(("replan", "gap"), [(4, [0.0]), (3, None)])
def test_a_plan_is_compared_with_what_is_seen_where_it_was_left(
    tmp_path: Path, replan: int, gap: list[float] | None
) -> None:
    world = LinearWorld(block=2)
    with AuditLog(tmp_path / "log", world, [LINE], about={}) as log:
        planner = Planner(world, CEM(samples=32, iterations=2), horizon=3, guardrails=[LINE])
        agent = PlanningAgent(world, planner, lambda goal: GoalObjective(LatentL2(), goal), replan=replan, auditor=log)
        agent.reset(Goal(observations=at((-8, 0))))
        here = torch.zeros(1, 2)
        for _ in range(replan + 1):
            before, here = here, here + agent.act(Observations(vector=here))
    happened = list(entries(log_path(tmp_path / "log")))[-1].body["happened"]
    assert happened["gap"] == (gap if gap is None else pytest.approx(gap, abs=1e-5))
    assert happened["seen"]["line"] == pytest.approx([before[0, 0].item() - 2.0])


def test_a_guardrail_that_raises_ends_no_agent_that_is_written_down(tmp_path: Path) -> None:
    def raises(rollouts: Rollouts) -> Tensor:
        raise ValueError("no")

    bad = Custom(function=raises, margin=0.5).over("bad")
    with AuditLog(tmp_path / "log", WORLD, [bad, LINE], about={}) as log:
        planner = Planner(WORLD, CEM(samples=32, iterations=2), horizon=3, guardrails=[bad, LINE])
        follow = Recalibration([bad, LINE], usual=1.0, risk=0.1, model=WORLD)
        agent = PlanningAgent(
            WORLD, planner, lambda goal: GoalObjective(LatentL2(), goal), replan=1, auditor=log, recalibration=follow
        )
        agent.reset(Goal(observations=at((1, 1))))
        for _ in range(2):
            assert agent.act(at((0, 0))).tolist() == [[0.0, 0.0]]
        agent.conclude([0], at((0, 0)), ["not reached"])
    *_, decided, ended = (entry.body for entry in entries(log_path(tmp_path / "log")))
    assert decided["refused"] == [0]
    for happened in (decided["happened"], ended["happened"]):
        assert happened["seen"] == {"bad": [None], "line": [-2.0]}


def test_parts_of_an_agent_write_into_one_log_and_are_told_apart(tmp_path: Path) -> None:
    with AuditLog(tmp_path / "log", WORLD, [LINE], about={}) as log:
        one, other = agent_of(log), agent_of(log.part("exploring"), seed=1)
        for agent in (one, other, one):
            agent.reset(Goal(observations=at((1, 1))))
            agent.act(at((0, 0)))
    found = list(entries(log_path(tmp_path / "log")))
    assert verify(log_path(tmp_path / "log")).broken is None
    assert [entry.body.get("part", "") for entry in found[1:]] == ["", "", "exploring", "exploring", "", ""]
    for entry in found:
        if entry.body["event"] == "decided":
            assert not replay(tmp_path / "log", entry, agent_of(None, seed=7).decide, WORLD)[1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_is_found_wherever_it_is(folder: Path, data: st.DataObject) -> None:
    files = [*sorted(folder.glob("situations/*")), log_path(folder)]
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    changed = bytearray(content)
    changed[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        path.write_bytes(bytes(changed))
        found = verify(log_path(folder)).broken is not None or bool(damaged_situations(folder))
    finally:
        path.write_bytes(content)
    assert found


def test_a_situation_that_was_changed_or_is_gone_is_not_replayed(folder: Path) -> None:
    entry = next(entry for entry in entries(log_path(folder)) if entry.body["event"] == "decided")
    path = folder / "situations" / f"{entry.body['situation']}.safetensors"
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DataError, match="was changed"):
            replay(folder, entry, agent_of(None).decide, WORLD)
        path.unlink()
        with pytest.raises(StorageError):
            replay(folder, entry, agent_of(None).decide, WORLD)
        assert damaged_situations(folder) == [entry.index]
    finally:
        path.write_bytes(content)


def test_what_the_clock_cut_short_is_not_made_again(tmp_path: Path) -> None:
    with AuditLog(tmp_path, WORLD, [LINE], about={}) as log:
        agent = agent_of(log, budget=1e-9)
        agent.reset(Goal(observations=at((8, 0))))
        agent.act(at((0, 0)))
    entry = list(entries(log_path(tmp_path)))[-1]
    assert entry.body["cut short"]
    with pytest.raises(DataError, match="clock"):
        replay(tmp_path, entry, agent_of(None).decide, WORLD)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("search", range(4))
def test_whichever_search_the_clock_ends_or_leaves_out_the_decision_was_cut_short(
    tmp_path: Path, search: int, after: bool
) -> None:
    searches = 0

    class Clocked(CEM):
        def solve(self, problem: PlanningProblem, *, initial: Tensor | None, generator: torch.Generator) -> Solution:
            nonlocal searches
            if ends := searches == search:
                problem.deadline.moment = None if after else 0.0
            searches += 1
            found = super().solve(problem, initial=initial, generator=generator)
            problem.deadline.moment = 0.0 if ends else problem.deadline.moment
            return found

    with AuditLog(tmp_path / "log", WORLD, [LINE], about={}) as log:
        # Beyond the line: one search, one that stays off the edge, and the same two to hold.
        planner = Planner(WORLD, Clocked(samples=32, iterations=3), horizon=3, guardrails=[LINE], noise=0.01)
        agent = PlanningAgent(
            WORLD, planner, lambda goal: GoalObjective(LatentL2(), goal), replan=1, auditor=log, fallback=Hold()
        )
        agent.reset(Goal(observations=at((8, 0))))
        agent.act(at((9, 0)))
    decided = list(entries(log_path(tmp_path / "log")))[-1].body
    nothing_was_left_out = after and search % 2 == 1
    assert decided["cut short"] == (not nothing_was_left_out)
    assert list(agent.statistics["plan_cut_short"]) == [float(decided["cut short"])]


def test_an_entry_that_is_no_decision_is_not_replayed(folder: Path) -> None:
    first = next(iter(entries(log_path(folder))))
    with pytest.raises(DataError, match="does not record a decision"):
        replay(folder, first, agent_of(None).decide, WORLD)


def test_nothing_is_done_that_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with AuditLog(tmp_path, WORLD, [LINE], about={}) as log:
        agent = agent_of(log)
        agent.reset(Goal(observations=at((8, 0))))

        def full(*_: object) -> None:
            raise StorageError("the disk is full")

        monkeypatch.setattr(log.chain, "append", full)
        with pytest.raises(StorageError, match="full"):
            agent.act(at((0, 0)))
