"""A coarser world model over macro-actions. Each of its steps covers several steps of the finer *model below*.

A macro-action encodes several consecutive blocks. Its encoder is trained together with a predictor of the state to
which those blocks lead. A coarse model is a `WorldModel` in the same latent space, so every solver, geometry and
objective works with it, and another coarse model can be fitted on top of it.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from worldloom.core.actions import Walk
from worldloom.core.config import Size, Sizes
from worldloom.core.errors import DataError
from worldloom.core.progress import SILENT, Progress
from worldloom.core.seams import WorldModel
from worldloom.core.seeds import seeded_weights, torch_generator
from worldloom.core.types import ActionSpec, Context, Observations
from worldloom.heads.head import FitConfig, Head
from worldloom.heads.latent_episodes import LatentEpisodes, with_dreams
from worldloom.models import MLP, LatentNorm

_BOUND = 2.0  # on each value of a macro-action, which has mean 0 and variance 1 over the data


class CoarseConfig(FitConfig):
    """The configuration of a `CoarseModel` and its fit; each coarse step covers `stride` steps of the model below.

    A macro-action has `code` values. The data are extended by `dreams` imagined walks per episode. Each walk has
    `dream_horizon` steps of the model below.
    """

    stride: int = Field(default=4, ge=2, le=65_536)
    code: Size = 4
    hidden: Sizes = Field(default=(512, 512), min_length=1)
    steps: int = Field(default=3000, ge=1)
    dreams: int = Field(default=2, ge=0)
    dream_horizon: int = Field(default=12, ge=1)
    walk: Walk = Walk()


class CoarseModel(Head[CoarseConfig]):
    """A `WorldModel` over macro-actions that shares the encoder and latent space of the model below."""

    kind = "coarse-model"
    config_type = CoarseConfig

    def __init__(self, below: WorldModel, config: CoarseConfig) -> None:
        super().__init__()
        self.config = config
        self.spec = replace(
            below.spec,
            action=ActionSpec(low=(-_BOUND,) * config.code, high=(_BOUND,) * config.code),
            block=1,
            context=1,
            fingerprint=f"{below.spec.fingerprint}/{config.stride}",
        )
        self._encode = below.encode
        dimension, chunk = below.spec.latent_dim, config.stride * below.spec.block_size
        self.code = MLP((dimension + chunk, *config.hidden[:1], config.code))
        self.norm = LatentNorm(config.code)
        self.step = MLP((dimension + config.code, *config.hidden, dimension), norm="layer", activation="silu")
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(chunk))

    @classmethod
    def build(cls, model: WorldModel, config: CoarseConfig, **figures: Any) -> "CoarseModel":
        """Build an untrained coarse model on `model`, the model below."""
        return cls(model, config)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.scale.device

    def encode(self, observations: Observations) -> Float[Tensor, "*axes D"]:
        """Encode observations with the encoder of the model below."""
        return self._encode(observations)

    def macro(self, latents: Float[Tensor, "M D"], blocks: Float[Tensor, "M k A"]) -> Float[Tensor, "M _"]:
        """Return the macro-actions of chunks of `stride` blocks; `latents` are the states in which the chunks begin."""
        codes: Tensor = self.norm(self.code(torch.cat([latents, blocks.flatten(1) / self.scale], dim=1)))
        return codes

    def advance(self, latents: Float[Tensor, "*axes D"], macros: Float[Tensor, "*axes _"]) -> Float[Tensor, "*axes D"]:
        """Return the latents that macro-actions lead to."""
        change: Tensor = self.step(torch.cat([latents, macros], dim=-1))
        return latents + change

    def rollout(self, context: Context, actions: Float[Tensor, "B S T A"]) -> Float[Tensor, "B S T D"]:
        """Predict T coarse steps, open loop; see `WorldModel`."""
        latents = context.latents[:, None, -1].expand(-1, actions.shape[1], -1)
        predicted = []
        for macros in actions.unbind(2):
            latents = self.advance(latents, macros)
            predicted.append(latents)
        return torch.stack(predicted, dim=2)

    def coarsen(self, episodes: LatentEpisodes, *, offset: int = 0) -> LatentEpisodes:
        """Convert episodes of the model below to episodes of the coarse model, starting at frame `offset`.

        Raises:
            DataError: every episode is shorter than one coarse step.
        """
        stride, found = self.config.stride, []
        with torch.inference_mode():
            for latents, blocks, length in zip(
                episodes.latents, episodes.blocks, episodes.lengths.tolist(), strict=True
            ):
                count = (length - 1 - offset) // stride
                if count < 1:
                    continue
                ends = latents[offset : offset + count * stride + 1 : stride]
                chunks = blocks[offset : offset + count * stride].reshape(count, stride, -1)
                found.append((ends.clone(), self.macro(ends[:-1], chunks).clamp(-_BOUND, _BOUND).clone()))
        if not found:
            raise DataError(
                f"every episode is shorter than {stride} blocks, one step of the coarse model; collect longer episodes "
                f"or lower 'stride'"
            )
        return LatentEpisodes.of(found)


def fit_coarse(
    below: WorldModel,
    episodes: LatentEpisodes,
    config: CoarseConfig,
    *,
    seed: int,
    progress: Progress = SILENT,
) -> CoarseModel:
    """Fit the macro-action encoder and the predictor together, on the episodes and on dreams (see `dream`) of `below`.

    The loss covers two open-loop steps. The second step starts from the prediction of the first, so that the model
    learns to chain predictions.

    Raises:
        DataError: all episodes, or the dreams, are shorter than one coarse step.
    """
    generator = torch_generator(seed, "coarse", device=episodes.latents.device)
    with seeded_weights(seed, "coarse", "weights"):
        coarse = CoarseModel(below, config).to(episodes.latents.device)
    parts = with_dreams(
        below, episodes, config.dreams, horizon=config.dream_horizon, walk=config.walk, generator=generator
    )
    windows = [_windows(part, config.stride) for part in parts]
    latents, blocks, second = (torch.cat(column) for column in zip(*windows, strict=True))
    coarse.scale.copy_(episodes.transitions()[1].std(0).clamp_min(1e-3).repeat(config.stride))
    unit = (latents[:, 1] - latents[:, 0]).square().mean()

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(latents), (config.batch,), generator=generator, device=latents.device)
        states, chunks, two = latents[rows], blocks[rows], second[rows]
        begins = torch.cat([states[:, 0], states[two, 1]])
        codes = coarse.macro(begins, torch.cat([chunks[:, 0], chunks[two, 1]]))
        once = coarse.advance(states[:, 0], codes[: len(rows)])
        twice = coarse.advance(once[two], codes[len(rows) :])
        errors = (once - states[:, 1]).square().mean(1).sum() + (twice - states[two, 2]).square().mean(1).sum()
        return errors / (len(rows) * unit)

    coarse.fit(loss, progress)
    return coarse


def _windows(
    episodes: LatentEpisodes, stride: int
) -> tuple[Float[Tensor, "M 3 D"], Float[Tensor, "M 2 k A"], Bool[Tensor, "M"]]:
    """Return states one coarse step apart, the blocks between them, and whether the second step exists."""
    longest = episodes.latents.shape[1]
    if longest <= stride:
        raise DataError(
            f"the longest episode or dream has {longest} states, but one step of the coarse model covers {stride} "
            f"blocks; lower 'stride', or collect longer episodes and raise 'dream_horizon'"
        )
    # Padded by one step, so that the last step of an episode also has a (masked) second one.
    states = functional.pad(episodes.latents, (0, 0, 0, stride))
    blocks = functional.pad(episodes.blocks, (0, 0, 0, stride))
    windows = []
    for first in range(longest - stride):
        last = first + 2 * stride
        there = episodes.lengths > first + stride
        windows.append(
            (
                states[there, first : last + 1 : stride],
                blocks[there, first:last].unflatten(1, (2, stride)),
                episodes.lengths[there] > last,
            )
        )
    latents, chunks, second = (torch.cat(column) for column in zip(*windows, strict=True))
    return latents, chunks, second
