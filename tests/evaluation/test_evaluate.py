import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from worldloom.core.errors import ConfigError, DataError, EnvironmentFailure
from worldloom.core.seams import Agent
from worldloom.core.types import ActionSpec, Goal, Observations
from worldloom.evaluation import Protocol, SuccessRule, draw_tasks, evaluate, gym_protocol, naming, open_world
from worldloom.evaluation.goals import goal_policy_generator

Agents = dict[str, Callable[[], Any]]


def test_every_method_sees_the_same_starts_and_goals(protocol: Protocol, agents: Agents) -> None:
    made: list[Any] = []

    def remembered(factory: Callable[[], Any]) -> Callable[[], Any]:
        def make() -> Any:
            made.append(factory())
            return made[-1]

        return make

    results = evaluate(protocol, {name: remembered(factory) for name, factory in agents.items()}, batch=5)
    for split, size in (("far", 12), ("near", 7)):
        rows = [results.row(method, split) for method in agents]
        known = [[(e.index, e.seed, e.task, e.start_distance, e.shortest_steps) for e in row.episodes] for row in rows]
        assert known[0] == known[1] == known[2]
        assert len(known[0]) == size
    goals = [torch.cat(agent.resets) for agent in made]
    assert len(goals) == 3
    assert torch.equal(goals[0], goals[1])
    assert torch.equal(goals[0], goals[2])


def test_starts_and_goals_do_not_depend_on_the_batch(protocol: Protocol, agents: Agents) -> None:
    one, many = (evaluate(protocol, {"homing": agents["homing"]}, batch=batch) for batch in (3, 50))
    assert [row.episodes for row in one.rows] == [row.episodes for row in many.rows]


def test_success_is_counted_at_the_exact_step(protocol: Protocol, agents: Agents) -> None:
    seen = {}
    with open_world(protocol, 12) as world:
        tasks, _ = draw_tasks(protocol, "far", world, 0, "")
        start = protocol.success.vector(tasks.begin(protocol, "far", world, ""))
    for row, seed in enumerate(tasks.seeds):
        assert tasks.target is not None
        gap = np.abs(tasks.target[row] - start[row])
        seen[seed] = next(k for k in range(100) if math.hypot(*np.maximum(gap - k, 0)) <= 0.5)
    for method in ("homing", "narrow"):
        row = evaluate(protocol, {method: agents[method]}).row(method, "far")
        assert {episode.seed: episode.steps for episode in row.episodes} == seen
        assert all(episode.success and episode.end_distance <= 0.5 for episode in row.episodes)


