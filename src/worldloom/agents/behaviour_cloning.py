"""Goal-conditioned behaviour cloning: the baseline that imitates the data and has no world model."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from worldloom.agents.environment_batch import EnvironmentBatch
from worldloom.core.actions import project
from worldloom.core.config import Config
from worldloom.core.errors import CheckpointError, ConfigError
from worldloom.core.progress import SILENT, Progress
from worldloom.core.seams import Agent
from worldloom.core.seeds import derive_seed, numpy_generator
from worldloom.core.types import ActionBounds, ActionSpec, Goal, ModelSpec, Observations, ObservationSpec
from worldloom.data import Frames, Statistics, compute_statistics
from worldloom.models import MLP, LatentNorm, fit_head, load_tensors, save_tensors
from worldloom.models.encoders import EncoderConfig, EncoderField, default_encoder

_KIND = "behaviour-cloning"


class CloningConfig(Config):
    """The network and its fit; `encoder` of None takes the one that suits what is observed.

    A goal is a frame of the same episode, drawn uniformly from the `reach` steps that follow.
    """

    encoder: EncoderField | None = None
    latent_dim: int = Field(default=64, ge=1)
    hidden: tuple[int, ...] = Field(default=(256, 256), min_length=1)
    reach: int = Field(default=50, ge=1)
    steps: int = Field(default=1000, ge=1)
    batch: int = Field(default=256, ge=2)
    learning_rate: float = Field(default=1e-3, gt=0)


class CloningPolicy(nn.Module):
    """(observation, goal observation) -> the next environment action, within bounds."""

    def __init__(
        self, config: CloningConfig, observation: ObservationSpec, action: ActionSpec, statistics: Statistics
    ) -> None:
        super().__init__()
        self.config, self.observation, self.action = config, observation, action
        encoder = config.encoder or default_encoder(observation)
        assert isinstance(encoder, EncoderConfig)
        self.encoder = encoder.build(observation, statistics, config.latent_dim)
        self.norm = LatentNorm(config.latent_dim)
        self.head = MLP((2 * config.latent_dim, *config.hidden, action.size))
        self._spec = ModelSpec(observation=observation, action=action, block=1, context=1, latent_dim=config.latent_dim)

    def encode(self, observations: Observations) -> Float[Tensor, "B D"]:
        """Encode observations or goals.

        Raises:
            DataError: an observation is not what the policy was trained on.
        """
        self.observation.check(observations)
        latents: Tensor = self.norm(self.encoder(observations))
        return latents

    def normalised(self, state: Float[Tensor, "B D"], goal: Float[Tensor, "B D"]) -> Float[Tensor, "B A"]:
        """Return the action in half ranges from the middle: what the fit compares."""
        action: Tensor = self.head(torch.cat([state, goal], dim=-1))
        return action

    def forward(self, state: Float[Tensor, "B D"], goal: Float[Tensor, "B D"]) -> Float[Tensor, "B A"]:
        """Return the action in environment units, within bounds."""
        bounds = ActionBounds.of(self._spec, state.device)
        half = (bounds.high - bounds.low) / 2
        return project(bounds.low + half + half * self.normalised(state, goal), self._spec, bounds)

    def save(self, stem: Path | str) -> str:
        """Write it; return the digest."""
        metadata = {
            "config": self.config.model_dump(mode="json"),
            "observation": asdict(self.observation),
            "action": asdict(self.action),
        }
        return save_tensors(stem, self.state_dict(), metadata, kind=_KIND)

    @classmethod
    def load(cls, stem: Path | str, device: torch.device | str = "cpu") -> "CloningPolicy":
        """Read what `save` wrote.

        Raises:
            CheckpointError: it is missing, damaged, or made by another version of a part.
        """
        tensors, metadata = load_tensors(stem, kind=_KIND)
        observation = ObservationSpec.from_json(metadata["observation"])
        action = ActionSpec.from_json(metadata["action"])
        try:
            policy = cls(
                CloningConfig.parse(metadata["config"]), observation, action, Statistics.unit(observation, action)
            )
            policy.load_state_dict(tensors)
        except (ConfigError, RuntimeError) as error:
            raise CheckpointError(f"{stem} cannot be built: {error}; fit it again") from None
        return policy.to(device).eval()


def fit_behaviour_cloning(
    cache: Frames,
    config: CloningConfig | None = None,
    *,
    episodes: np.ndarray | None = None,
    seed: int,
    device: torch.device | str = "cpu",
    progress: Progress = SILENT,
) -> CloningPolicy:
    """Imitate the action that was taken on the way to a later frame (Ghosh et al., arXiv 1912.06088)."""
    config = config or CloningConfig()
    generator = numpy_generator(seed, "behaviour-cloning")
    action = cache.spec.action
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "behaviour-cloning", "weights"))
        statistics = compute_statistics(cache, seed=seed, episodes=episodes)
        policy = CloningPolicy(config, cache.spec.observation, action, statistics).to(device)
    chosen = np.arange(len(cache.lengths)) if episodes is None else np.asarray(episodes)
    # Every frame with an action is as likely as any other.
    frames = np.concatenate([cache.starts[e] + np.arange(cache.lengths[e]) for e in chosen])
    lasts = np.repeat(cache.starts[chosen] + cache.lengths[chosen], cache.lengths[chosen])
    low, high = np.array(action.low, np.float32), np.array(action.high, np.float32)

    def look(rows: np.ndarray) -> Observations:
        return Observations.from_numpy(
            None if cache.pixels is None else cache.pixels[rows],
            None if cache.vector is None else cache.vector[rows],
        ).to(device)

    def loss(step: int) -> Tensor:
        drawn = generator.integers(len(frames), size=config.batch)
        rows = frames[drawn]
        ahead = np.minimum(lasts[drawn] - rows, config.reach)
        goals = rows + 1 + (generator.random(config.batch) * ahead).astype(np.int64)
        states, aims = policy.encode(look(np.concatenate([rows, goals]))).chunk(2)
        taken = 2 * (cache.actions[rows] - low) / (high - low) - 1
        return (policy.normalised(states, aims) - torch.from_numpy(taken).to(device)).square().mean()

    fit_head(policy, loss, config.steps, config.learning_rate, progress, description="behaviour cloning")
    return policy


class BehaviourCloningAgent(Agent):
    """Acts by the cloned policy, looking at every step."""

    narrows = True

    def __init__(self, policy: CloningPolicy) -> None:
        self._policy = policy
        self._device = next(policy.parameters()).device
        self._batch = EnvironmentBatch()
        self._goal: Tensor | None = None

    def reset(self, goal: Goal) -> None:
        """Take a new goal for each environment."""
        self._batch.start(goal)
        with torch.inference_mode():
            self._goal = self._policy.encode(goal.observations.to(self._device))

    def select(self, rows: Sequence[int]) -> None:
        """Narrow to these environments, given by their places in the last batch, in this order."""
        places = self._batch.select(rows)
        if self._goal is not None:
            self._goal = self._goal[places]

    def act(self, observations: Observations) -> Float[Tensor, "B A"]:
        """Return the next environment action.

        Raises:
            PlanningError: before `reset`, or for another number of environments.
        """
        self._batch.check(observations)
        assert self._goal is not None
        with torch.inference_mode():
            action: Tensor = self._policy(self._policy.encode(observations.to(self._device)), self._goal)
        return action
