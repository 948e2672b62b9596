"""The learned distance counts steps where Euclidean distance misleads."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from worldloom.core.actions import Walk
from worldloom.core.errors import CheckpointError, DataError
from worldloom.heads import DistanceConfig, LatentEpisodes, TemporalDistance, fit_distance, rank_correlation
from worldloom.planning import LatentL2
from worldloom.testing import LinearWorld

# A horseshoe: the ends are two apart and twenty steps of one from each other.
STEPS = torch.arange(21.0)
ANGLE = STEPS / 20 * 1.6 * torch.pi
CHAIN = torch.stack([ANGLE.cos(), ANGLE.sin()], dim=-1)


def walks(count: int = 200, length: int = 30) -> LatentEpisodes:
    """Return persistent walks to and fro on the chain, each only over a part of it."""
    generator = torch.Generator().manual_seed(0)
    place = torch.randint(0, 21, (count,), generator=generator)
    direction = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    places = [place]
    for _ in range(length):
        turn = torch.rand(count, generator=generator) < 0.15
        direction = torch.where(turn, -direction, direction)
        direction = torch.where(place == 0, 1, torch.where(place == 20, -1, direction))
        place = place + direction
        places.append(place)
    latents = CHAIN[torch.stack(places, dim=1)]
    return LatentEpisodes(
        latents=latents, blocks=torch.zeros(count, length, 4), lengths=torch.full((count,), length + 1)
    )


@pytest.fixture(scope="module")
def learned() -> TemporalDistance:
    # Every walk is in the same layout: goals from anywhere can be reached.
    config = DistanceConfig(
        hidden=(64, 64), steps=1500, batch=256, learning_rate=2e-3, dreams=0, anywhere=0.5, follow=0.1, longest=80
    )
    return fit_distance(walks(), LinearWorld(block=2), config, seed=0)


def pairs() -> tuple[Tensor, Tensor, Tensor]:
    state, goal = torch.meshgrid(torch.arange(21), torch.arange(21), indexing="ij")
    state, goal = state.flatten(), goal.flatten()
    return CHAIN[state], CHAIN[goal], 2.0 * (state - goal).abs().float()


def test_ranks_states_by_steps_where_l2_is_wrong(learned: TemporalDistance) -> None:
    latents, goals, steps = pairs()
    assert rank_correlation(learned, latents, goals, steps) > 0.95
    far = steps > 20  # more than half of the way: there the chain bends back
    assert rank_correlation(learned, latents[far], goals[far], steps[far]) > 0.6
    assert rank_correlation(LatentL2(), latents[far], goals[far], steps[far]) < 0.0
    # The ends: next to each other for the eye, and the longest way on foot.
    ends, middle = (CHAIN[0], CHAIN[20]), (CHAIN[0], CHAIN[10])
    assert LatentL2()(*ends) < LatentL2()(*middle)
    assert learned(*ends) > learned(*middle) > learned(CHAIN[0], CHAIN[3])


def test_counts_environment_steps(learned: TemporalDistance) -> None:
    latents, goals, steps = pairs()
    with torch.no_grad():
        error = (learned(latents, goals) - steps).abs()
    assert error.mean() < 4.0, "blocks are two environment steps long and the way is up to forty"
    assert learned(CHAIN, CHAIN).mean() < 1.0


def test_broadcasts_a_goal_over_candidates(learned: TemporalDistance) -> None:
    latents, goal = torch.rand(2, 3, 4, 2), torch.rand(2, 2)
    with torch.no_grad():
        together = learned(latents, goal[:, None, None])
        apart = torch.stack([learned(latents[row], goal[row].expand(3, 4, 2)) for row in range(2)])
    assert together.shape == (2, 3, 4)
    assert torch.allclose(together, apart, atol=1e-5)
    assert (together >= 0).all()


def test_goals_stay_in_the_layout_of_their_episode() -> None:
    # Two layouts that never meet; a goal in the other one must not be drawn.
    generator = torch.Generator().manual_seed(0)
    offset = torch.tensor([0.0, 100.0]).repeat(20)[:, None, None]
    steps = 0.1 * torch.randn(40, 10, 2, generator=generator)
    latents = torch.cat([torch.zeros(40, 1, 2), steps.cumsum(1)], dim=1) + offset
    episodes = LatentEpisodes(
        latents=latents, blocks=torch.zeros(40, 10, 2), lengths=torch.randint(3, 12, (40,), generator=generator)
    )
    from worldloom.heads.distance import _Pairs
    from worldloom.heads.latent_episodes import with_dreams

    lines = with_dreams(LinearWorld(), episodes, 2, horizon=4, walk=Walk(), generator=generator)
    pairs = _Pairs(lines, DistanceConfig(batch=4096), generator)
    state, following, goal, known = pairs.draw()
    assert ((state - goal).norm(dim=-1) < 50).all()
    assert ((state - following).norm(dim=-1) < 3).all()
    assert known.isfinite().any()
    assert known.isinf().any()
    assert (known[known.isfinite()] >= 0).all()


def test_a_saved_distance_is_the_same(learned: TemporalDistance, tmp_path: Path) -> None:
    world = LinearWorld(block=2)
    learned.save(tmp_path / "distance", world)
    back = TemporalDistance.load(tmp_path / "distance", world)
    assert torch.equal(back(CHAIN, CHAIN[:1]), learned(CHAIN, CHAIN[:1]))
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(CheckpointError):
        TemporalDistance.load(tmp_path / "distance", world)


def test_a_rank_correlation_needs_pairs_that_differ() -> None:
    same = torch.ones(4, 2)
    with pytest.raises(DataError, match="different numbers of steps"):
        rank_correlation(LatentL2(), same, same, torch.arange(4.0))
