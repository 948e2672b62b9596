"""The predictor is refined on frozen latents."""

import pytest
import torch

from worldloom.core.errors import DataError
from worldloom.core.types import ActionSpec, Context, ObservationSpec
from worldloom.data import Statistics
from worldloom.heads import LatentEpisodes, RefinementConfig, refine_predictor
from worldloom.models import JEPA, JEPAConfig, build_jepa
from worldloom.models.encoders import VectorMLP
from worldloom.models.predictors import MLPPredictor

CONFIG = RefinementConfig(horizon=4, steps=1000, batch=64)


@pytest.fixture(scope="module")
def model() -> JEPA:
    observation, action = ObservationSpec(vector=2), ActionSpec(low=(-1.0,), high=(1.0,))
    config = JEPAConfig(
        encoder=VectorMLP(hidden=(8,)), predictor=MLPPredictor(hidden=(32,)), latent_dim=2, block=1, context=2
    )
    return build_jepa(config, observation, action, Statistics.unit(observation, action), seed=0).eval()


def episodes(seed: int = 0, steps: int = 12) -> LatentEpisodes:
    """Positions that follow the sum of the actions, and velocities that remain: two frames show the state."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.rand(64, steps, 1, generator=generator) * 2 - 1
    speed = 0.2 * blocks.cumsum(1)
    start = torch.randn(64, 1, 2, generator=generator)
    moved = torch.cat([torch.zeros(64, 1, 1), speed.cumsum(1)], dim=1)
    return LatentEpisodes(latents=start + moved, blocks=blocks, lengths=torch.full((64,), steps + 1))


def error(model: JEPA, seen: LatentEpisodes) -> float:
    context = Context(latents=seen.latents[:, 2:4], actions=seen.blocks[:, 2:3])
    with torch.no_grad():
        predicted = model.rollout(context, seen.blocks[:, None, 3:7])[:, 0]
    return float((predicted - seen.latents[:, 4:8]).square().mean())


def test_refinement_lowers_the_open_loop_error_and_leaves_all_else(model: JEPA) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    refined = refine_predictor(model, [episodes(), episodes(1)], CONFIG, seed=0)
    assert error(refined, episodes(2)) < 0.1 * error(model, episodes(2))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    after = refined.state_dict()
    assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == {"predictor"}
    assert not refined.training


def test_the_seed_determines_the_refined_predictor(model: JEPA) -> None:
    quick = CONFIG.model_copy(update={"steps": 3})
    first, again, other = (
        refine_predictor(model, [episodes()], quick, seed=seed).predictor.state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_windows_stay_within_their_episode(model: JEPA) -> None:
    seen = episodes()
    latents = seen.latents.clone()
    latents[:, 6:] = torch.nan  # beyond the end: never read
    short = LatentEpisodes(latents=latents, blocks=seen.blocks, lengths=torch.full((64,), 6))
    refine_predictor(model, [short], CONFIG.model_copy(update={"steps": 20}), seed=0)  # a NaN would raise


def test_episodes_shorter_than_the_horizon_are_an_error(model: JEPA) -> None:
    with pytest.raises(DataError, match="at least 20 blocks, the horizon of the predictor's refinement; the longest"):
        refine_predictor(model, [episodes()], CONFIG.model_copy(update={"horizon": 20}), seed=0)
