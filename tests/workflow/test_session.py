"""A session closes what it opened, and its agents obey the rules of the recipe and its own."""

import copy
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from quick_training import QUICK

from forging import chained
from worldloom.agents import AuditLog, LandmarkMethod, PlanningAgent, log_path
from worldloom.core.chain import Entry, entries, verify
from worldloom.core.errors import ConfigError, DataError, StorageError, WorldloomError
from worldloom.core.types import Goal, Observations
from worldloom.guardrails import RuleLayer, RuleSet, bound_rules
from worldloom.memory import EpisodicMemory
from worldloom.recipes import Recipe, load_recipe
from worldloom.workflow import Run, Session, collect, evaluate, plan_once, replay_entry, train


def layer(name: str, limit: float) -> RuleLayer:
    rails = {"gently": {"name": "magnitude", "limit": limit}}
    return RuleLayer.parse({"layer": name, "owner": name, "guardrails": rails})


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    tiny = ["collection.episodes=12", "collection.steps=40", *QUICK]
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


@pytest.fixture(scope="module")
def log(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("audit") / "log"
    with Session(run, rules=RuleSet(layers=(layer("site", 0.5),)), audit=path) as session:
        agent, pixels = session.agent(), torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
        agent.reset(Goal(observations=Observations(pixels=pixels)))
        agent.act(Observations(pixels=pixels))
    return path


@pytest.fixture(scope="module")
def story(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of two environments with three decisions; one environment goes on after the second."""
    path = tmp_path_factory.mktemp("audit") / "story"
    looks = torch.randint(0, 256, (4, 2, 64, 64, 3), dtype=torch.uint8)
    with Session(run, rules=RuleSet(layers=(layer("site", 0.5),)), audit=path) as session:
        agent = session.agent()
        agent.reset(Goal(observations=Observations(pixels=looks[3])))
        for rows, look in (((0, 1), looks[0]), ((0, 1), looks[1]), ((1,), looks[2, 1:])):
            if len(rows) == 1:
                agent.select(rows)
            made = len(agent.statistics["plan_seconds"])
            while len(agent.statistics["plan_seconds"]) == made:
                agent.act(Observations(pixels=look))
    return path


def decisions(log: Path) -> list[Entry]:
    return [entry for entry in entries(log_path(log)) if entry.body["event"] == "decided"]


def test_a_replay_confirms_what_an_honest_log_says(story) -> None:
    found = [replay_entry(story, entry.index) for entry in decisions(story)]
    assert [one.differ for one in found] == [[], [], []]
    assert found[2].body["happened"]["gap"] is None or len(found[2].body["happened"]["gap"]) == 1
    assert "the observation" in found[0].unchecked[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("violations", {"gently": [-9.0, -9.0]}),
        ("violations", {}),
        ("first", [[0.0, 0.0], [0.0, 0.0]]),
        ("cost", [0.0, 0.0]),
        ("actions", "0" * 64),
        ("plan", "0" * 64),
        ("refused", [1]),
        ("stretch", 7.0),
        ("happened", {"gap": [0.0, 0.0], "seen": {"gently": [-9.0, -9.0]}}),
        ("happened", None),
        ("approved by", "the inspector"),
    ],
)
def test_a_replay_names_what_is_false_in_an_entry(story, tmp_path, name: str, value: Any) -> None:
    second = decisions(story)[1].index
    false = forged(story, tmp_path / "forged", at(second, name, value=value))
    assert replay_entry(false, second).differ == [name]


@pytest.mark.parametrize("path", ["a" * 10_000, "a\0b", "/"])
def test_a_recorded_run_that_cannot_be_opened_is_said(log, tmp_path, path: str) -> None:
    with pytest.raises(WorldloomError):
        replay_entry(forged(log, tmp_path / "forged", at(0, "run", value=path)), 2)


def test_a_search_from_too_many_plans_is_not_repeated(story, tmp_path) -> None:
    many = lambda tensors: tensors.update(initial=tensors["initial"].repeat(1, 1100, 1, 1))  # noqa: E731
    index = situated(story, tmp_path / "forged", many)
    with pytest.raises(DataError, match="too large to repeat"):
        replay_entry(tmp_path / "forged", index)


def situated(story: Path, path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> int:
    """Copy a log with another situation of its second decision, and return the entry's index."""
    entry = decisions(story)[1]
    tensors = safetensors.torch.load_file(story / "situations" / f"{entry.body['situation']}.safetensors")
    change(tensors)
    content = safetensors.torch.save(tensors)
    digest = hashlib.sha256(content).hexdigest()
    forged(story, path, at(entry.index, "situation", value=digest))
    (path / "situations" / f"{digest}.safetensors").write_bytes(content)
    return entry.index


def test_a_replay_finds_another_picture_beside_a_decision(story, tmp_path) -> None:
    black = situated(story, tmp_path / "a", lambda tensors: tensors["pixels"].zero_())
    assert replay_entry(tmp_path / "a", black).differ == ["observation"]
    gone = situated(story, tmp_path / "b", lambda tensors: tensors.pop("pixels"))
    with pytest.raises(DataError, match="the recorded observation has no pixels"):
        replay_entry(tmp_path / "b", gone)
    one = situated(story, tmp_path / "c", lambda tensors: tensors.update(pixels=tensors["pixels"][:1]))
    with pytest.raises(DataError, match=r"the recorded 'pixels' has shape \(1, 64, 64, 3\)"):
        replay_entry(tmp_path / "c", one)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bool, torch.int64, torch.float16])
