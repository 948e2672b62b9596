"""The partition of a world model's tensors into shared ones and sovereign ones, which never leave their owner."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor

from worldloom.core.config import Config
from worldloom.core.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Partition:
    """The names of the tensors in a model's state, each either shared or sovereign; see `PartitionConfig.split`.

    Raises:
        ConfigError: a name appears more than once.
    """

    shared: tuple[str, ...]
    sovereign: tuple[str, ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for name in (*self.shared, *self.sovereign):
            if name in seen:
                raise ConfigError(
                    f"tensor {name!r} appears twice in a partition; list it once, as shared or as sovereign"
                )
            seen.add(name)

    def shared_of(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the shared tensors of a model's state.

        Raises:
            DataError: the state lacks a shared tensor.
        """
        if missing := [name for name in self.shared if name not in state]:
            raise DataError(
                f"the state lacks {missing[:5]}, which the partition shares; use a state of the same recipe"
            )
        return {name: state[name] for name in self.shared}


class PartitionConfig(Config):
    """Glob patterns for the names of shared and sovereign tensors; a tensor that matches both is sovereign.

    An integer tensor, such as a count of batches, is always sovereign, because its mean has no meaning.
    """

    shared: tuple[str, ...] = ("encoder.*", "predictor.*")
    sovereign: tuple[str, ...] = (
        "*.normalise.*",
        "encoder.normalise.*",
        "*.standardise.*",
        "encoder.stem.*",
        "normalise_actions.*",
        "action_stem.*",
        "norm.*",
    )

    def split(self, state: Mapping[str, Tensor]) -> Partition:
        """Return the partition of a model's state into shared and sovereign tensors.

        Raises:
            ConfigError: the name of a tensor matches no pattern.
        """
        shared: list[str] = []
        sovereign: list[str] = []
        for name in sorted(state):
            is_sovereign, is_shared = (
                any(fnmatchcase(name, pattern) for pattern in patterns) for patterns in (self.sovereign, self.shared)
            )
            if not is_sovereign and not is_shared:
                raise ConfigError(
                    f"tensor {name!r} is neither shared nor sovereign; add a pattern that matches it to "
                    f"partition.shared {list(self.shared)} or partition.sovereign {list(self.sovereign)}"
                )
            stays = is_sovereign or not state[name].is_floating_point()
            (sovereign if stays else shared).append(name)
        return Partition(shared=tuple(shared), sovereign=tuple(sovereign))
