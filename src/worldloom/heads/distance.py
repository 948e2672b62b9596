"""A learned temporal distance: the number of environment steps from one latent to another."""

import copy

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from worldloom.core.actions import Walk
from worldloom.core.config import Sizes
from worldloom.core.errors import DataError
from worldloom.core.progress import SILENT, Progress
from worldloom.core.seams import Metric, WorldModel
from worldloom.core.seeds import seeded_weights, torch_generator
from worldloom.core.types import ModelSpec
from worldloom.heads.head import FitConfig, Head
from worldloom.heads.latent_episodes import LatentEpisodes, with_dreams
from worldloom.models import MLP, Activation, Norm, hidden_layer


class DistanceConfig(FitConfig):
    """The configuration of a `TemporalDistance` and its fit.

    A line is an episode or a dream. With probability `same_line`, a goal is a later state of the same line. Otherwise
    the goal is any state of the same episode or of one of its dreams or, with probability `anywhere`, any state of all
    data. Use `anywhere` only if all episodes have the same layout, because goals in a different layout are unreachable.
    Distances are capped at `longest` environment steps.
    """

    hidden: Sizes = Field(default=(256, 128), min_length=1)
    norm: Norm = "none"
    activation: Activation = "relu"
    steps: int = Field(default=2000, ge=1)
    expectile: float = Field(default=0.1, gt=0, lt=0.5)
    same_line: float = Field(default=0.6, ge=0, le=1)
    anywhere: float = Field(default=0.0, ge=0, le=1)
    discount: float = Field(
        default=0.15, gt=0, lt=1
    )  # the probability p of the geometric distribution of steps to a goal on the same line
    longest: float = Field(default=150.0, gt=0)
    follow: float = Field(default=0.02, gt=0, le=1)  # update rate of the target network, per step
    dreams: int = Field(default=4, ge=0)
    dream_horizon: int = Field(default=20, ge=1)
    walk: Walk = Walk()


class TemporalDistance(Head[DistanceConfig]):
    """The number of environment steps from a latent to a goal: at least 0, not symmetric.

    The first layer has one part for latents and one for goals, so the goal's part is computed
    only once for all candidates that share a goal.
    """

    kind = "temporal-distance"
    config_type = DistanceConfig

    def __init__(self, spec: ModelSpec, config: DistanceConfig) -> None:
        super().__init__()
        self.block, self.config = spec.block, config
        hidden = config.hidden
        self.from_latent = nn.Linear(spec.latent_dim, hidden[0])
        self.from_goal = nn.Linear(spec.latent_dim, hidden[0], bias=False)
        self.rest = nn.Sequential(
            *hidden_layer(hidden[0], config.norm, config.activation),
            MLP((*hidden, 1), config.norm, config.activation),
        )

    def forward(self, latents: Float[Tensor, "*#axes D"], goal: Float[Tensor, "*#axes D"]) -> Float[Tensor, "..."]:
        """Return the distance of each latent to each goal, broadcast against each other."""
        return self.block * self.blocks(latents, goal)

    def blocks(self, latents: Float[Tensor, "*#axes D"], goal: Float[Tensor, "*#axes D"]) -> Float[Tensor, "..."]:
        """Return the distance in model steps."""
        out: Tensor = self.rest(self.from_latent(latents) + self.from_goal(goal))
        return functional.softplus(out.squeeze(-1))


