"""What a predictor is, and the names that a configuration may use for one."""

from abc import ABC, abstractmethod
from typing import Annotated

from jaxtyping import Float
from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor, nn

from worldloom.core.config import Component, component_of
from worldloom.core.registry import Registry


class Predictor(nn.Module, ABC):
    """Unrolls latents open loop; actions arrive normalised."""

    @abstractmethod
    def forward(
        self,
        latents: Float[Tensor, "B K D"],
        past: Float[Tensor, "B K-1 A"],
        actions: Float[Tensor, "B S T A"],
    ) -> Float[Tensor, "B S T D"]:
        """Predict the T latents after K known ones for each of S candidates, feeding predictions back."""


class PredictorConfig(Component):
    """Builds a `Predictor`."""

    @abstractmethod
    def build(self, *, latent_dim: int, block_size: int, context: int) -> Predictor:
        """Build the module; its parameters are drawn from PyTorch's default generator, seeded by the caller."""


PREDICTORS: Registry[type[PredictorConfig]] = Registry("predictor")

# The field type of a configuration that holds a predictor: read by name, written whole.
PredictorField = Annotated[SerializeAsAny[PredictorConfig], BeforeValidator(component_of(PREDICTORS))]
