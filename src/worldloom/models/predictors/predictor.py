"""The interface of predictors, and the registry of their names."""

from abc import ABC, abstractmethod
from typing import Annotated

from jaxtyping import Float
from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor, nn

from worldloom.core.config import Component, component_of
from worldloom.core.registry import Registry


class Predictor(nn.Module, ABC):
    """Base class of predictors, which predict latents open loop from normalised actions."""

    @abstractmethod
    def forward(
        self,
        latents: Float[Tensor, "B K D"],
        past: Float[Tensor, "B K-1 A"],
        actions: Float[Tensor, "B S T A"],
    ) -> Float[Tensor, "B S T D"]:
        """Predict the T latents after K known ones for each of S candidates; predictions are fed back as inputs."""


class PredictorConfig(Component):
    """The configuration of a `Predictor`."""

    @abstractmethod
    def build(self, *, latent_dim: int, block_size: int, context: int) -> Predictor:
        """Build the module. PyTorch's default generator, which the caller seeds, samples its parameters."""


PREDICTORS: Registry[type[PredictorConfig]] = Registry("predictor")

# The field type for a predictor in a configuration: `name` selects the class, and all options are written.
PredictorField = Annotated[SerializeAsAny[PredictorConfig], BeforeValidator(component_of(PREDICTORS))]