def fit_distance(
    episodes: LatentEpisodes,
    model: WorldModel,
    config: DistanceConfig,
    *,
    seed: int,
    progress: Progress = SILENT,
) -> TemporalDistance:
    """Fit a temporal distance by expectile bootstrapping.

    The target of d(z, g) is a low expectile of 1 + d(z', g) over the next states z'. A low expectile selects the
    shortest of the paths in the data (Kostrikov et al., arXiv 2110.06169, use a high one for values). A goal k steps
    later on the same line bounds the target by k. If layouts differ between episodes, no path leads from one layout to
    another. Goals then come from the same episode and from dreams in its layout.
    """
    spec, device = model.spec, episodes.latents.device
    generator = torch_generator(seed, "distance", device=device)
    with seeded_weights(seed, "distance", "weights"):
        distance = TemporalDistance(spec, config).to(device)
    target = copy.deepcopy(distance).requires_grad_(False).eval()
    lines = with_dreams(
        model, episodes, config.dreams, horizon=config.dream_horizon, walk=config.walk, generator=generator
    )
    pairs = _Pairs(lines, config, generator)
    longest = config.longest / spec.block

    def loss(step: int) -> Tensor:
        with torch.no_grad():
            for slow, fast in zip(target.parameters(), distance.parameters(), strict=True):
                slow.lerp_(fast, config.follow)
        state, following, goal, known = pairs.draw()
        with torch.no_grad():
            ahead = torch.where(known == 1, 0.0, target.blocks(following, goal))
            aim = torch.minimum(1 + ahead, known).clamp_max(longest)
        error = aim - distance.blocks(state, goal)
        weight = torch.where(error > 0, config.expectile, 1 - config.expectile)
        at_goal = distance.blocks(goal[: config.batch // 8], goal[: config.batch // 8])
        return (weight * error.square()).mean() + 0.1 * at_goal.square().mean()

    distance.fit(loss, progress)
    return distance


class _Pairs:
    """Samples states with their next states and with goals in the same layout."""

    def __init__(self, lines: list[LatentEpisodes], config: DistanceConfig, generator: torch.Generator) -> None:
        self._config, self._generator = config, generator
        longest = max(line.latents.shape[1] for line in lines)
        padded = [functional.pad(line.latents, (0, 0, 0, longest - line.latents.shape[1])) for line in lines]
        self._latents = torch.stack(padded)  # (lines, episodes, frames, D)
        self._lengths = torch.stack([line.lengths for line in lines])

    def draw(
        self,
    ) -> tuple[Float[Tensor, "M D"], Float[Tensor, "M D"], Float[Tensor, "M D"], Float[Tensor, "M"]]:
        """Return states, next states, goals, and the steps from state to goal along a line (infinite if unknown)."""
        config = self._config
        count, (lines, episodes) = config.batch, self._lengths.shape
        line, episode = self._integers(lines, count), self._integers(episodes, count)
        last = self._lengths[line, episode] - 1
        frame = (self._uniform(count) * last).long()
        # A later state of the same line at a geometrically distributed distance; else any state of a line in the
        # layout.
        jump = 1 + (self._uniform(count).clamp_min(1e-6).log() / np.log1p(-config.discount)).long()
        same = self._uniform(count) < config.same_line
        goal_line = torch.where(same, line, self._integers(lines, count))
        elsewhere = ~same & (self._uniform(count) < config.anywhere)
        goal_episode = torch.where(elsewhere, self._integers(episodes, count), episode)
        anywhere = (self._uniform(count) * self._lengths[goal_line, goal_episode]).long()
        goal_frame = torch.where(same, torch.minimum(frame + jump, last), anywhere)
        ahead = goal_frame - frame
        follows = (goal_line == line) & (goal_episode == episode) & (ahead >= 0)
        known = torch.where(follows, ahead.float(), torch.inf)
        return (
            self._latents[line, episode, frame],
            self._latents[line, episode, frame + 1],
            self._latents[goal_line, goal_episode, goal_frame],
            known,
        )

    def _integers(self, below: int, count: int) -> Tensor:
        return torch.randint(below, (count,), generator=self._generator, device=self._latents.device)

    def _uniform(self, count: int) -> Tensor:
        return torch.rand(count, generator=self._generator, device=self._latents.device)


def rank_correlation(
    metric: Metric, latents: Float[Tensor, "M D"], goals: Float[Tensor, "M D"], steps: Float[Tensor, "M"]
) -> float:
    """Return Spearman's rank correlation of a metric with the true steps between held-out pairs.

    Raises:
        DataError: there are fewer than two pairs, or all pairs are the same number of steps apart.
    """
    from scipy.stats import rankdata

    with torch.no_grad():
        measured = metric(latents, goals)
    ranks = [rankdata(values.cpu().numpy()) for values in (measured, steps)]
    if len(steps) < 2 or any(np.ptp(values) == 0 for values in ranks):
        raise DataError("a rank correlation needs at least two pairs with different numbers of steps; pass more pairs")
    return float(np.corrcoef(*ranks)[0, 1])
