"""The interface of encoders, and the registry of their names."""

from abc import abstractmethod
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor, nn

from worldloom.core.config import Component, component_of
from worldloom.core.errors import ConfigError
from worldloom.core.registry import Registry
from worldloom.core.types import ObservationSpec
from worldloom.data import Statistics


class EncoderConfig(Component):
    """The configuration of an encoder, a module that maps `Observations` with one leading axis R to latents (R, D).

    The model adds the batch norm at the output. Values that the module needs from the statistics must be buffers, so
    that checkpoints contain them. `sees` names the parts of the observation that the module uses.
    """

    sees: ClassVar[frozenset[str]] = frozenset({"pixels", "vector"})

    @abstractmethod
    def build(self, observation: ObservationSpec, statistics: Statistics, latent_dim: int) -> nn.Module:
        """Build the module. PyTorch's default generator, which the caller seeds, samples its parameters.

        Raises:
            ConfigError: the observation does not contain the input that this encoder needs.
        """


ENCODERS: Registry[type[EncoderConfig]] = Registry("encoder")

# The field type for an encoder in a configuration: `name` selects the class, and all options are written.
EncoderField = Annotated[SerializeAsAny[EncoderConfig], BeforeValidator(component_of(ENCODERS))]


def pixel_statistics(name: str, observation: ObservationSpec, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Return the pixels' mean and std, or raise `ConfigError` if there are no pixels."""
    if observation.pixels is None or statistics.pixel_mean is None or statistics.pixel_std is None:
        raise ConfigError(
            f"encoder {name!r} needs pixels, but the observation has none; use encoder 'vector' "
            f"(model.encoder.name=vector)"
        )
    return statistics.pixel_mean, statistics.pixel_std


def vector_statistics(name: str, observation: ObservationSpec, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Return the vector's mean and std, or raise `ConfigError` if there is no vector."""
    if not observation.vector or statistics.vector_mean is None or statistics.vector_std is None:
        raise ConfigError(
            f"encoder {name!r} needs a vector, but the observation has none; use encoder 'patch-conv' "
            f"(model.encoder.name=patch-conv)"
        )
    return statistics.vector_mean, statistics.vector_std
