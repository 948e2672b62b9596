"""The size of a module, computed before memory is allocated for it."""

import logging
from collections.abc import Callable

import psutil
import torch
from torch import nn

from worldloom.core.errors import ConfigError, WorldloomError

_log = logging.getLogger(__name__)


def shapes_of(build: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]] | None:
    """Return the tensor shapes of the module that `build` returns, without allocating memory for the tensors.

    Returns None for a module that cannot be built in this way, for example because it computes with its weights.
    """
    built = _without_memory(build)
    return None if built is None else {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}


def check_size(build: Callable[[], nn.Module]) -> None:
    """Check that the module that `build` returns fits into the memory of this machine.

    Raises:
        ConfigError: the parameters need more than the machine's total memory.
    """
    built = _without_memory(build)
    if built is None:
        return
    needed = sum(tensor.numel() * tensor.element_size() for tensor in built.state_dict().values())
    there = psutil.virtual_memory().total
    if needed > there:
        raise ConfigError(
            f"the model's parameters need {needed / 2**30:,.0f} GiB, but this machine has {there / 2**30:,.0f} GiB of "
            f"memory; lower the sizes in 'model', such as latent_dim, hidden, channels or width"
        )


def _without_memory(build: Callable[[], nn.Module]) -> nn.Module | None:
    try:
        with torch.device("meta"):
            return build()
    except WorldloomError:
        raise
    except Exception as error:  # a user's own part may raise anything
        if "overflow" in str(error).lower():
            raise ConfigError(f"the model is too large for any machine ({error}); lower the sizes in 'model'") from None
        _log.debug("the size of a module is unknown: %s", error)
        return None
