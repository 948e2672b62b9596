"""Goal-conditioned behaviour cloning: a baseline that imitates the data without a world model."""

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from worldloom.agents.policy_agent import PolicyAgent
from worldloom.core.actions import project
from worldloom.core.config import Size, Sizes
from worldloom.core.progress import SILENT, Progress
from worldloom.core.seams import WorldModel
from worldloom.core.seeds import numpy_generator, seeded_weights
from worldloom.core.types import ActionBounds, ActionSpec, ModelSpec, Observations, ObservationSpec
from worldloom.data import Frames, Statistics, compute_statistics
from worldloom.heads import FitConfig, Head
from worldloom.models import MLP, LatentNorm
from worldloom.models.encoders import EncoderConfig, EncoderField, default_encoder


class CloningConfig(FitConfig):
    """The policy's network and its training; without an `encoder`, the default for the observation is used.

    A step of training uses `batch` groups of frames. A group is a frame and `goals` frames that are sampled uniformly
    from the next `reach` steps of its episode. Each frame of a group is a state whose goals are the group's later
    frames, so a frame is encoded once for several pairs.
    """

    encoder: EncoderField | None = None
    latent_dim: Size = 64
    hidden: Sizes = Field(default=(256, 256), min_length=1)
    reach: int = Field(default=50, ge=1)
    goals: int = Field(default=1, ge=1)
    batch: int = Field(default=256, ge=2)


class CloningPolicy(Head[CloningConfig]):
    """Maps (observation, goal observation) to the next environment action, within bounds.

    The policy has its own encoder and does not use a world model, although its file contains the model's fingerprint.
    """

    kind = "behaviour-cloning"
    config_type = CloningConfig

    def __init__(
        self, observation: ObservationSpec, action: ActionSpec, config: CloningConfig, statistics: Statistics
    ) -> None:
        super().__init__()
        self.config, self.observation, self.action = config, observation, action
        encoder = config.encoder or default_encoder(observation)
        assert isinstance(encoder, EncoderConfig)
        self.encoder = encoder.build(observation, statistics, config.latent_dim)
        self.norm = LatentNorm(config.latent_dim)
        self.head = MLP((2 * config.latent_dim, *config.hidden, action.size))
        self._spec = ModelSpec(observation=observation, action=action, block=1, context=1, latent_dim=config.latent_dim)

    def figures(self) -> dict[str, Any]:
        """Return the specifications of the policy's observations and actions."""
        return {"observation": asdict(self.observation), "action": asdict(self.action)}

    @classmethod
    def build(cls, model: WorldModel, config: CloningConfig, **figures: Any) -> "CloningPolicy":
        """Build an untrained policy for the observations and actions that `figures` specifies."""
        observation = ObservationSpec.from_json(figures["observation"])
        action = ActionSpec.from_json(figures["action"])
        # The statistics are buffers, loaded with the tensors; only their shapes matter here.
        return cls(observation, action, config, Statistics.unit(observation, action))

    def encode(self, observations: Observations) -> Float[Tensor, "B D"]:
        """Encode observations or goals.

        Raises:
            DataError: the observations differ in kind or size from the training data.
        """
        self.observation.check(observations)
        latents: Tensor = self.norm(self.encoder(observations))
        return latents

    def normalised(self, state: Float[Tensor, "B D"], goal: Float[Tensor, "B D"]) -> Float[Tensor, "B A"]:
        """Return the action as in the loss: its offset from the middle of the bounds, in units of half their range."""
        action: Tensor = self.head(torch.cat([state, goal], dim=-1))
        return action

    def forward(self, state: Float[Tensor, "B D"], goal: Float[Tensor, "B D"]) -> Float[Tensor, "B A"]:
        """Return the action in environment units, within bounds."""
        bounds = ActionBounds.of(self._spec, state.device)
        half = (bounds.high - bounds.low) / 2
        return project(bounds.low + half + half * self.normalised(state, goal), self._spec, bounds)


def fit_behaviour_cloning(
    cache: Frames,
    config: CloningConfig,
    *,
    episodes: np.ndarray | None = None,
    seed: int,
    device: torch.device | str = "cpu",
    progress: Progress = SILENT,
) -> CloningPolicy:
    """Fit a policy that imitates the recorded action in a frame, given a later frame of the episode as its goal.

    See Ghosh et al., arXiv 1912.06088.
    """
    generator = numpy_generator(seed, "behaviour-cloning")
    action = cache.spec.action
    with seeded_weights(seed, "behaviour-cloning", "weights"):
        statistics = compute_statistics(cache, seed=seed, episodes=episodes)
        policy = CloningPolicy(cache.spec.observation, action, config, statistics).to(device)
    chosen = np.arange(len(cache.lengths)) if episodes is None else np.asarray(episodes)
    # Every frame with an action has the same probability.
    frames = np.concatenate([cache.starts[e] + np.arange(cache.lengths[e]) for e in chosen])
    lasts = np.repeat(cache.starts[chosen] + cache.lengths[chosen], cache.lengths[chosen])
    low, high = np.array(action.low, np.float32), np.array(action.high, np.float32)
    states, aims = np.triu_indices(config.goals + 1, 1)

    def look(rows: np.ndarray) -> Observations:
        return Observations.from_numpy(
            None if cache.pixels is None else cache.pixels[rows],
            None if cache.vector is None else cache.vector[rows],
        ).to(device)

    def loss(step: int) -> Tensor:
        drawn = generator.integers(len(frames), size=config.batch)
        ahead = np.minimum(lasts[drawn] - frames[drawn], config.reach)
        goals = 1 + (generator.random((config.batch, config.goals)) * ahead[:, None]).astype(np.int64)
        rows = (frames[drawn][:, None] + np.sort(np.pad(goals, ((0, 0), (1, 0))))).T
        latents = policy.encode(look(rows.ravel())).unflatten(0, rows.shape)
        distinct = rows[states] < rows[aims]  # two goals can be the same frame
        taken = 2 * (cache.actions[rows[states]][distinct] - low) / (high - low) - 1
        pairs = torch.from_numpy(distinct).to(device)
        predicted = policy.normalised(latents[states][pairs], latents[aims][pairs])
        return (predicted - torch.from_numpy(taken).to(device)).square().mean()

    policy.fit(loss, progress)
    return policy


class BehaviourCloningAgent(PolicyAgent):
    """Applies the cloned policy to a new observation at every environment step."""

    def __init__(self, policy: CloningPolicy) -> None:
        device = next(policy.parameters()).device
        super().__init__(
            lambda observations: policy.encode(observations.to(device)),
            lambda latents, goal: policy(latents, goal)[:, None],
        )
