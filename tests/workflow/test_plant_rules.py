"""Under a rule set, only what obeys it acts on a plant; what is a plant is declared, and never guessed from a name."""

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from worldloom import data
from worldloom.core.errors import ConfigError
from worldloom.core.seams import Agent, Policy
from worldloom.evaluation import PROTOCOLS, ActingRules, Protocol, Worlds, gym_protocol
from worldloom.guardrails import RuleLayer, RuleSet
from worldloom.recipes import load_recipe
from worldloom.workflow import Run, Session, evaluate, plan_once, train

LIMIT, CHANGE = 0.2, 0.15
DECLARED: dict[str, bool | str | None] = {
    "plant": False,
    "lapsing": False,
    "simulator": True,
    "unknown": None,
    "vague": "yes",
}


class Machine(gymnasium.Env[np.ndarray, np.ndarray]):
    """A point with a noisy sensor; it writes down every action that it is given, and how many copies there are."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}
    given: ClassVar[list[list[np.ndarray]]] = []
    changes: ClassVar[list[float]] = []  # of a lapsing machine: the length of each change of the applied action
    copies: ClassVar[int] = 0
    most: ClassVar[int] = 0

    def __init__(self, kind: str = "plant", noise: float = 0.0) -> None:
        declared = DECLARED[kind]
        self.metadata = {"render_modes": []} if declared is None else {"render_modes": [], "simulator": declared}
        self.observation_space = spaces.Box(-9, 9, (2,), np.float32)
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)
        self._noise, self._sensor = noise, np.random.default_rng(0)
        self._lapsing, self._asked, self._applied = kind == "lapsing", 0, np.zeros(2, np.float32)
        Machine.copies += 1
        Machine.most = max(Machine.copies, Machine.most)

    def _look(self) -> tuple[np.ndarray, dict[str, Any]]:
        seen = (self._place + self._noise * self._sensor.normal(size=2)).astype(np.float32)
        return seen, {"position": self._place.astype(np.float32)}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self._place = self.np_random.uniform(-1, 1, 2)
        Machine.given.append([])
        self._applied = np.zeros(2, np.float32)
        return self._look()

    def applied(self) -> np.ndarray | None:
        """Return the last action; in every third period the machine replaces it, while the agent plans."""
        if not self._lapsing:
            return None
        self._asked += 1
        if len(Machine.given[-1]) % 3 == 2 and self._asked > 1:
            self._applied = np.zeros(2, np.float32)
        return self._applied.copy()

    def step(self, action: np.ndarray) -> Any:
        Machine.given[-1].append(action.copy())
        Machine.changes.append(float(np.linalg.norm(action - self._applied)))
        self._applied, self._asked = action.copy(), 0
        self._place = np.clip(self._place + 0.2 * action, -2, 2)
        seen, info = self._look()
        return seen, 0.0, False, False, info

    def close(self) -> None:
        Machine.copies -= 1


gymnasium.register("tests/Machine-v0", entry_point=Machine)
TINY = [
    "training.steps=10",
    "training.batch=16",
    "training.horizon=3",
    "training.validation_windows=16",
    "inverse.steps=4",
    "distance.steps=4",
    "reactive.steps=4",
    "reactive.problems=16",
    "cloning.steps=4",
    'methods={"random": {"name": "random"}, "reactive": {"name": "reactive"}, '
    '"free": {"name": "plan", "guard": "none"}, "plan": {"name": "plan", "horizon": 2}}',
    "default_method=plan",
]
RULES = RuleSet(
    layers=(
        RuleLayer.parse({
            "owner": "works",
            "guardrails": {
                "gently": {"name": "magnitude", "limit": LIMIT},
                "smoothly": {"name": "rate", "limit": CHANGE},
            },
        }),
    )
)  # fmt: skip
QUICK: dict[str, Any] = {"success": "position:0.01", "goal_offset": 4, "budget": 6, "episodes": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root: Path = tmp_path_factory.mktemp("machine")
    logs = data.collect(
        root / "data", env_id="tests/Machine-v0", episodes=8, steps=20, num_envs=4, policy="uniform", seed=0
    )
    return train(load_recipe("generic").override(TINY), logs, root / "run")


@pytest.fixture(autouse=True)
def _begin() -> Iterator[None]:
    Machine.given, Machine.changes, Machine.copies, Machine.most = [], [], 0, 0
    warnings.simplefilter("ignore")  # Gymnasium's, about spaces and metadata
    yield
    assert Machine.copies == 0


def obeyed() -> bool:
    actions = [np.stack(one) for one in Machine.given if one]
    assert actions
    longest = max(float(np.linalg.norm(one, axis=1).max()) for one in actions)
    change = max(float(np.linalg.norm(np.diff(one, axis=0), axis=1).max(initial=0)) for one in actions)
    return longest <= LIMIT + 1e-6 and change <= CHANGE + 1e-6


@pytest.mark.parametrize("kind", ["plant", "unknown", "vague"])
def test_under_a_rule_set_only_guarded_methods_act_on_a_plant(run, kind, caplog) -> None:
    with Session(run, rules=RULES) as session, caplog.at_level(logging.WARNING):
        results = evaluate(session, env_kwargs={"kind": kind, "noise": 0.01 * (kind == "plant")}, **QUICK)
    assert results.methods == ["plan"]
    assert len(results.rows[0].episodes) == 3  # one after the other
    assert Machine.most == 1
    assert obeyed()
    assert len([one for one in Machine.given if one]) >= 6  # goals were drawn, too
    skipped = [record.getMessage() for record in caplog.records if "is skipped" in record.getMessage()]
    assert [text.split("'")[1] for text in skipped] == ["random", "reactive", "free"]
    assert all("does not obey the rule set" in text and "tests/Machine-v0" in text for text in skipped)
    assert set(results.provenance["skipped"]) == {"random", "reactive", "free"}


def test_a_limit_on_changes_counts_from_the_action_that_the_plant_applies(run) -> None:
    with Session(run, rules=RULES) as session:
        evaluate(session, methods=["plan"], env_kwargs={"kind": "lapsing", "noise": 0.01}, **QUICK)
    assert len(Machine.changes) > 20
    assert max(Machine.changes) <= CHANGE + 1e-6


@pytest.mark.parametrize("declared", ["by the world", "by the user"])
def test_on_a_simulator_baselines_are_compared_as_before(run, declared) -> None:
    user = declared == "by the user"
    with Session(run, rules=RULES, simulator=user) as session:
        results = evaluate(session, env_kwargs={"kind": "unknown" if user else "simulator"}, **QUICK)
    assert results.methods == ["random", "reactive", "free", "plan"]
    assert "skipped" not in results.provenance
    assert not obeyed()
    assert Machine.most >= 3


def test_without_rules_a_plant_is_evaluated_one_episode_at_a_time(run) -> None:
    results = evaluate(run, env_kwargs={"kind": "plant", "noise": 0.01}, methods=["random", "plan"], **QUICK)
    assert [len(row.episodes) for row in results.rows] == [3, 3]
    assert Machine.most == 1


class Wild(Agent):
    def reset(self, goal: Any) -> None:
        return

    def act(self, observations: Any) -> Any:
        raise AssertionError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["plan", "random"]}, "do not obey the rule set: random. tests"),
        ({"methods": ["free"]}, "do not obey the rule set: free. tests"),
        ({"others": {"wild": Wild}}, "do not obey the rule set: wild. tests"),
        ({"others": {"plan": Wild}}, "do not obey the rule set: plan. tests"),
    ],
)
def test_a_method_that_was_chosen_and_may_not_act_is_an_error_before_anything_moves(run, options, message) -> None:
    with Session(run, rules=RULES) as session, pytest.raises(ConfigError, match=message):
        evaluate(session, **QUICK, **options)
    assert not any(Machine.given)


def test_a_plant_cannot_be_declared_a_simulator(run) -> None:
    with Session(run, rules=RULES, simulator=True) as session, pytest.raises(ConfigError, match="leave out --sim"):
        evaluate(session, **QUICK)
    assert not any(Machine.given)


def test_recorded_actions_are_not_repeated_on_a_plant(run, monkeypatch) -> None:
    plain = gym_protocol("tests/Machine-v0", success="position:0.01", goal_offset=4, name="later")
    splits = {"later": {"goal_offset": 4, "start_steps": 3, "episodes": 2}}
    monkeypatch.setitem(PROTOCOLS._entries, "later@1", Protocol.parse(plain.model_dump() | {"splits": splits}))
    for job in (evaluate, plan_once):
        with Session(run, rules=RULES) as session, pytest.raises(ConfigError, match="repeating recorded actions"):
            job(session, protocol="later@1")
    assert not any(Machine.given)


def test_the_logging_policy_is_followed_as_far_as_the_rules_permit(run) -> None:
    class Fixed(Policy):
        def __init__(self, wish: tuple[float, float]) -> None:
            self.wish = np.array([wish], np.float32)

        def reset(self, generators: list[np.random.Generator]) -> None:
            return

        def act(self, observations: Any) -> np.ndarray:
            return self.wish

    from worldloom.core.types import Observations

    with Session(run, rules=RULES) as session:
        acting = session.acting()
    assert isinstance(acting, ActingRules)
    here = Observations.from_numpy(None, np.zeros((1, 2), np.float32))
    for wish, nearest in (((0.1, 0.05), (0.1, 0.05)), ((0.9, 0.0), (0.2, 0.0)), ((0.0, -0.7), (0.0, -0.2))):
        policy = acting.guard(Fixed(wish))
        policy.reset([np.random.default_rng(0)])
        assert policy.act(here)[0].tolist() == pytest.approx(nearest, abs=1e-3)
    policy.reset([np.random.default_rng(0)])
    policy.act(here)
    policy._policy.wish = -policy._policy.wish  # type: ignore[attr-defined]
    assert policy.act(here)[0].tolist() == pytest.approx((0.0, -0.05), abs=1e-3)
    policy.resume(torch.tensor([[0.2, 0.0]]))  # the plant applies something else
    assert np.linalg.norm(policy.act(here)[0] - np.array([0.2, 0.0])) <= CHANGE + 1e-6
    policy.reset([np.random.default_rng(0)])
    policy.resume(torch.tensor([[0.0, -0.2]]))
    assert np.linalg.norm(policy.act(here)[0] - np.array([0.0, -0.2])) <= CHANGE + 1e-6


def test_the_worlds_of_this_project_declare_what_they_are() -> None:
    for name in ("TwoRoom", "FourRooms", "Maze", "Pits"):
        protocol = gym_protocol(f"worldloom/{name}-v0", success="position:3")
        with Worlds(protocol, 4, ActingRules(methods=(), guard=lambda policy: policy)) as worlds:
            assert worlds.guard is None
            assert worlds.batch == 4
            assert worlds.of(1).simulator is True
            assert worlds.of(4).simulator is True