@pytest.mark.parametrize("name", ["context/latents", "context/actions", "goal", "safe", "initial", "randomness"])
def test_a_situation_of_other_dtypes_is_refused(story, tmp_path, name: str, dtype: torch.dtype) -> None:
    index = situated(story, tmp_path / "f", lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(DataError, match=f"has a tensor '{name}' of {dtype} with"):
        replay_entry(tmp_path / "f", index)


def forged(log: Path, path: Path, change: Callable[[list[Any]], object]) -> Path:
    """Copy a log, change the bodies of its entries, and chain them anew, as anyone can without a key."""
    if not path.exists():
        shutil.copytree(log, path)
    bodies = [copy.deepcopy(dict(entry.body)) for entry in entries(log_path(log))]
    change(bodies)
    chained(log_path(path), bodies)
    return path


def at(*keys: Any, value: Any) -> Callable[[list[Any]], object]:
    def change(bodies: list[Any]) -> None:
        place = bodies
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at(0, "threads", value=10**6), "entry 0 has a wrong 'threads': Input should be less than or equal"),
        (at(0, "threads", value=-1), "wrong 'threads'"),
        (at(0, "threads", value="4"), "wrong 'threads'"),
        (lambda bodies: bodies[0].pop("layers"), "entry 0 has no 'layers'"),
        (lambda bodies: bodies[0].pop("method"), "entry 0 has no 'method'"),
        (at(0, "margins", value=[[0.1], [0.2]]), "2 rows of margins; expected 1"),
        (at(0, "margins", value=[[]]), "wrong 'margins.0'"),
        (at(0, "method", value={"name": "random"}), "does not plan"),
        (at(0, "method", "horizon", value=10**12), "'context/|'initial'|too large"),
        (at(0, "method", "solver", "samples", value=10**9), "too large to repeat"),
        (lambda bodies: bodies[0]["method"]["solver"].update(samples=99_999, iterations=999), "too large to repeat"),
        (at(0, "layers", 0, "guardrails", value=dict.fromkeys(map(str, range(300)))), "more than 256 parts"),
        (at(0, "model", value="0" * 64), "is not the model"),
        (lambda bodies: bodies[2].pop("event"), "entry 2 has no 'event'"),
        (lambda bodies: bodies[2].pop("plan"), "entry 2 has no 'plan'"),
        (at(2, "event", value="decided "), "entry 2 has the unknown event 'decided '; expected opened, began"),
        (at(1, "goal", value=5), "entry 1 has a wrong 'goal'"),
        (at(2, "refused", value="none"), "entry 2 has a wrong 'refused'"),
        (at(2, "situation", value="../../etc/passwd"), "entry 2 has a wrong 'situation'"),
        (at(2, "part", value="nobody"), "names the part 'nobody'"),
        (at(0, "format", value=[]), "has format"),
    ],
)
def test_a_replay_does_not_trust_its_log(run, log, tmp_path, change, message) -> None:
    assert not replay_entry(log, 2).differ
    threads = torch.get_num_threads()
    with pytest.raises(DataError, match=message):
        replay_entry(forged(log, tmp_path / "forged", change), 2)
    assert torch.get_num_threads() == threads
