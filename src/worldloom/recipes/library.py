"""The recipes that worldloom includes, by name."""

from collections.abc import Callable

from worldloom.agents import (
    CloningConfig,
    CloningMethod,
    FollowConfig,
    GoalInverseConfig,
    GoalInverseMethod,
    HierarchyMethod,
    LandmarkMethod,
    PlanMethod,
    RandomMethod,
    default_methods,
)
from worldloom.core.registry import Registry
from worldloom.guardrails import Box, Hold, KeepIn, RuleLayer
from worldloom.heads import CoarseConfig, DistanceConfig
from worldloom.models import JEPAConfig
from worldloom.models.encoders import PatchConv
from worldloom.models.losses import InverseDynamics
from worldloom.planning.solvers import CEM, TreeSearch
from worldloom.recipes.recipe import CollectionConfig, LabelledProbe, Recipe
from worldloom.training import TrainingConfig, default_losses

RECIPES: Registry[Callable[[], Recipe]] = Registry("recipe")


def load_recipe(name: str) -> Recipe:
    """Return a recipe by name.

    Raises:
        ConfigError: no recipe has this name; the message suggests the nearest one.
    """
    return RECIPES[name]()


@RECIPES.register("two-room")
def two_room() -> Recipe:
    """The demo: two rooms, with the door at a random place in each episode."""
    return Recipe(
        name="two-room",
        description="Two rooms in 64x64 RGB, with the door at a random place in each episode; 100 thousand frames.",
        collection=CollectionConfig(env_id="worldloom/TwoRoom-v0"),
        training=TrainingConfig(steps=800),
        goal_inverse=GoalInverseConfig(),
        cloning=CloningConfig(goals=2, batch=85),  # about half the time of 256 pairs (docs/log.md)
        methods=default_methods() | {"GC-IDM": GoalInverseMethod()},
        protocol="two-room@1",
    )


@RECIPES.register("four-rooms")
def four_rooms() -> Recipe:
    """Four rooms, with the doors at random places in each episode."""
    return Recipe(
        name="four-rooms",
        description="Four rooms in 64x64 RGB, with doors at random places in each episode; 200 thousand frames.",
        collection=CollectionConfig(env_id="worldloom/FourRooms-v0", episodes=2000),
        training=TrainingConfig(steps=1500),
        protocol="four-rooms@1",
    )


@RECIPES.register("closing-doors")
def closing_doors() -> Recipe:
    """Four rooms in which a door may close during an episode."""
    blind = FollowConfig(patience=10_000, arrival=1e6, learn=False)
    return Recipe(
        name="closing-doors",
        description="Four rooms with doors at random places in each episode; one door may close during the episode.",
        collection=CollectionConfig(
            env_id="worldloom/FourRooms-v0",
            env_kwargs={"vary": ["door_positions", "closing_door", "closing_step"]},
            episodes=3000,
        ),
        # With half the training steps, the model mistakes a closed door for an open one half of the time.
        model=JEPAConfig(encoder=PatchConv(hidden=512)),
        training=TrainingConfig(steps=8000, batch=160, horizon=3, validate_every=1000, checkpoint_every=1000),
        methods={
            "random": RandomMethod(),
            "behaviour cloning": CloningMethod(),
            "CEM, latent L2": PlanMethod(),
            "tree search": PlanMethod(solver=TreeSearch(), horizon=24),
            "landmarks": LandmarkMethod(),
            "landmarks, never replanned": LandmarkMethod(follow=blind),
        },
        default_method="landmarks",
        protocol="closing-door@1",
    )


@RECIPES.register("maze")
def maze() -> Recipe:
    """A random maze in each episode, with goals more than 100 steps away: too far for a planner without subgoals."""
    return Recipe(
        name="maze",
        description="Mazes in 64x64 RGB, with a random layout in each episode; goals more than 100 steps away.",
        collection=CollectionConfig(env_id="worldloom/Maze-v0", episodes=2000),
        training=TrainingConfig(steps=1500),
        protocol="maze-far@1",
    )