def test_the_last_step_of_the_budget_counts_and_the_one_after_does_not(protocol: Protocol, agents: Agents) -> None:
    steps = [e.steps for e in evaluate(protocol, {"homing": agents["homing"]}).row("homing", "far").episodes]
    limit = sorted(steps)[len(steps) // 2]
    tight = evaluate(protocol.model_copy(update={"budget": limit}), {"homing": agents["homing"]}).row("homing", "far")
    assert [episode.success for episode in tight.episodes] == [step <= limit for step in steps]
    assert all(episode.steps == limit for episode in tight.episodes if not episode.success)


def test_a_budget_over_the_shortest_path_differs_between_episodes(protocol: Protocol, agents: Agents) -> None:
    relative = protocol.model_copy(update={"budget": None, "budget_over_shortest": 1.5})
    row = evaluate(relative, {"still": agents["still"]}).row("still", "far")
    assert len({episode.budget for episode in row.episodes}) > 3
    for episode in row.episodes:
        assert episode.shortest_steps is not None
        assert episode.steps == episode.budget == math.ceil(1.5 * episode.shortest_steps)


def test_an_agent_that_never_moves_fails_unless_the_start_is_the_goal(protocol: Protocol, agents: Agents) -> None:
    row = evaluate(protocol, {"still": agents["still"]}).row("still", "far")
    assert row.overall.successes == 0
    assert row.spl == 0.0
    assert [e.end_distance for e in row.episodes] == pytest.approx([e.start_distance for e in row.episodes])
    rule = SuccessRule(source="info", name="position", radius=30.0)
    at_goal = evaluate(protocol.model_copy(update={"success": rule}), {"still": agents["still"]}).row("still", "far")
    assert at_goal.overall.rate == 1.0
    assert {episode.steps for episode in at_goal.episodes} == {0}


def test_an_agent_that_narrows_acts_only_for_what_is_under_way(protocol: Protocol, agents: Agents) -> None:
    made: list[Any] = []

    def factory() -> Any:
        made.append(agents["narrow"]())
        return made[-1]

    results = evaluate(protocol, {"narrow": factory}, batch=6)
    assert made[0].acted == sum(episode.steps for row in results.rows for episode in row.episodes)


class Replay(Agent):
    """Takes the logging policy's very actions from the start of each episode."""

    def __init__(self, policy: Any, seeds: Sequence[int], batch: int) -> None:
        self._policy, self._seeds, self._batch, self._from = policy, list(seeds), batch, 0

    def reset(self, goal: Goal) -> None:
        seeds = self._seeds[self._from : self._from + self._batch]
        self._from += self._batch
        self._policy.reset([goal_policy_generator(seed) for seed in seeds])

    def act(self, observations: Observations) -> Tensor:
        return torch.from_numpy(self._policy.act(observations))


def test_goals_of_the_policy_are_reached_by_replaying_it(logged: Protocol, agents: Agents, wander: Any) -> None:
    assert logged.splits["8 steps away"].goal_offset == 8
    still = evaluate(logged, {"still": agents["still"]}, batch=4).row("still", "8 steps away")
    assert still.overall.successes == 0
    seeds = [episode.seed for episode in still.episodes]
    replay = Replay(wander(ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0))), seeds, 4)
    row = evaluate(logged, {"replay": lambda: replay}, batch=4).row("replay", "8 steps away")
    assert row.overall.rate == 1.0
    assert max(episode.steps for episode in row.episodes) <= 8
    assert [episode.task for episode in row.episodes] == [episode.task for episode in still.episodes]


def test_the_goal_is_the_policys_frame_after_exactly_the_offset(logged: Protocol, agents: Agents, wander: Any) -> None:
    exact = logged.model_copy(update={"success": SuccessRule(source="info", name="position", radius=1e-4)})
    seeds = [e.seed for e in evaluate(exact, {"still": agents["still"]}).rows[0].episodes]
    replay = Replay(wander(ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0))), seeds, 9)
    row = evaluate(exact, {"replay": lambda: replay}).rows[0]
    assert [(episode.success, episode.steps) for episode in row.episodes] == [(True, 8)] * 9


def test_goals_too_near_their_start_are_drawn_again(logged: Protocol, agents: Agents) -> None:
    # The drift over 8 steps is at most 8 units an axis; ask for more than most seeds give.
    far = logged.model_copy(update={"min_distance": 5.0})
    row = evaluate(far, {"still": agents["still"]}).rows[0]
    assert min(e.start_distance or 0 for e in row.episodes) > 5.0
    near = evaluate(logged, {"still": agents["still"]}).rows[0]
    assert min(e.start_distance or 0 for e in near.episodes) <= 5.0
    with pytest.raises(ConfigError, match="larger goal_offset"):
        evaluate(logged.model_copy(update={"min_distance": 100.0}), {"still": agents["still"]})


def test_an_episode_that_ends_early_gives_its_last_frame_as_the_goal(logged: Protocol, wander: Any) -> None:
    short = logged.model_copy(update={"env_kwargs": {"end_at": 5}})
    with open_world(short, 9) as world, open_world(logged, 9) as endless:
        ended, _ = draw_tasks(short, "8 steps away", world, 0, "")
        policy = wander(world.action)
        policy.reset([goal_policy_generator(seed) for seed in ended.seeds])
        frame = endless.reset(ended.seeds, naming(endless, ended.seeds, ""))
        for _ in range(5):
            frame = endless.step(policy.act(frame.observations), frame.rows)
    assert ended.target is not None
    np.testing.assert_allclose(logged.success.vector(frame), ended.target)


