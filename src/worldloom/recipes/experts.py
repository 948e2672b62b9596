"""The recipes of the field's worlds with logs and goals from an expert that sees the simulator; the agent does not."""

from worldloom.agents import PlanMethod
from worldloom.heads import BehaviourPriorConfig
from worldloom.recipes.library import RECIPES, load_recipe
from worldloom.recipes.recipe import Recipe

_WITH_PRIOR = "CEM, behaviour prior"


def _from_expert(recipe: str, name: str, *, policy: str, protocol: str) -> Recipe:
    """Return a recipe of weak logs with the logs of the expert `policy`, and goals from such logs."""
    weak = load_recipe(recipe)
    assert weak.collection is not None
    return weak.model_copy(
        update={
            "name": name,
            "description": f"The recipe {recipe} with the logs of an expert that sees the simulator ({policy}).",
            "collection": weak.collection.model_copy(update={"policy": policy}),
            "protocol": protocol,
        }
    )


def _with_prior(recipe: Recipe, density: BehaviourPriorConfig, *, prior: float, **changes: int) -> Recipe:
    """Return the recipe with a default method that plans with the behaviour prior, and from the plans of GC-IDM.

    An expert never shows what it avoids, so a model of its logs is wrong there, and a search exploits it.
    """
    search = recipe.method("CEM, latent L2")
    assert isinstance(search, PlanMethod)
    method = search.model_copy(update={"propose": "goal-inverse", "prior": prior, **changes})
    return recipe.model_copy(
        update={
            "behaviour_prior": density,
            "methods": recipe.methods | {_WITH_PRIOR: method},
            "default_method": _WITH_PRIOR,
        }
    )


@RECIPES.register("pusht-expert")
def pusht_expert() -> Recipe:
    """PushT, from logs of a hand that pushes the block to one random pose after another."""
    recipe = _from_expert("pusht", "pusht-expert", policy="pusht-expert", protocol="pusht-expert-25@1")
    return _with_prior(recipe, BehaviourPriorConfig(hidden=(512, 512), steps=3000), prior=0.3, horizon=12)


@RECIPES.register("two-room-expert")
def two_room_expert() -> Recipe:
    """Two rooms, from logs of shortest paths to one random place after another."""
    recipe = _from_expert("two-room", "two-room-expert", policy="two-room-expert", protocol="two-room-expert-25@1")
    return _with_prior(recipe, BehaviourPriorConfig(), prior=3.0)


@RECIPES.register("reacher-expert")
def reacher_expert() -> Recipe:
    """A two-link arm, from logs of smooth motions to one random pose after another."""
    return _from_expert("reacher", "reacher-expert", policy="reacher-expert", protocol="reacher-expert-25@1")


@RECIPES.register("cube-expert-state")
def cube_expert_state() -> Recipe:
    """OGBench's cube from its state, from logs of an arm that carries the cube to one random place after another."""
    return _from_expert("cube-state", "cube-expert-state", policy="cube-expert", protocol="cube-expert-25@1")
