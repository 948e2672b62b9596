"""Refines a predictor on frozen latents: the encoder stays as it is, so a step costs no encoding.

Joint training spends nearly all its time in the encoder and sees few windows, of short horizons. Prediction of contact
needs many more (docs/log.md).
"""

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from worldloom.core.errors import DataError
from worldloom.core.progress import SILENT, Progress
from worldloom.core.seeds import torch_generator
from worldloom.heads.head import FitConfig, Head
from worldloom.heads.latent_episodes import LatentEpisodes
from worldloom.models import JEPA


class RefinementConfig(FitConfig):
    """The configuration of `refine_predictor`: open-loop predictions over `horizon` blocks.

    If training has a symmetry, the episodes are also shown in other positions: each in `copies` of them.
    """

    horizon: int = Field(default=8, ge=1)
    copies: int = Field(default=0, ge=0)
    steps: int = Field(default=5000, ge=1)
    batch: int = Field(default=256, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)


class _Refinement(Head[RefinementConfig]):
    kind = "predictor-refinement"
    config_type = RefinementConfig

    def __init__(self, model: JEPA, config: RefinementConfig) -> None:
        super().__init__()
        self.config = config
        self.predictor, self.action_stem = model.predictor, model.action_stem


def refine_predictor(
    model: JEPA,
    parts: Sequence[LatentEpisodes],
    config: RefinementConfig,
    *,
    seed: int,
    progress: Progress = SILENT,
) -> JEPA:
    """Return a copy of the model whose predictor is trained further, by the mean squared error of its predictions.

    `parts` are episodes encoded by this model, for example at each of the `block` offsets. The parts take turns, and
    each step samples its windows uniformly.

    Raises:
        DataError: every episode is shorter than `horizon` blocks.
        TrainingError: the loss is not finite.
    """
    refined = copy.deepcopy(model)
    usable = [(part, starts) for part in parts if len(starts := _starts(part, config.horizon))]
    if not usable:
        longest = max(int(part.lengths.max()) - 1 for part in parts)
        raise DataError(
            f"expected episodes of at least {config.horizon} blocks, the horizon of the predictor's refinement; the "
            f"longest has {longest}. Lower 'refinement.horizon', or collect longer episodes"
        )
    device = parts[0].latents.device
    generator = torch_generator(seed, "refinement", device=device)
    steps = torch.arange(config.horizon, device=device)

    def loss(step: int) -> Tensor:
        seen, starts = usable[step % len(usable)]
        rows = torch.randint(len(starts), (config.batch,), generator=generator, device=device)
        episode, frame = starts[rows].unbind(1)
        ahead = frame[:, None] + steps
        context = seen.context(episode, frame, model.spec.context)
        predicted = refined.rollout(context, seen.blocks[episode[:, None], ahead][:, None])[:, 0]
        return functional.mse_loss(predicted, seen.latents[episode[:, None], ahead + 1])

    _Refinement(refined, config).fit(loss, progress)
    return refined.eval()


def _starts(episodes: LatentEpisodes, horizon: int) -> Int[Tensor, "M 2"]:
    """Return the (episode, frame) of every frame that is followed by at least `horizon` blocks."""
    frames = torch.arange(episodes.latents.shape[1], device=episodes.lengths.device)
    return (frames + horizon < episodes.lengths[:, None]).nonzero()