def test_the_environments_own_word_counts(agents: Agents) -> None:
    class Right(agents["still"]):  # type: ignore[misc, name-defined]
        def act(self, observations: Observations) -> Tensor:
            return torch.tensor([1.0, 0.0]).repeat(len(self.goal), 1)

    protocol = gym_protocol("tests/Dot-v0", success="env", goal_offset=5, budget=20, episodes=8, policy="tests-wander")
    results = evaluate(protocol, {"right": Right, "still": agents["still"]})
    right, still = (results.row(method, "5 steps away") for method in ("right", "still"))
    assert right.overall.rate == 1.0
    assert 0 < still.overall.rate < 1
    for moved, stood in zip(right.episodes, still.episodes, strict=True):
        assert stood.success == (moved.steps == 0)
        assert moved.end_distance is None


@pytest.mark.parametrize("rule", ["observation:state:0.5", "state:0.5", "observation:0.5"])
def test_vectors_of_the_observation_are_goals_too(rule: str, agents: Agents) -> None:
    protocol = gym_protocol("tests/Dot-v0", success=rule, goal_offset=8, budget=20, episodes=5, policy="tests-wander")
    results = evaluate(protocol, {name: agents[name] for name in ("homing", "still")})
    assert [row.overall.rate for row in results.rows] == [1.0, 0.0]


def test_an_unknown_vector_is_answered_with_the_nearest(agents: Agents) -> None:
    protocol = gym_protocol("tests/Dot-v0", success="positon:1", episodes=2, policy="tests-wander")
    with pytest.raises(ConfigError, match="did you mean 'position'"):
        evaluate(protocol, {"still": agents["still"]})


def test_termination_ends_an_episode_without_success(protocol: Protocol, agents: Agents) -> None:
    short = protocol.model_copy(update={"env_kwargs": {"end_at": 4}})
    row = evaluate(short, {"homing": agents["homing"]}).row("homing", "far")
    full = evaluate(protocol, {"homing": agents["homing"]}).row("homing", "far")
    assert [e.success for e in row.episodes] == [e.steps <= 4 for e in full.episodes]
    assert {episode.steps for episode in row.episodes if not episode.success} == {4}


def test_an_action_is_repeated_over_the_frame_skip(protocol: Protocol, agents: Agents) -> None:
    calls = []

    class Counting(agents["still"]):  # type: ignore[misc, name-defined]
        def act(self, observations: Observations) -> Tensor:
            calls.append(1)
            return torch.tensor([1.0, 0.0]).repeat(len(self.goal), 1)

    skipping = protocol.model_copy(update={"frame_skip": 4, "budget": 10})
    row = evaluate(skipping, {"counting": Counting}).row("counting", "far")
    assert len(calls) == 2 * 3  # two splits, at steps 0, 4 and 8
    assert max(episode.steps for episode in row.episodes) == 10


@pytest.mark.parametrize(
    ("fault", "message"),
    [("raise", r"step 3: environment .* raised RuntimeError: the motor is broken"), ("nan", "nan")],
)
def test_a_failing_environment_is_named_by_method_split_and_seed(
    protocol: Protocol, agents: Agents, fault: str, message: str
) -> None:
    broken = protocol.model_copy(update={"env_kwargs": {"fault": fault}})
    with pytest.raises(EnvironmentFailure, match=message) as caught:
        evaluate(broken, {"still": agents["still"]})
    text = str(caught.value)
    assert "method 'still', split 'far'" in text
    with open_world(protocol, 12) as world:
        tasks, _ = draw_tasks(protocol, "far", world, 0, "")
        start = protocol.success.vector(tasks.begin(protocol, "far", world, ""))
    faulty = [seed for seed, position in zip(tasks.seeds, start, strict=True) if position[0] < 10]
    assert f"episode seed {faulty[0]}" in text


def test_a_world_that_ignores_its_seed_is_refused(protocol: Protocol, agents: Agents) -> None:
    with pytest.raises(EnvironmentFailure, match="second reset with the same seed"):
        evaluate(protocol.model_copy(update={"env_kwargs": {"seeded": False}}), {"still": agents["still"]})


