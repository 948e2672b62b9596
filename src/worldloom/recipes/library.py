"""The recipes that worldloom ships, by name."""

from collections.abc import Callable

from worldloom.core.registry import Registry
from worldloom.models import JEPAConfig
from worldloom.models.losses import InverseDynamics
from worldloom.recipes.config import CollectionConfig, Recipe
from worldloom.training import TrainingConfig, default_losses

RECIPES: Registry[Callable[[], Recipe]] = Registry("recipe")


def load_recipe(name: str) -> Recipe:
    """Return a recipe by name.

    Raises:
        ConfigError: there is none of this name; the nearest is named.
    """
    return RECIPES[name]()


@RECIPES.register("two-room")
def two_room() -> Recipe:
    """The demo: two rooms, the door drawn anew for each episode."""
    return Recipe(
        name="two-room",
        description="Two rooms in 64x64 RGB, the door's place drawn anew for each episode; 100 thousand frames.",
        collection=CollectionConfig(env_id="worldloom/TwoRoom-v0"),
        training=TrainingConfig(steps=800),
        protocol="two-room@1",
    )


@RECIPES.register("four-rooms")
def four_rooms() -> Recipe:
    """Four rooms, their doors drawn anew for each episode."""
    return Recipe(
        name="four-rooms",
        description="Four rooms in 64x64 RGB, the four doors drawn anew for each episode; 200 thousand frames.",
        collection=CollectionConfig(env_id="worldloom/FourRooms-v0", episodes=2000),
        training=TrainingConfig(steps=1500),
        protocol="four-rooms@1",
    )


@RECIPES.register("maze")
def maze() -> Recipe:
    """A maze drawn anew for each episode, with goals more than 100 steps away: beyond a flat planner's horizon."""
    return Recipe(
        name="maze",
        description="Mazes in 64x64 RGB, the layout drawn anew for each episode; goals more than 100 steps away.",
        collection=CollectionConfig(env_id="worldloom/Maze-v0", episodes=2000),
        training=TrainingConfig(steps=1500),
        protocol="maze-far@1",
    )


def _with_history() -> TrainingConfig:
    losses = {**default_losses(), "inverse-dynamics": InverseDynamics(weight=3.0, frames=3)}
    return TrainingConfig(losses=losses)


@RECIPES.register("generic")
def generic() -> Recipe:
    """Any dataset: two frames of history, since one may not show velocities."""
    return Recipe(
        name="generic",
        description="Any dataset of pixels and/or vectors; two frames of history, for one may not show velocities.",
        model=JEPAConfig(context=2, encoder=None),
        training=_with_history(),
    )
