"""The recipes of the field's worlds with logs and goals from an expert that sees the simulator; the agent does not."""

from worldloom.agents import PlanMethod
from worldloom.heads import BehaviourPriorConfig
from worldloom.recipes.library import RECIPES, load_recipe
from worldloom.recipes.recipe import Recipe

_WITH_PRIOR = "CEM, behaviour prior"


def _from_expert(
    recipe: str, name: str, *, policy: str, protocol: str, prior: float = 0.0, horizon: int | None = None
) -> Recipe:
    """Return a recipe of weak logs with the logs of the expert `policy`, and goals from such logs.

    With a weight `prior`, the default method plans with the behaviour prior, and from the plans of GC-IDM. An expert
    never shows what it avoids, so a model of its logs is wrong there.
    """
    weak = load_recipe(recipe)
    assert weak.collection is not None
    searching = {}
    if prior:
        search = weak.method("CEM, latent L2")
        assert isinstance(search, PlanMethod)
        changed = {"propose": "goal-inverse", "prior": prior, "horizon": horizon or search.horizon}
        searching = {
            "methods": weak.methods | {_WITH_PRIOR: search.model_copy(update=changed)},
            "default_method": _WITH_PRIOR,
            "behaviour_prior": weak.behaviour_prior or BehaviourPriorConfig(),
        }
    return weak.model_copy(
        update={
            **searching,
            "name": name,
            "description": f"The recipe {recipe} with the logs of an expert that sees the simulator ({policy}).",
            "collection": weak.collection.model_copy(update={"policy": policy}),
            "protocol": protocol,
        }
    )


@RECIPES.register("pusht-expert")
def pusht_expert() -> Recipe:
    """PushT, from logs of a hand that pushes the block to one random pose after another."""
    return _from_expert(
        "pusht", "pusht-expert", policy="pusht-expert", protocol="pusht-expert-25@1", prior=0.3, horizon=12
    )


@RECIPES.register("two-room-expert")
def two_room_expert() -> Recipe:
    """Two rooms, from logs of shortest paths to one random place after another."""
    return _from_expert(
        "two-room", "two-room-expert", policy="two-room-expert", protocol="two-room-expert-25@1", prior=3.0
    )


@RECIPES.register("reacher-expert")
def reacher_expert() -> Recipe:
    """A two-link arm, from logs of smooth motions to one random pose after another."""
    return _from_expert("reacher", "reacher-expert", policy="reacher-expert", protocol="reacher-expert-25@1")


@RECIPES.register("cube-expert-state")
def cube_expert_state() -> Recipe:
    """OGBench's cube from its state, from logs of an arm that carries the cube to one random place after another."""
    return _from_expert("cube-state", "cube-expert-state", policy="cube-expert", protocol="cube-expert-25@1")
