"""What an encoder is, and the names that a configuration may use for one."""

from abc import abstractmethod
from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor, nn

from worldloom.core.config import Component, component_of
from worldloom.core.errors import ConfigError
from worldloom.core.registry import Registry
from worldloom.core.types import ObservationSpec
from worldloom.data import Statistics


class EncoderConfig(Component):
    """Builds a module that maps `Observations` with one leading axis R to latents (R, D).

    The model adds the batch norm at the output. Whatever the module needs from the statistics must be a buffer,
    so that a checkpoint holds it.
    """

    @abstractmethod
    def build(self, observation: ObservationSpec, statistics: Statistics, latent_dim: int) -> nn.Module:
        """Build the module; its parameters are drawn from PyTorch's default generator, seeded by the caller.

        Raises:
            ConfigError: the observation holds nothing that this encoder reads.
        """


ENCODERS: Registry[type[EncoderConfig]] = Registry("encoder")

# The field type of a configuration that holds an encoder: read by name, written whole.
EncoderField = Annotated[SerializeAsAny[EncoderConfig], BeforeValidator(component_of(ENCODERS))]


def pixel_statistics(name: str, observation: ObservationSpec, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Return the pixels' mean and std, or raise `ConfigError` where there are no pixels."""
    if observation.pixels is None or statistics.pixel_mean is None or statistics.pixel_std is None:
        raise ConfigError(
            f"encoder {name!r} reads pixels and the observation holds none; use encoder 'vector' "
            f"(model.encoder.name=vector)"
        )
    return statistics.pixel_mean, statistics.pixel_std


def vector_statistics(name: str, observation: ObservationSpec, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Return the vector's mean and std, or raise `ConfigError` where there is no vector."""
    if not observation.vector or statistics.vector_mean is None or statistics.vector_std is None:
        raise ConfigError(
            f"encoder {name!r} reads a vector and the observation holds none; use encoder 'patch-conv' "
            f"(model.encoder.name=patch-conv)"
        )
    return statistics.vector_mean, statistics.vector_std
