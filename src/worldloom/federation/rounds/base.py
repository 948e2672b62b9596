"""The shared base: the tensors that are the same for all members, and their fingerprint.

A base is checked once: when it is read from a file or message, or when a pilot or a round produces it. Neither the
checks nor the fingerprint are computed again after that.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from worldloom.core.errors import DataError, StorageError
from worldloom.federation.rules.ranges import LARGEST_VALUE
from worldloom.models import load_tensors, save_tensors

_KIND = "shared-base"


@dataclass(frozen=True, kw_only=True, eq=False)
class Base:
    """Shared tensors on the CPU, and their fingerprint; create one with `Base.of` or `Base.load`, which check them."""

    tensors: Mapping[str, Tensor]
    fingerprint: str

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        like: Mapping[str, Tensor] | None = None,
        named: str | None = None,
        what: str = "the base",
    ) -> "Base":
        """Check tensors, and return them as a base with their fingerprint.

        Args:
            tensors: the shared tensors, which must be finite.
            like: tensors with the expected names, shapes and dtypes; their values are not used.
            named: the expected fingerprint.
            what: a description of the tensors for error messages.

        Raises:
            DataError: names, shapes or dtypes differ from `like`, a value is not finite, or the fingerprint differs
                from `named`.
        """
        if like is not None:
            check_names(tensors, like, what)
        for name, tensor in tensors.items():
            if like is not None:
                check_like(name, tensor, like[name])
            check_values(name, tensor, f" of {what}")
        found = fingerprint(tensors)
        if named is not None and found != named:
            raise DataError(f"{what} has fingerprint {found[:16]}; expected {named[:16]}. Get the expected base")
        # A read-only view of a copy, so that it cannot change after these checks.
        on_cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        return cls(tensors=MappingProxyType(on_cpu), fingerprint=found)

    @classmethod
    def load(
        cls, stem: Path | str, *, like: Mapping[str, Tensor] | None = None, named: str | None = None
    ) -> "Base":  # fmt: skip
        """Read a base that `save` wrote; see `of`.

        Raises:
            CheckpointError: the file is missing or damaged.
            DataError: see `of`.
        """
        return cls.of(load_tensors(Path(stem), kind=_KIND)[0], like=like, named=named, what=f"the base in {stem}")

    def save(self, stem: Path | str, about: Mapping[str, Any]) -> None:
        """Write the base with `about` as JSON metadata; an earlier file of this name is replaced.

        Raises:
            StorageError: writing failed.
        """
        save_tensors(stem, self.tensors, about, kind=_KIND)

    def save_new(self, stem: Path | str, about: Mapping[str, Any] | None = None) -> None:
        """Write a base that rounds can start from, such as the base of a pilot, or a released base.

        Raises:
            StorageError: the file exists already, or writing failed.
        """
        if Path(stem).with_suffix(".json").exists():
            raise StorageError(f"{stem} exists already; choose another name")
        self.save(stem, {"round": 0, **(about or {})})

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of each tensor."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return the BLAKE2b-256 hash, in hex, of the names, dtypes, shapes and bytes of tensors, sorted by name."""
    digest = hashlib.blake2b(digest_size=32)
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        head = json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode()
        digest.update(len(head).to_bytes(8, "little") + head)
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_names(found: Iterable[str], expected: Iterable[str], what: str) -> None:
    """Check that tensors have exactly the expected names.

    Raises:
        DataError: names are missing or unexpected; the message lists them.
    """
    found, expected = set(found), set(expected)
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        raise DataError(
            f"{what} lacks tensors {missing[:5]} and has unexpected tensors {extra[:5]}; expected {len(expected)} "
            f"tensors. Use the same recipe and partition on both sides"
        )


def check_like(name: str, tensor: Tensor, like: Tensor) -> None:
    """Check that a tensor has the shape and dtype of `like`.

    Raises:
        DataError: the shape or dtype differs.
    """
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise DataError(
            f"tensor {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected {like.dtype} of shape "
            f"{tuple(like.shape)}. Use the same recipe and codec on both sides"
        )


def check_values(name: str, tensor: Tensor, whose: str = "") -> None:
    """Check that the values of a tensor are finite, and at most `LARGEST_VALUE` in magnitude.

    Raises:
        DataError: a value is NaN, infinite or too large; the message names the tensor.
    """
    if not tensor.numel():
        return
    low, high = (float(value) for value in tensor.aminmax())  # NaN if a value is NaN
    if not -LARGEST_VALUE <= low <= high <= LARGEST_VALUE:
        found = (
            f"values from {low:.3g} to {high:.3g}" if math.isfinite(low) and math.isfinite(high) else "NaN or infinity"
        )
        raise DataError(
            f"tensor {name!r}{whose} contains {found}; expected finite numbers of at most {LARGEST_VALUE:.3g} in "
            f"magnitude. Discard the tensor, and check the losses of the training that produced it"
        )
