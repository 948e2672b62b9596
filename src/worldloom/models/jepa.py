"""The joint-embedding predictive world model: an encoder, a predictor, and no decoder."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from worldloom.core.config import Config, Size
from worldloom.core.errors import ConfigError
from worldloom.core.seeds import seeded_weights
from worldloom.core.types import ActionSpec, Context, ModelSpec, Observations, ObservationSpec, Windows
from worldloom.data import Statistics
from worldloom.models.encoders import EncoderField, PatchConv, default_encoder
from worldloom.models.normalisation import LatentNorm, PixelNormalisation, Standardise
from worldloom.models.predictors import MLPPredictor, Predictor, PredictorField
from worldloom.models.size import check_size
from worldloom.models.stems import ActionStem

_ENCODE_AT_ONCE = 1024  # frames per call in evaluation, which limits the memory for encoding a complete dataset


class JEPAConfig(Config):
    """The configuration of a model. One model step is `block` environment actions (frame skip).

    The model's state is `context` frames, one block apart: use 1 if a single frame shows the complete state, and 2 or
    more if velocities matter. Without an `encoder`, the default encoder for the observation is used. With
    `action_stem`, a learned linear map converts the environment's actions to shared actions with this number of values.
    Owners with different actions can then share the rest of the model.
    """

    encoder: EncoderField | None = PatchConv()
    predictor: PredictorField = MLPPredictor()
    latent_dim: Size = 64
    block: Size = 4
    context: Size = 1
    action_stem: Size | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowOutputs:
    """The outputs of a model for training windows: all latents, and open-loop predictions of the last T latents."""

    latents: Float[Tensor, "B N D"]
    predictions: Float[Tensor, "B T D"]
    actions: Float[Tensor, "B N-1 A"]  # normalised


class JEPA(nn.Module):
    """A joint-embedding predictive world model, which implements `WorldModel`; see `build_jepa` and `load_model`.

    The encoder ends with a batch norm without affine parameters, so each latent dimension has mean 0 and variance 1
    over the data. `spec.fingerprint` is set when the weights are saved or loaded.

    In training, frames are encoded in `parts` parts. With more than one part, only the latents are stored, and each
    part is encoded a second time for its gradient. Memory then contains the activations of only one part.
    """

    def __init__(
        self,
        config: JEPAConfig,
        spec: ModelSpec,
        *,
        encoder: nn.Module,
        predictor: Predictor,
        normalise_actions: Standardise,
    ) -> None:
        super().__init__()
        self.config = config
        self.spec = spec
        self.parts = 1
        self.encoder = encoder
        self.norm = LatentNorm(spec.latent_dim)
        self.predictor = predictor
        self.normalise_actions = normalise_actions
        shared = config.action_stem
        self.action_stem = None if shared is None else ActionStem(spec.action.size, shared)

    def encodes_like(self, other: "JEPA") -> bool:
        """Return whether both models have the same encoder, actions, context and block, so latents can be compared."""
        ours, theirs = ({**one.encoder.state_dict(), **one.norm.state_dict()} for one in (self, other))
        shapes = [(one.spec.action, one.spec.block, one.spec.context) for one in (self, other)]
        return (
            self.config.encoder == other.config.encoder
            and shapes[0] == shapes[1]
            and ours.keys() == theirs.keys()
            and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
        )

    @property
    def sees_colours(self) -> bool:
        """Whether the training pictures had colours; False if the encoder does not normalise pixels."""
        parts = [part for part in self.encoder.modules() if isinstance(part, PixelNormalisation)]
        return any(part.colours for part in parts)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.norm.running_mean.device

    def set_fingerprint(self, fingerprint: str) -> None:
        """Set the fingerprint of the current weights."""
        self.spec = replace(self.spec, fingerprint=fingerprint)

    def encode(self, observations: Observations) -> Float[Tensor, "*axes D"]:
        """Encode observations with any leading axes.

        Raises:
            DataError: the observations do not have the shape that the model was trained on.
        """
        self.spec.observation.check(observations)
        axes = observations.axes
        flat = observations.map(lambda part: part.reshape(-1, *part.shape[len(axes) :]))
        rows = math.prod(axes)
        if self.training and self.parts == 1:
            latents = self.norm(self.encoder(flat))
        elif self.training:
            size = -(-rows // self.parts)
            parts = [flat[i : i + size] for i in range(0, rows, size)]
            encoded = [checkpoint(self.encoder, part, use_reentrant=False) for part in parts]
            latents = self.norm(torch.cat(encoded))
        else:
            starts = range(0, max(rows, 1), _ENCODE_AT_ONCE)
            latents = torch.cat([self.norm(self.encoder(flat[i : i + _ENCODE_AT_ONCE])) for i in starts])
        shaped: Tensor = latents.reshape(*axes, self.spec.latent_dim)
        return shaped

    def rollout(self, context: Context, actions: Float[Tensor, "B S T A"]) -> Float[Tensor, "B S T D"]:
        """Predict the latents of the T steps after the context, open loop, for actions in environment units."""
        past, future = (self._shared(self.normalise_actions(part)) for part in (context.actions, actions))
        predictions: Tensor = self.predictor(context.latents, past, future)
        return predictions.float()

    def forward(self, windows: Windows) -> WindowOutputs:
        """Encode all frames of the windows, and predict the frames after the first `context`."""
        latents = self.encode(windows.observations)
        context = self.spec.context
        actions = self.normalise_actions(windows.actions)
        shared = self._shared(actions)
        predictions = self.predictor(latents[:, :context], shared[:, : context - 1], shared[:, None, context - 1 :])
        return WindowOutputs(latents=latents, predictions=predictions[:, 0].float(), actions=actions)

    def _shared(self, actions: Float[Tensor, "*axes A"]) -> Float[Tensor, "*axes M"]:
        return actions if self.action_stem is None else self.action_stem(actions)


def build_jepa(
    config: JEPAConfig,
    observation: ObservationSpec,
    action: ActionSpec,
    statistics: Statistics,
    *,
    seed: int,
) -> JEPA:
    """Build an untrained model on the CPU; its weights depend only on `seed`.

    Raises:
        ConfigError: the observation does not contain the input that the encoder needs, the statistics do not match the
            actions, or the parameters do not fit into the memory of this machine.
    """
    if len(statistics.action_mean) != action.size:
        raise ConfigError(
            f"the statistics have {len(statistics.action_mean)} action dimensions; expected {action.size}. Compute "
            f"the statistics from the model's training data"
        )
    check_size(lambda: _build(config, observation, action, Statistics.unit(observation, action), seed))
    return _build(config, observation, action, statistics, seed)


def _build(
    config: JEPAConfig, observation: ObservationSpec, action: ActionSpec, statistics: Statistics, seed: int
) -> JEPA:
    spec = ModelSpec(
        observation=observation, action=action, block=config.block, context=config.context, latent_dim=config.latent_dim
    )
    # One unit is at least 1% of a dimension's range, so that action dimensions that hardly vary are not amplified.
    floor = 0.01 * (torch.tensor(action.high) - torch.tensor(action.low))
    std = torch.maximum(statistics.action_std, floor)
    # Modules sample their weights from the default generator; its state is restored afterwards.
    with seeded_weights(seed, "model"):
        encoder = (config.encoder or default_encoder(observation)).build(observation, statistics, config.latent_dim)
        predictor = config.predictor.build(
            latent_dim=config.latent_dim,
            block_size=config.block * (config.action_stem or action.size),
            context=config.context,
        )
    return JEPA(
        config,
        spec,
        encoder=encoder,
        predictor=predictor,
        normalise_actions=Standardise(statistics.action_mean.repeat(config.block), std.repeat(config.block)),
    )
