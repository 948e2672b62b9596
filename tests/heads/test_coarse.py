"""Coarser models: what one step of theirs is, how well they predict it, and how they are kept."""

from pathlib import Path

import pytest
import torch

from wall_world import WallWorld
from worldloom.core.errors import CheckpointError, DataError
from worldloom.core.types import Context
from worldloom.heads import CoarseConfig, CoarseModel, LatentEpisodes, fit_coarse
from worldloom.testing import check_world_model

CONFIG = CoarseConfig(stride=3, hidden=(64, 64), steps=400, batch=256, dreams=1)


@pytest.fixture(scope="module")
def world() -> WallWorld:
    return WallWorld()


@pytest.fixture(scope="module")
def coarse(world: WallWorld) -> CoarseModel:
    return fit_coarse(world, world.episodes(), CONFIG, seed=0)


def test_a_coarse_model_is_a_world_model(coarse: CoarseModel) -> None:
    check_world_model(coarse)
    assert coarse.spec.block == 1
    assert coarse.spec.action.size == CONFIG.code


def test_one_step_leads_where_the_blocks_of_its_macro_action_lead(world: WallWorld, coarse: CoarseModel) -> None:
    seen = coarse.coarsen(world.episodes(seed=1))
    here, there = seen.latents[:, 0], seen.latents[:, 1:4]
    context = Context(latents=here[:, None], actions=seen.blocks[:, :0])
    with torch.no_grad():
        predicted = coarse.rollout(context, seen.blocks[:, None, :3])[:, 0]
    errors = (predicted - there).norm(dim=-1).mean(0)
    moved = (there - here[:, None]).norm(dim=-1).mean(0)
    assert (errors < 0.4 * moved).all()


def test_episodes_are_seen_a_stride_apart_and_those_too_short_left_out(coarse: CoarseModel) -> None:
    latents = torch.arange(24.0).reshape(2, 6, 2) / 24
    blocks = torch.zeros(2, 5, 4)
    seen = coarse.coarsen(LatentEpisodes(latents=latents, blocks=blocks, lengths=torch.tensor([6, 3])), offset=1)
    assert seen.lengths.tolist() == [2]
    assert torch.equal(seen.latents[0], latents[0, [1, 4]])
    with pytest.raises(DataError, match="every episode is shorter than 3 blocks"):
        coarse.coarsen(LatentEpisodes(latents=latents, blocks=blocks, lengths=torch.tensor([3, 3])))


def test_a_coarser_one_is_fitted_on_it(world: WallWorld, coarse: CoarseModel) -> None:
    config = CONFIG.model_copy(update={"stride": 2, "steps": 20, "dream_horizon": 4})
    coarser = fit_coarse(coarse, coarse.coarsen(world.episodes()), config, seed=0)
    check_world_model(coarser)
    seen = coarser.coarsen(coarse.coarsen(world.episodes()))
    assert seen.step_length > coarse.coarsen(world.episodes()).step_length


def test_the_seed_alone_decides(world: WallWorld) -> None:
    config = CONFIG.model_copy(update={"steps": 3})
    first, second, other = (fit_coarse(world, world.episodes(), config, seed=seed) for seed in (0, 0, 1))
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(next(iter(first.parameters())), next(iter(other.parameters())))


def test_a_saved_model_is_the_same_and_belongs_to_the_one_below(
    world: WallWorld, coarse: CoarseModel, tmp_path: Path
) -> None:
    coarse.save(tmp_path / "coarse", world)
    loaded = CoarseModel.load(tmp_path / "coarse", world)
    latents, macros = torch.randn(5, 2), torch.randn(5, CONFIG.code)
    assert torch.equal(loaded.advance(latents, macros), coarse.advance(latents, macros))
    assert loaded.spec == coarse.spec
    assert loaded.spec.fingerprint != world.spec.fingerprint
    with pytest.raises(CheckpointError, match="fit the head again"):
        CoarseModel.load(tmp_path / "coarse", WallWorld(one_way=True))


def test_episodes_shorter_than_a_step_are_refused(world: WallWorld) -> None:
    with pytest.raises(DataError, match="the longest episode or dream has 3 states"):
        fit_coarse(world, world.episodes(length=2), CONFIG, seed=0)
