"""The model and its losses as one module, so that data parallelism wraps them together."""

from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn

from worldloom.core.errors import ConfigError
from worldloom.core.types import Observations, Windows
from worldloom.models import JEPA, Block, TargetEncoder
from worldloom.models.losses import LossInputs
from worldloom.training.training_config import TrainingConfig


class Learner(nn.Module):
    """The model, the modules of the losses and, if configured, the target encoder."""

    def __init__(self, model: JEPA, config: TrainingConfig) -> None:
        super().__init__()
        active = {name: loss for name, loss in config.losses.items() if loss.weight > 0}
        spec = model.spec
        self.model = model
        self.model.parts = config.accumulate
        if config.activation_checkpointing:
            blocks = [module for module in model.modules() if isinstance(module, Block)]
            if not blocks:
                raise ConfigError(
                    "training.activation_checkpointing needs transformer blocks, but neither the encoder nor the "
                    "predictor has any; set training.activation_checkpointing to false, and save memory with "
                    "training.accumulate instead"
                )
            for block in blocks:
                block.checkpointed = True
        self.losses = nn.ModuleDict(
            {name: loss.build(latent_dim=spec.latent_dim, block_size=spec.block_size) for name, loss in active.items()}
        )
        self.weights = {name: loss.weight for name, loss in active.items()}
        self.target = None if config.target is None else TargetEncoder(model, config.target)

    def forward(
        self,
        pixels: UInt8[Tensor, "B N H W C"] | None,
        vector: Float32[Tensor, "B N V"] | None,
        actions: Float32[Tensor, "B N-1 A"],
        step: int,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Return the weighted sum of the losses, which training minimises, and each loss by name without its weight.

        The losses cover the batch of all ranks. The windows are separate arguments because Fabric's wrapper treats
        frozen value objects as collections and tries to rebuild them.
        """
        windows = Windows(observations=Observations(pixels=pixels, vector=vector), actions=actions)
        outputs = self.model(windows)
        future = slice(self.model.spec.context, None)
        targets = outputs.latents[:, future] if self.target is None else self.target(windows.observations[:, future])
        inputs = LossInputs(
            latents=outputs.latents,
            predictions=outputs.predictions,
            targets=targets,
            actions=outputs.actions,
            step=step,
        )
        losses = {name: loss(inputs) for name, loss in self.losses.items()}
        total = sum((self.weights[name] * loss for name, loss in losses.items()), start=actions.new_zeros(()))
        return total, losses

    def after_step(self) -> None:
        """Update the target encoder; call this after each optimiser step."""
        if self.target is not None:
            self.target.follow(self.model)
