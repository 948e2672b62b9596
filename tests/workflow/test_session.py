"""A session closes what it opened, and its agents obey the rules of the recipe and its own."""

import pytest
import torch

from worldloom.agents import AuditLog, LandmarkMethod, PlanningAgent, log_path
from worldloom.core.chain import verify
from worldloom.core.errors import ConfigError, StorageError
from worldloom.core.types import Goal, Observations
from worldloom.guardrails import RuleLayer, RuleSet, bound_rules
from worldloom.memory import EpisodicMemory
from worldloom.recipes import Recipe, load_recipe
from worldloom.workflow import Run, Session, collect, evaluate, plan_once, train


def layer(name: str, limit: float) -> RuleLayer:
    rails = {"gently": {"name": "magnitude", "limit": limit}}
    return RuleLayer.parse({"layer": name, "owner": name, "guardrails": rails})


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    tiny = [
        "collection.episodes=12",
        "collection.steps=40",
        "training.steps=4",
        "training.validation_windows=16",
        "training.validation_share=0.2",
        "inverse.steps=4",
        "distance.steps=4",
        "reactive.steps=4",
        "reactive.problems=16",
        "cloning.steps=4",
        'methods={"random": {"name": "random"}, "tree search": {"name": "plan", "horizon": 2}}',
    ]
    plain = load_recipe("two-room").override(tiny)
    return plain.model_copy(update={"methods": plain.methods | {"landmarks": LandmarkMethod(horizon=2)}})


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("session")
    return train(recipe, collect(recipe, root / "data"), root / "run")


def with_rules(run: Run, rules: RuleLayer) -> Run:
    changed = Run.open(run.path)
    changed.recipe = run.recipe.model_copy(update={"rules": rules})
    return changed


def limits(agent: object) -> list[float]:
    assert isinstance(agent, PlanningAgent)
    return [bound.rail.limit for bound in agent.rails]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_whatever_ends_a_session_its_memory_and_log_are_closed(run, tmp_path, error) -> None:
    memory, log = tmp_path / "memory", tmp_path / "log"
    session = Session(run, memory=memory, audit=log)

    def use() -> None:
        with session:
            agent = session.agent("landmarks")
            pixels = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
            agent.reset(Goal(observations=Observations(pixels=pixels)))
            agent.act(Observations(pixels=pixels))
            with pytest.raises(StorageError, match="another process writes"):
                EpisodicMemory.open(memory, spec=None, writable=True)
            if error is not None:
                raise error

    if error is None:
        use()
    else:
        with pytest.raises(error):
            use()
    assert session.memory is not None
    with EpisodicMemory.open(memory, spec=None, writable=True) as opened:
        assert len(opened) == 1
    assert verify(log_path(log)).broken is None
    AuditLog(log, run.model, about={}).close()  # nobody else writes it


def test_a_memory_of_another_model_or_rules_that_loosen_leave_nothing_open(run, tmp_path) -> None:
    strict = with_rules(run, layer("operator", 0.5))
    with pytest.raises(ConfigError, match="loosens the guardrail 'gently'"):
        Session(strict, rules=RuleSet(layers=(layer("site", 2.0),)), memory=tmp_path / "memory")
    assert not (tmp_path / "memory").exists()


def test_a_sessions_rules_come_below_the_recipes_own(run) -> None:
    strict = with_rules(run, layer("operator", 0.8))
    assert limits(strict.agent()) == [0.8]
    with Session(strict) as session:
        assert limits(session.agent()) == [0.8]
    with Session(strict, rules=RuleSet(layers=(layer("site", 0.5),))) as session:
        assert limits(session.agent()) == [0.5]
    with Session(run, rules=RuleSet(layers=(layer("site", 0.5),))) as session:
        assert limits(session.agent()) == [0.5]
    assert limits(run.agent()) == []


def test_a_method_that_obeys_no_rules_is_refused_unless_it_is_compared(run) -> None:
    strict = with_rules(run, layer("operator", 0.8))
    with pytest.raises(ConfigError, match="'random' does not obey guardrails.*choose 'tree search'"):
        strict.agent("random")
    with Session(strict) as session:
        with pytest.raises(ConfigError, match="does not obey guardrails"):
            session.agent("random")
        session.agent("random", compared=True)
    rows = evaluate(strict, episodes=1, budget=4, methods=["random", "tree search"]).rows
    assert {row.method for row in rows} == {"random", "tree search"}


def test_only_decisions_of_a_planner_are_audited(run, tmp_path) -> None:
    with Session(run, audit=tmp_path / "log") as session:
        with pytest.raises(ConfigError, match="'random' does not plan"):
            session.agent("random")
        assert not (tmp_path / "log").exists()


def test_guardrails_are_bound_and_judged_once_for_all_agents(run, monkeypatch) -> None:
    judged = []
    check = bound_rules.check_consistent
    monkeypatch.setattr(bound_rules, "check_consistent", lambda rails, *on: (judged.append(rails), check(rails, *on)))
    with Session(run, rules=RuleSet(layers=(layer("site", 0.5),))) as session:
        agents = [session.agent(method, seed=seed) for method in ("tree search", "landmarks") for seed in (0, 1)]
        made = plan_once(session, method="tree search")
    assert len(judged) == 1
    assert agents[0].rails[0] is agents[1].rails[0]
    assert all(sum(value**2 for value in action) <= 0.25 + 1e-5 for action in made["actions"])