@RECIPES.register("long-maze")
def long_maze() -> Recipe:
    """Mazes with goals 100, 200 and 400 steps away, reached over landmarks found by exploration."""
    thorough = CEM(samples=128, iterations=4, elites=12)
    quick = CEM(samples=48, iterations=3, elites=6)  # explores as far as with more samples, in half the time
    hierarchy = HierarchyMethod(solver=TreeSearch(), horizon=24)
    return Recipe(
        name="long-maze",
        description="Random mazes of 6x6 cells with a slow agent; goals 100 to 400 steps away.",
        collection=CollectionConfig(
            env_id="worldloom/Maze-v0",
            env_kwargs={"factors": {"cells": 6, "agent_speed": 0.6}},
            episodes=4000,
            steps=104,
            policy_options={"heading_noise": 0.2, "turn_probability": 0.025},
        ),
        model=JEPAConfig(encoder=PatchConv(hidden=512), block=8),
        training=TrainingConfig(steps=5000, batch=160, horizon=3, validate_every=1000, checkpoint_every=1000),
        hierarchy=(CoarseConfig(stride=2, steps=1500), CoarseConfig(stride=2, steps=1500)),
        methods={
            "random": RandomMethod(),
            "behaviour cloning": CloningMethod(),
            "CEM, latent L2": PlanMethod(),
            "CEM, learned distance": PlanMethod(metric="distance"),
            "tree search": PlanMethod(solver=TreeSearch(), horizon=24),
            "hierarchy": hierarchy,
            "landmarks": LandmarkMethod(solver=thorough, exploring=quick),
            "landmarks and hierarchy": LandmarkMethod(solver=thorough, exploring=quick, beyond=hierarchy),
        },
        default_method="landmarks",
        protocol="maze-200@1",
    )


@RECIPES.register("pits")
def pits() -> Recipe:
    """One room with three pits at random places in each episode; an agent that falls into a pit stays there."""
    away = KeepIn(quantity="pit_depth", region=Box(high=(0.0,)), reason="an agent that falls into a pit cannot get out")
    # The precision of the probe determines the margins. It depends on the number of layouts: hold out only a few, and
    # mirror and turn the others.
    depth = LabelledProbe(
        episodes=24_000, hidden=(128, 128), steps=8000, between=(-8.0, 4.0), held_out=0.05, symmetric=True
    )
    return Recipe(
        name="pits",
        description="A room with three pits in 64x64 RGB, at random places in each episode; a fall ends the episode.",
        # Many short episodes, because accuracy in a new layout depends on the number of other layouts in the data.
        collection=CollectionConfig(env_id="worldloom/Pits-v0", episodes=24_000, steps=14),
        model=JEPAConfig(encoder=PatchConv(hidden=512), latent_dim=128, block=2),
        training=TrainingConfig(steps=7000, batch=128, horizon=3, validate_every=1000, checkpoint_every=1000),
        distance=DistanceConfig(hidden=(128, 64)),  # as good as twice the width (docs/log.md)
        probes={"pit_depth": depth, "position": LabelledProbe(episodes=2000)},
        # An agent that stops where the margins leave no plan stops for good, so it moves away from the pits instead.
        rules=RuleLayer(owner="the recipe", risk=0.05, guardrails={"out of the pits": away}, fallback=Hold()),
        methods={
            "random": RandomMethod(),
            "behaviour cloning": CloningMethod(),
            "no guardrail": PlanMethod(guard="none"),
            "penalty": PlanMethod(guard="penalty"),
            "uncalibrated": PlanMethod(guard="uncalibrated"),
            "per candidate": PlanMethod(guard="per candidate"),
            "calibrated": PlanMethod(certified="followed"),
        },
        default_method="calibrated",
        protocol="pits@1",
    )


def _with_history() -> TrainingConfig:
    losses = {**default_losses(), "inverse-dynamics": InverseDynamics(weight=3.0, frames=3)}
    return TrainingConfig(losses=losses)


@RECIPES.register("generic")
def generic() -> Recipe:
    """Any dataset, with two frames of history, because a single frame may not show velocities."""
    return Recipe(
        name="generic",
        description="Any dataset of pixels, vectors or both; two frames of history, as one may not show velocities.",
        model=JEPAConfig(context=2, encoder=None),
        training=_with_history(),
    )
