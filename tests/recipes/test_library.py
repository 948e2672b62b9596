"""The recipes that ship, and the names that the package offers."""

import gymnasium
import pytest

import worldloom
from worldloom.agents import METHODS
from worldloom.core.errors import ConfigError
from worldloom.evaluation import PROTOCOLS
from worldloom.recipes import RECIPES, Recipe, load_recipe


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_bears_its_name_and_survives_json(name) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    again = Recipe.parse(recipe.model_dump(mode="json"))
    assert again == recipe
    # Equality of models compares types: parts must come back as what they were.
    assert again.model_dump_json() == recipe.model_dump_json()


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_names_a_world_and_a_protocol_of_that_world(name) -> None:
    recipe = load_recipe(name)
    assert (recipe.collection is None) == (recipe.protocol is None)
    if recipe.collection is not None:
        gymnasium.spec(recipe.collection.env_id)
        assert PROTOCOLS[recipe.protocol].env_id == recipe.collection.env_id


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_table_has_the_baselines_and_a_default_that_plans(name) -> None:
    recipe = load_recipe(name)
    kinds = {method.name for method in recipe.methods.values()}
    assert {"random", "behaviour-cloning", "plan"} <= kinds <= set(METHODS)
    assert recipe.methods[recipe.default_method].name in ("plan", "landmarks")


def test_an_override_reaches_a_method_and_leaves_the_rest() -> None:
    recipe = load_recipe("two-room")
    changed = recipe.override(["methods.tree search.horizon=7", "training.losses.variance.weight=2"])
    assert changed.methods["tree search"].horizon == 7
    assert changed.training.losses["variance"].weight == 2
    undone = changed.override(["methods.tree search.horizon=24", "training.losses.variance.weight=4"])
    assert undone == recipe


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("trainig.steps=1", "did you mean 'training'"),
        ("methods.tree serch.horizon=7", "did you mean 'tree search'"),
        ("methods.tree search.solver.name=tree-serch", "tree-serch"),
        ("default_method=tree serch", "did you mean 'tree search'"),
        ("methods={}", "methods"),
        ("distance.steps=0", "distance.steps"),
        ("model.predictor.name=mpl", "mlp"),
        ("methods.CEM, latent L2.prior=1", "has a prior, but the recipe has no behaviour_prior"),
    ],
)
def test_a_wrong_override_is_named(assignment, message) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("two-room").override([assignment])


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'four-rooms'"):
        load_recipe("four-room")


@pytest.mark.parametrize("name", worldloom.__all__)
def test_every_public_name_resolves(name) -> None:
    assert getattr(worldloom, name) is not None
    assert name in dir(worldloom)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'colect'"):
        worldloom.colect  # noqa: B018


@pytest.mark.parametrize("name", [name for name in RECIPES if "-expert" in name])
def test_an_experts_recipe_differs_from_the_weak_one_in_logs_goals_and_the_behaviour_prior_alone(name) -> None:
    expert, weak = load_recipe(name), load_recipe(name.replace("-expert", ""))
    protocol = PROTOCOLS[expert.protocol]
    assert protocol.policy == expert.collection.policy != weak.collection.policy
    same = {"name": weak.name, "description": weak.description, "protocol": weak.protocol}
    same["collection"] = expert.collection.model_copy(update={"policy": weak.collection.policy})
    added = expert.methods.keys() - weak.methods.keys()
    assert all(method.prior > 0 and expert.behaviour_prior for method in map(expert.methods.get, added))
    assert expert.default_method in {weak.default_method, *added}
    assert expert.behaviour_prior == weak.behaviour_prior or added
    same |= {"methods": weak.methods, "default_method": weak.default_method, "behaviour_prior": weak.behaviour_prior}
    kept = {title: method for title, method in expert.methods.items() if title not in added}
    assert (kept, expert.model_copy(update=same)) == (weak.methods, weak)
