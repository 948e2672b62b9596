"""Goal-conditioned inverse dynamics on frozen latents: acts without a search, or proposes plans to the search."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from worldloom.agents.environment_batch import EnvironmentBatch
from worldloom.agents.history import History
from worldloom.core.progress import SILENT, Progress
from worldloom.core.seams import Agent, WorldModel
from worldloom.core.seeds import seeded_weights, torch_generator
from worldloom.core.types import Context, Goal, ModelSpec, Observations
from worldloom.heads import BlockDensity, BlockDensityConfig, LatentEpisodes, Mixture


class GoalInverseConfig(BlockDensityConfig):
    """The network of goal-conditioned inverse dynamics, and the pairs of states that it learns from.

    A pair is a frame of the logs and a goal: a later frame of the same episode, at most `reach` blocks ahead
    (hindsight relabelling). The network predicts the next `chunk` recorded blocks.
    """

    reach: int = Field(default=12, ge=1)
    chunk: int = Field(default=4, ge=1)


class GoalInverse(BlockDensity[GoalInverseConfig]):
    """Maps a context and a goal latent to a distribution of the next `chunk` blocks.

    Goal-conditioned inverse dynamics is goal-conditioned supervised learning (Ghosh et al., arXiv 1912.06088) on the
    latents of a frozen encoder.
    """

    kind = "goal-inverse"
    config_type = GoalInverseConfig

    def __init__(self, spec: ModelSpec, config: GoalInverseConfig) -> None:
        super().__init__(spec, config, chunk=config.chunk, given=spec.latent_dim)

    def forward(self, context: Context, goal: Float[Tensor, "B D"]) -> Float[Tensor, "B T A"]:
        """Return the blocks of the most probable component's mean, in environment units and within bounds."""
        weights, means, _ = self.mixture(context, goal)
        rows = torch.arange(len(means), device=means.device)
        return self.in_bounds(means[rows, weights.argmax(1)])

    def sample(
        self, context: Context, goal: Float[Tensor, "B D"], count: int, generator: torch.Generator
    ) -> Float[Tensor, "B _ T A"]:
        """Sample `count` chunks of blocks from the mixture, in environment units and within bounds."""
        weights, means, spreads = self.mixture(context, goal)
        chosen = torch.multinomial(weights.exp(), count, replacement=True, generator=generator)
        rows = torch.arange(len(means), device=means.device)[:, None]
        noise = torch.randn(*chosen.shape, self.outputs, generator=generator, device=means.device)
        return self.in_bounds(means[rows, chosen] + spreads[rows, chosen].exp() * noise)

    def mixture(self, context: Context, goal: Float[Tensor, "B D"]) -> Mixture:
        """Return the components of the distribution, in normalised actions."""
        return self.mixture_of(context, goal - context.latents[:, -1])


def fit_goal_inverse(
    model: WorldModel,
    episodes: LatentEpisodes,
    config: GoalInverseConfig,
    *,
    seed: int,
    progress: Progress = SILENT,
) -> GoalInverse:
    """Fit goal-conditioned inverse dynamics on the episodes: minimise the negative log-likelihood of their blocks.

    Blocks after the goal, and after the end of the episode, do not count.
    """
    device = episodes.latents.device
    generator = torch_generator(seed, "goal-inverse", device=device)
    with seeded_weights(seed, "goal-inverse", "weights"):
        policy = GoalInverse(model.spec, config).to(device)
    policy.scale(episodes)
    steps = torch.arange(config.chunk, device=device)

    def loss(step: int) -> Tensor:
        episode, frame, goal = _hindsight(episodes, config, generator)
        ahead = frame[:, None] + steps
        following = episodes.blocks[episode[:, None], ahead.clamp_max(episodes.blocks.shape[1] - 1)]
        context = episodes.context(episode, frame, model.spec.context)
        mixture = policy.mixture(context, episodes.latents[episode, goal])
        fits = policy.log_density(mixture, following, (ahead < goal[:, None]).float())
        return -fits.mean() / config.chunk

    policy.fit(loss, progress)
    return policy


def _hindsight(
    episodes: LatentEpisodes, config: GoalInverseConfig, generator: torch.Generator
) -> tuple[Int[Tensor, "M"], Int[Tensor, "M"], Int[Tensor, "M"]]:
    """Return episodes, frames in them, and goals: later frames, at most `reach` blocks ahead."""
    device = generator.device
    episode = torch.randint(len(episodes), (config.batch,), generator=generator, device=device)
    share, ahead = torch.rand(2, config.batch, generator=generator, device=device)
    last = episodes.lengths[episode] - 1
    frame = (share * last).long()
    return episode, frame, frame + 1 + (ahead * (last - frame).clamp_max(config.reach)).long()


@dataclass(frozen=True, kw_only=True)
class GoalInverseProposer:
    """Proposes plans for the search to start from: the policy's plan, and `samples` more from its distribution."""

    policy: GoalInverse
    generator: torch.Generator
    samples: int = 15

    def __call__(self, context: Context, goal: Float[Tensor, "B D"], horizon: int) -> Float[Tensor, "B I T A"]:
        """Return plans of `horizon` blocks; after the policy's chunk, its last block is repeated."""
        best, drawn = self.policy(context, goal), self.policy.sample(context, goal, self.samples, self.generator)
        plans = torch.cat([best[:, None], drawn], dim=1)[:, :, :horizon]
        rest = plans[:, :, -1:].expand(-1, -1, horizon - plans.shape[2], -1)
        return torch.cat([plans, rest], dim=2)


class GoalInverseAgent(Agent):
    """Executes the first `blocks` blocks that the policy predicts, then calls the policy with a new observation."""

    narrows = True

    def __init__(self, model: WorldModel, policy: GoalInverse, *, blocks: int = 1) -> None:
        self._model, self._policy, self._blocks = model, policy, blocks
        self._batch = EnvironmentBatch()
        self._history = History(model=model)
        self._goal = torch.empty(0, 0)
        self._coming: list[Tensor] = []

    def reset(self, goal: Goal) -> None:
        """Forget the last episode and set a new goal for each environment."""
        self._batch.start(goal)
        self._history, self._coming = History(model=self._model), []
        with torch.inference_mode():
            self._goal = self._model.encode(goal.observations.to(self._model.device))

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these environments, given by their places in the last batch, in this order."""
        places = self._batch.select(rows)
        self._history, self._goal = self._history[places], self._goal[places]
        self._coming = [actions[places] for actions in self._coming]

    def resume(self, taken: Float[Tensor, "B A"]) -> None:
        """Receive the environment actions that are applied at present; see `Actor.resume`."""
        self._history = self._history.corrected(taken)

    def act(self, observations: Observations) -> Float[Tensor, "B A"]:
        """Return the next environment action.

        Raises:
            PlanningError: `reset` was not called, or the last `reset` had a different number of environments.
        """
        self._batch.check(observations)
        self._history = self._history.seen(observations)
        if not self._coming:
            with torch.inference_mode():
                blocks = self._policy(self._history.context(), self._goal)[:, : self._blocks]
            self._coming = list(blocks.reshape(len(blocks), -1, self._model.spec.action.size).unbind(1))
        action = self._coming.pop(0)
        self._history = self._history.acted(action)
        return action
