"""The partition of a world model's tensors: owners share some, and others never leave their owner."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor

from worldloom.core.config import Config
from worldloom.core.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Partition:
    """The names of a state's tensors, each either shared or sovereign; made by `PartitionConfig.split`.

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
        """Return the shared part of a state.

        Raises:
            DataError: the state lacks a tensor of it.
        """
        if missing := [name for name in self.shared if name not in state]:
            raise DataError(
                f"the state lacks {missing[:5]}; expected every tensor of its partition: is it of another recipe?"
            )
        return {name: state[name] for name in self.shared}


class PartitionConfig(Config):
    """Glob patterns of the names of shared and of sovereign tensors; where both match, sovereign wins.

    A tensor of integers, such as a count of batches, has no meaningful mean: it is always sovereign.
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
        """Return the partition of a state: total and disjoint.

        Raises:
            ConfigError: a name matches no pattern: each tensor must be declared shared or sovereign.
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
