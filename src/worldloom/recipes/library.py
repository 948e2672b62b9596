"""The recipes that worldloom ships, by name."""

from collections.abc import Callable

from worldloom.core.registry import Registry
from worldloom.models import JEPAConfig
from worldloom.models.encoders import PatchConv
from worldloom.models.losses import Covariance, InverseDynamics, TemporalSimilarity
from worldloom.models.predictors import MLPPredictor
from worldloom.planning import CEM
from worldloom.recipes.config import CollectionConfig, Recipe
from worldloom.recipes.methods import CloningMethod, PlanMethod, RandomMethod, ReactiveMethod
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


@RECIPES.register("pusht")
def pusht() -> Recipe:
    """PushT from logs of a hand that wanders about the block and aims at nothing."""
    # The block is a slow feature, the disc a fast one: inverse dynamics alone keeps the disc and loses the
    # block's angle, so it weighs less here, and covariance and temporal similarity more (docs/log.md).
    losses = {
        **default_losses(),
        "covariance": Covariance(weight=0.1, samples="pooled"),
        "temporal-similarity": TemporalSimilarity(weight=2.0),
        "inverse-dynamics": InverseDynamics(weight=1.0, frames=3),
    }
    search = CEM(samples=128, iterations=5, elites=16)
    return Recipe(
        name="pusht",
        description="PushT in 64x64 RGB on pymunk, 360 thousand frames of a clumsy hand that aims at nothing.",
        collection=CollectionConfig(
            env_id="worldloom/PushT-v0", episodes=2400, steps=150, policy="near-object", num_envs=50
        ),
        model=JEPAConfig(
            block=2,
            context=2,
            latent_dim=96,
            encoder=PatchConv(channels=(64, 128), hidden=512),
            predictor=MLPPredictor(hidden=(512, 512)),
        ),
        training=TrainingConfig(steps=15000, losses=losses, validate_every=3000, checkpoint_every=1000),
        methods={
            "random": RandomMethod(),
            "behaviour cloning": CloningMethod(),
            "reactive policy": ReactiveMethod(),
            "CEM, latent L2": PlanMethod(solver=search, horizon=12),
            "CEM, learned distance": PlanMethod(solver=search, horizon=12, metric="distance"),
        },
        default_method="CEM, latent L2",
        protocol="pusht-25@1",
    )


@RECIPES.register("generic")
def generic() -> Recipe:
    """Any dataset: two frames of history, since one may not show velocities."""
    return Recipe(
        name="generic",
        description="Any dataset of pixels and/or vectors; two frames of history, for one may not show velocities.",
        model=JEPAConfig(context=2, encoder=None),
        training=_with_history(),
    )
