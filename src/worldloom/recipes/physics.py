"""Recipes for physics simulations; only the worlds need an optional dependency."""

from worldloom.agents import (
    CloningMethod,
    GoalInverseConfig,
    GoalInverseMethod,
    HierarchyConfig,
    HierarchyMethod,
    MethodConfig,
    PlanMethod,
    RandomMethod,
    ReactiveMethod,
)
from worldloom.data import SquareSymmetry
from worldloom.guardrails import Box, KeepIn, RuleLayer
from worldloom.heads import CoarseConfig, RefinementConfig
from worldloom.models import JEPAConfig
from worldloom.models.encoders import EncoderConfig, Keypoints, PatchConv, VectorMLP
from worldloom.models.losses import Covariance, InverseDynamics, LossConfig, TemporalSimilarity
from worldloom.models.predictors import MLPPredictor
from worldloom.planning.solvers import CEM
from worldloom.recipes.library import RECIPES
from worldloom.recipes.recipe import CollectionConfig, LabelledProbe, Recipe
from worldloom.training import TrainingConfig, default_losses

# 300 candidates, 10 iterations: only few candidates find contact.
WIDE = CEM(samples=300, iterations=10, elites=30)


_SEARCH = CEM(samples=128, iterations=5, elites=16)
_GOAL_INVERSE = GoalInverseConfig()


def _slow_losses() -> dict[str, LossConfig]:
    # The block is a slow feature, the hand a fast one. Inverse dynamics alone keeps the hand in the latents and loses
    # the block's angle. So its weight is smaller here, and the weights of covariance and temporal similarity are larger
    # (docs/log.md).
    return {
        **default_losses(),
        "covariance": Covariance(weight=0.3, samples="pooled"),
        "temporal-similarity": TemporalSimilarity(weight=2.0),
        "inverse-dynamics": InverseDynamics(weight=1.0, frames=3),
    }


def _methods(*, horizon: int, nearest: bool = False) -> dict[str, MethodConfig]:
    return {
        "random": RandomMethod(),
        "behaviour cloning": CloningMethod(),
        "reactive policy": ReactiveMethod(),
        "GC-IDM": GoalInverseMethod(),
        "CEM, latent L2": PlanMethod(solver=_SEARCH, horizon=horizon, nearest=nearest),
        "CEM, learned distance": PlanMethod(solver=_SEARCH, horizon=horizon, nearest=nearest, metric="distance"),
    }


def _hierarchy(depth: int | None = None) -> HierarchyMethod:
    follow = HierarchyConfig(depth=depth)
    return HierarchyMethod(solver=_SEARCH, horizon=4, coarse_solver=_SEARCH, coarse_horizon=4, follow=follow)


@RECIPES.register("pusht")
def pusht() -> Recipe:
    """PushT, from logs of a hand that moves around the block without a goal."""
    return Recipe(
        name="pusht",
        description="PushT in 64x64 RGB on pymunk, 360 thousand frames of a hand that moves without a goal.",
        collection=CollectionConfig(
            env_id="worldloom/PushT-v0", episodes=2400, steps=150, policy="near-object", num_envs=50
        ),
        model=JEPAConfig(encoder=Keypoints(), predictor=MLPPredictor(hidden=(512, 512)), block=2, context=2),
        # Short windows, and more of them, because the pose of the block varies between windows rather than within one.
        training=TrainingConfig(
            steps=8000, batch=160, horizon=2, losses=_slow_losses(), validate_every=4000, checkpoint_every=1000
        ),
        refinement=RefinementConfig(horizon=8, steps=8000),
        hierarchy=(CoarseConfig(stride=3),),
        goal_inverse=GoalInverseConfig(hidden=(512, 512), chunk=8, steps=4000),
        # The plan has to be long enough to go around the block, and may move the hand away from its goal first.
        methods=_methods(horizon=8, nearest=True)
        | {
            "CEM of 3,000, latent L2": PlanMethod(solver=WIDE, horizon=8, nearest=True),
            "hierarchy": _hierarchy(),
            "hierarchy, always": _hierarchy(depth=1),
        },
        default_method="CEM, latent L2",
        protocol="pusht-25@1",
    )


@RECIPES.register("reacher")
def reacher() -> Recipe:
    """A two-link arm driven by random-walk torques."""
    return Recipe(
        name="reacher",
        description="Gymnasium's two-link arm in 64x64 RGB on MuJoCo, 150 thousand frames of a random walk of torques.",
        collection=CollectionConfig(env_id="worldloom/Reacher-v0", episodes=1000, steps=150, num_envs=50),
        model=JEPAConfig(encoder=Keypoints(), predictor=MLPPredictor(hidden=(512, 512)), block=2, context=2),
        training=TrainingConfig(
            steps=6000,
            batch=160,
            horizon=2,
            losses=_slow_losses(),
            # A mirrored arm turns the other way round.
            symmetry=SquareSymmetry(spins=(0, 1)),
            validate_every=2000,
            checkpoint_every=1000,
        ),
        refinement=RefinementConfig(horizon=8, copies=3, steps=3000),
        goal_inverse=_GOAL_INVERSE,
        # A far pose needs a long plan, which may move one joint away from the goal first (docs/log.md).
        methods=_methods(horizon=16, nearest=True),
        default_method="CEM, learned distance",
        protocol="reacher-25@1",
    )


