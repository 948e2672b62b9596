"""The recipes that worldloom ships, by name."""

from collections.abc import Callable

from worldloom.core.registry import Registry
from worldloom.models import JEPAConfig
from worldloom.models.losses import Covariance, InverseDynamics, LossConfig, Variance
from worldloom.recipes.config import CollectionConfig, Recipe
from worldloom.training import TrainingConfig, default_losses

RECIPES: Registry[Callable[[], Recipe]] = Registry("recipe")


def load_recipe(name: str) -> Recipe:
    """Return a recipe by name.

    Raises:
        ConfigError: there is none of this name; the nearest is named.
    """
    return RECIPES[name]()


def _losses() -> dict[str, LossConfig]:
    return {
        **default_losses(),
        "variance": Variance(weight=4.0, samples="pooled"),
        "covariance": Covariance(weight=0.03, samples="pooled"),
        "inverse-dynamics": InverseDynamics(weight=3.0),
    }


@RECIPES.register("two-room")
def two_room() -> Recipe:
    """The demo: two rooms, the door drawn anew for each episode."""
    return Recipe(
        name="two-room",
        description="Two rooms in 64x64 RGB, the door's place drawn anew for each episode; 100 thousand frames.",
        collection=CollectionConfig(env_id="worldloom/TwoRoom-v0"),
        training=TrainingConfig(steps=800, losses=_losses()),
        protocol="two-room@1",
    )


@RECIPES.register("generic")
def generic() -> Recipe:
    """Any dataset: two frames of history, since one may not show velocities."""
    return Recipe(
        name="generic",
        description="Any dataset of pixels and/or vectors; two frames of history, for one may not show velocities.",
        model=JEPAConfig(context=2),
        training=TrainingConfig(losses=_losses()),
    )
