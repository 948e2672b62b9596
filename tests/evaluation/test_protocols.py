import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldloom.core.errors import ConfigError
from worldloom.core.seeds import derive_seed
from worldloom.data import episode_seed
from worldloom.evaluation import PROTOCOLS, Protocol, Split, SuccessRule, gym_protocol


@pytest.mark.parametrize(
    ("text", "source", "name", "radius"),
    [
        ("position:3", "named", "position", 3.0),
        ("info:block_pose:0.25", "info", "block_pose", 0.25),
        ("observation:achieved_goal:5e-2", "observation", "achieved_goal", 0.05),
        ("observation:0.1", "observation", "", 0.1),
        ("env", "environment", "", 0.0),
    ],
)
def test_success_rules_are_read_from_text(text: str, source: str, name: str, radius: float) -> None:
    rule = SuccessRule.parse_text(text)
    assert (rule.source, rule.name, rule.radius) == (source, name, radius)


@pytest.mark.parametrize("text", ["", "position", "position:near", "info:3", "a:b:3", "position:-1", "position:nan"])
def test_other_texts_are_refused_with_examples(text: str) -> None:
    with pytest.raises(ConfigError, match="position:3"):
        SuccessRule.parse_text(text)


def test_the_two_room_protocol_keeps_its_conventions() -> None:
    protocol = PROTOCOLS["two-room@1"]
    assert {name: split.episodes for name, split in protocol.splits.items()} == {"cross-room": 100, "same-room": 100}
    assert protocol.task("cross-room") == {"split": "cross-room", "min_distance": 10.0}
    assert (protocol.budget, protocol.success.radius, protocol.frame_skip) == (150, 3.0, 1)
    # A change of meaning takes a new version: whoever changes this digest changes what published rates mean.
    assert protocol.fingerprint == "7fffc749745c0d49"


def test_a_misspelt_protocol_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'two-room@1'"):
        PROTOCOLS["two-rooms@1"]


@pytest.mark.parametrize("title", list(PROTOCOLS))
def test_named_protocols_bear_their_titles_and_survive_json(title: str) -> None:
    protocol = PROTOCOLS[title]
    assert protocol.title == title
    assert Protocol.parse(protocol.model_dump(mode="json")) == protocol


@given(root=st.integers(0, 10), collection=st.integers(0, 10))
def test_evaluation_seeds_are_no_seeds_of_collection(root: int, collection: int) -> None:
    protocol = PROTOCOLS["two-room@1"].customise(seed=root)
    seeds = {protocol.episode_seed(split, index) for split in protocol.splits for index in range(100)}
    assert len(seeds) == 200
    assert not seeds & {episode_seed(collection, episode) for episode in range(1000)}


def test_evaluation_seeds_come_from_their_own_stream() -> None:
    # Published rates rest on these seeds: whoever changes them draws other starts and goals.
    protocol = PROTOCOLS["two-room@1"].customise(seed=5)
    expected = derive_seed(5, "evaluation", "two-room", 1, "same-room", 7) % 2**31
    assert protocol.episode_seed("same-room", 7) == expected


def test_seeds_depend_on_the_split_and_the_root_and_not_on_the_number_of_episodes() -> None:
    protocol = PROTOCOLS["two-room@1"]
    fewer, other = protocol.customise(episodes=5), protocol.customise(seed=1)
    assert other.episode_seed("cross-room", 0) != protocol.episode_seed("cross-room", 0)
    assert protocol.episode_seed("same-room", 0) != protocol.episode_seed("cross-room", 0)
    assert fewer.splits["cross-room"].episodes == 5


def test_changed_conventions_change_name_and_digest_and_a_fresh_seed_changes_neither() -> None:
    protocol = PROTOCOLS["two-room@1"]
    changed, reseeded = protocol.customise(budget=300), protocol.customise(seed=7)
    assert changed.title == "two-room-custom@1"
    assert changed.fingerprint != protocol.fingerprint
    assert (reseeded.title, reseeded.fingerprint, reseeded.seed) == (protocol.title, protocol.fingerprint, 7)
    assert protocol.customise() == protocol
    with pytest.raises(ConfigError, match="unknown convention 'budgett'; did you mean 'budget'"):
        protocol.customise(budgett=300)
    assert protocol.customise(budget=150) == protocol
    assert PROTOCOLS["maze-far@1"].customise(budget=80).budget_over_shortest is None


def test_every_convention_is_written_out() -> None:
    text = "\n".join(PROTOCOLS["two-room@1"].describe())
    for part in (
        "two-room@1",
        "worldloom/TwoRoom-v0",
        "cross-room (100 episodes)",
        "10 px apart",
        "at most 3 px",
        "any step within the budget",
        "150 environment steps",
        "Frame skip: none",
        "root 0",
        "Wilson",
    ):
        assert part in text
    assert "4 times the fewest steps" in "\n".join(PROTOCOLS["maze-far@1"].describe())
    logged = "\n".join(gym_protocol("X-v0", success="env", goal_offset=30, policy="uniform", frame_skip=2).describe())
    for part in ("'uniform'", "30 steps", "'is_success'", "repeated 2 times", "120 environment steps"):
        assert part in logged


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": None}, "exactly one of 'budget' and 'budget_over_shortest'"),
        ({"budget_over_shortest": 2.0}, "exactly one of 'budget' and 'budget_over_shortest'"),
        ({"goal_source": "logged-policy"}, "need a goal_offset"),
        ({"splits": {"a": {"goal_offset": 3}}}, "Set goal_source 'logged-policy'"),
        ({"splits": {}}, "at least 1"),
        ({"budgets": 3}, "did you mean 'budget'"),
        ({"success": {"source": "info"}}, "needs a name"),
    ],
)
def test_protocols_that_contradict_themselves_are_refused(values: dict[str, object], message: str) -> None:
    base = {"name": "p", "env_id": "X-v0", "splits": {"a": {}}, "success": {"name": "position"}, "budget": 10}
    Protocol.parse(base)
    with pytest.raises(ConfigError, match=message):
        Protocol.parse({**base, **values})


def test_goals_of_the_policy_must_lie_outside_the_tolerance_unless_said_otherwise() -> None:
    assert gym_protocol("X-v0", success="position:3").least_distance == 3.0
    assert gym_protocol("X-v0", success="position:3", min_distance=7.0).least_distance == 7.0
    assert gym_protocol("X-v0", success="env").least_distance is None
    assert gym_protocol("X-v0", success="env", goal_offset=[10, 40]).splits["40 steps away"] == Split(goal_offset=40)