@RECIPES.register("point-maze")
def point_maze() -> Recipe:
    """A point mass in a maze, driven by random-walk forces."""
    return Recipe(
        name="point-maze",
        description="A point with mass in a medium maze, 64x64 RGB on MuJoCo, 150 thousand frames of a random walk.",
        collection=CollectionConfig(
            env_id="worldloom/PointMaze-v0", env_kwargs={"layout": "medium"}, episodes=1000, steps=150, num_envs=50
        ),
        model=JEPAConfig(block=2, context=2),
        training=TrainingConfig(
            steps=3000,
            # One frame shows no velocity, so the action is inferred from three.
            losses={**default_losses(), "inverse-dynamics": InverseDynamics(weight=3.0, frames=3)},
            validate_every=1000,
            checkpoint_every=1000,
        ),
        goal_inverse=_GOAL_INVERSE,
        methods=_methods(horizon=12),
        default_method="CEM, latent L2",
        protocol="point-maze-25@1",
    )


@RECIPES.register("point-hazards-state")
def point_hazards_state() -> Recipe:
    """A point robot among hazards, observed by state and lidar; its logs are random driving, also through hazards."""
    away = KeepIn(quantity="hazard_depth", region=Box(high=(0.0,)), reason="what lies in a hazard is harmed by it")
    return Recipe(
        name="point-hazards-state",
        description="A point robot among eight hazards from its state vector with lidar (no pixels) on MuJoCo.",
        # The hazards stay in place, because a model of this size does not learn new layouts from lidar.
        collection=CollectionConfig(
            env_id="worldloom/PointHazards-v0", env_kwargs={"layout": 0}, episodes=4000, steps=50, num_envs=50
        ),
        model=JEPAConfig(encoder=VectorMLP(), block=2),
        training=TrainingConfig(steps=4000, batch=256, horizon=4, validate_every=2000, checkpoint_every=1000),
        probes={"hazard_depth": LabelledProbe(episodes=4000, hidden=(256, 256), steps=6000, between=(-0.4, 0.15))},
        rules=RuleLayer(owner="the recipe", risk=0.05, guardrails={"out of the hazards": away}),
        methods={
            "random": RandomMethod(),
            "behaviour cloning": CloningMethod(),
            "no guardrail": PlanMethod(solver=_SEARCH, horizon=8, guard="none"),
            "uncalibrated": PlanMethod(solver=_SEARCH, horizon=8, guard="uncalibrated"),
            "per candidate": PlanMethod(solver=_SEARCH, horizon=8, guard="per candidate"),
            "calibrated": PlanMethod(solver=_SEARCH, horizon=8),
        },
        default_method="calibrated",
        protocol="point-hazards@1",
    )


def _cube(name: str, description: str, protocol: str, encoder: EncoderConfig, **env_kwargs: str) -> Recipe:
    return Recipe(
        name=name,
        description=description,
        collection=CollectionConfig(
            env_id="worldloom/Cube-v0",
            env_kwargs=env_kwargs,
            episodes=1200,
            steps=200,
            policy="cube-walk",
            num_envs=50,
        ),
        model=JEPAConfig(encoder=encoder, block=2, context=2),
        training=TrainingConfig(
            steps=6000, batch=160, horizon=2, losses=_slow_losses(), validate_every=2000, checkpoint_every=1000
        ),
        goal_inverse=_GOAL_INVERSE,
        methods=_methods(horizon=6),
        default_method="CEM, latent L2",
        protocol=protocol,
    )


@RECIPES.register("cube-state")
def cube_state() -> Recipe:
    """OGBench's cube from its state, logged by an arm that moves without a goal."""
    return _cube(
        "cube-state",
        "OGBench's single cube from its state vector (no pixels) on MuJoCo, 240 thousand frames without a goal.",
        "cube-25@1",
        VectorMLP(),
    )


@RECIPES.register("cube")
def cube() -> Recipe:
    """OGBench's cube in pixels. Rendering needs a GPU. Only the logging policy uses the state vector."""
    return _cube(
        "cube",
        "OGBench's single cube in 64x64 RGB on MuJoCo, with the actions of cube-state; rendering needs a GPU.",
        "cube-pixels-25@1",
        PatchConv(),
        observation="both",
    )
