"""Which tensors of a world model its owners share, and which never leave their owner."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from worldloom.core.config import Config
from worldloom.core.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Partition:
    """The names of a state, each either shared or sovereign; made by `PartitionConfig.split`.

    Raises:
        ConfigError: a name stands in both, or twice.
    """

    shared: tuple[str, ...]
    sovereign: tuple[str, ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for name in (*self.shared, *self.sovereign):
            if name in seen:
                raise ConfigError(
                    f"tensor {name!r} stands twice in a partition; it is either shared or sovereign, once"
                )
            seen.add(name)

    def shared_of(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the shared part of a state.

        Raises:
            DataError: the state lacks a tensor of it.
        """
        return _pick(state, self.shared)

    def sovereign_of(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sovereign part of a state; see `shared_of`."""
        return _pick(state, self.sovereign)

    def merge(
        self, shared: Mapping[str, Tensor], sovereign: Mapping[str, Tensor], *, like: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the whole state of its two parts, with `like` of the same names, shapes and dtypes as that state.

        Raises:
            DataError: a tensor is missing, too many, in the wrong part, or of another shape or dtype.
        """
        check_names(shared, self.shared, "the shared part")
        check_names(sovereign, self.sovereign, "the sovereign part")
        merged = {**shared, **sovereign}
        if like is None:
            return merged
        check_names(merged, like, "the merged state")
        for name, tensor in like.items():
            check_like(name, merged[name], tensor)
        return {name: merged[name] for name in like}


class PartitionConfig(Config):
    """Patterns (as of file names) of what is shared and what is sovereign; where both match, sovereign wins.

    A tensor of whole numbers, such as a count of batches, has no mean that means anything: it is sovereign in any case.
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
            ConfigError: a name matches no pattern. Nothing goes out unless it is declared, and nothing is kept unsaid.
        """
        shared: list[str] = []
        sovereign: list[str] = []
        for name in sorted(state):
            kept, given = (
                any(fnmatchcase(name, pattern) for pattern in patterns) for patterns in (self.sovereign, self.shared)
            )
            if not kept and not given:
                raise ConfigError(
                    f"tensor {name!r} is neither shared nor sovereign; add a pattern that matches it to one of "
                    f"partition.shared {list(self.shared)} and partition.sovereign {list(self.sovereign)}"
                )
            keeps = kept or not state[name].is_floating_point()
            (sovereign if keeps else shared).append(name)
        return Partition(shared=tuple(shared), sovereign=tuple(sovereign))


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return the BLAKE2b-256, in hex, of sorted names, dtypes, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=32)
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        head = json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode()
        digest.update(len(head).to_bytes(8, "little") + head)
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_names(found: Mapping[str, Tensor], expected: "Mapping[str, object] | tuple[str, ...]", what: str) -> None:
    """Refuse tensors whose names are not exactly those expected.

    Raises:
        DataError: it names what is missing and what is too many.
    """
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        raise DataError(
            f"{what} lacks {missing[:5]} and has {extra[:5]} too many; expected exactly the {len(expected)} tensors of "
            f"one model and one partition: do both sides run the same recipe?"
        )


def check_like(name: str, tensor: Tensor, like: Tensor) -> None:
    """Refuse a tensor of another shape or dtype than `like`.

    Raises:
        DataError: it names the tensor, what was expected and what came.
    """
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise DataError(
            f"tensor {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected {like.dtype} of shape "
            f"{tuple(like.shape)}: do both sides run the same recipe?"
        )


def check_finite(name: str, tensor: Tensor, whose: str = "") -> None:
    """Refuse NaN and infinity.

    Raises:
        DataError: it names the tensor.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise DataError(
            f"tensor {name!r}{whose} holds values that are not finite; expected finite numbers: look at that owner's "
            f"losses, and leave the contribution out"
        )


def _pick(state: Mapping[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    missing = [name for name in names if name not in state]
    if missing:
        raise DataError(
            f"the state lacks {missing[:5]}; expected every tensor of its partition: is it of another recipe?"
        )
    return {name: state[name] for name in names}