def test_a_world_that_draws_no_goals_is_told_apart(protocol: Protocol, agents: Agents) -> None:
    with pytest.raises(EnvironmentFailure, match="Use a protocol with goals of the logging policy"):
        evaluate(
            protocol.model_copy(update={"env_id": "CartPole-v1", "min_distance": None}), {"still": agents["still"]}
        )


@pytest.mark.parametrize("value", [2.0, math.nan])
def test_an_action_out_of_bounds_is_blamed_on_the_method(protocol: Protocol, agents: Agents, value: float) -> None:
    class Wild(agents["still"]):  # type: ignore[misc, name-defined]
        def act(self, observations: Observations) -> Tensor:
            return torch.full((len(self.goal), 2), value)

    with pytest.raises(DataError, match="method 'wild', split 'far'.*out of bounds"):
        evaluate(protocol, {"wild": Wild})


def test_recordings_hold_successes_and_failures_from_start_to_end(protocol: Protocol, agents: Agents) -> None:
    tight = protocol.model_copy(update={"budget": 8})
    results = evaluate(tight, {"homing": agents["homing"]}, batch=5, record=2)
    mine = [recording for recording in results.recordings if recording.split == "far"]
    assert [recording.success for recording in mine].count(True) == 2
    assert [recording.success for recording in mine].count(False) == 2
    for recording in mine:
        assert recording.frames is not None
        assert recording.path is not None
        assert recording.target is not None
        assert recording.frames.shape == (recording.steps + 1, 16, 20, 3)
        assert len(recording.path) == recording.steps + 1
        near = np.linalg.norm(recording.path[-1] - recording.target) <= 0.5
        assert near == recording.success
    assert evaluate(tight, {"homing": agents["homing"]}, record=0).recordings == ()


def test_progress_tells_each_method_and_split(protocol: Protocol, agents: Agents) -> None:
    from contextlib import contextmanager

    told: dict[str, tuple[int, float | None]] = {}

    class Listener:
        @contextmanager
        def task(self, description: str, total: int, unit: str = "it") -> Any:
            class Task:
                def advance(self, amount: int = 1, **figures: float) -> None:
                    told[description] = (told.get(description, (0, None))[0] + amount, figures.get("success"))

            yield Task()

    evaluate(protocol, {"homing": agents["homing"], "still": agents["still"]}, batch=5, progress=Listener())
    assert told == {
        "far: drawing goals": (12, None),
        "far: homing": (12, 1.0),
        "far: still": (12, 0.0),
        "near: drawing goals": (7, None),
        "near: homing": (7, 1.0),
        "near: still": (7, 0.0),
    }


def test_latency_is_by_the_agents_own_account_where_it_gives_one(protocol: Protocol, agents: Agents) -> None:
    class Planner(agents["homing"]):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.statistics: dict[str, list[float]] = {"plan_seconds": [], "plan_environments": []}

        def reset(self, goal: Goal) -> None:
            super().reset(goal)
            self.statistics["plan_seconds"] += [0.1, 0.3]
            self.statistics["plan_environments"] += [10, 10]

    results = evaluate(protocol, {"planner": Planner, "homing": agents["homing"]})
    for split in ("far", "near"):
        latency = results.row("planner", split).latency
        assert latency is not None
        assert (latency.basis, latency.decisions) == ("plan", 2)
        assert (latency.batch_ms, latency.mean_ms, latency.p50_ms) == pytest.approx((200.0, 20.0, 20.0))
    timed = results.row("homing", "far").latency
    assert timed is not None
    assert timed.basis == "act"
    assert timed.decisions == max(episode.steps for episode in results.row("homing", "far").episodes)


def test_nothing_to_evaluate_is_refused(protocol: Protocol, agents: Agents) -> None:
    with pytest.raises(ConfigError, match="at least one method"):
        evaluate(protocol, {})
    with pytest.raises(ConfigError, match="batch of at least 1"):
        evaluate(protocol, agents, batch=0)


def test_an_unknown_logging_policy_is_answered_with_the_known(agents: Agents) -> None:
    protocol = gym_protocol("tests/Dot-v0", success="position:1", policy="tests-wandr", episodes=2)
    with pytest.raises(ConfigError, match="did you mean 'tests-wander'"):
        evaluate(protocol, {"still": agents["still"]})
