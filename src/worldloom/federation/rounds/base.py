"""The shared base: the tensors that all members hold alike, and the fingerprint that names them.

A base is checked once where it comes in: from a file, from a message, from a pilot or from a round. Behind that point a
`Base` travels as it is, and its fingerprint is read, not computed.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from worldloom.core.errors import DataError, StorageError
from worldloom.models import load_tensors, save_tensors

_KIND = "shared-base"


@dataclass(frozen=True, kw_only=True, eq=False)
class Base:
    """Shared tensors on the CPU, and their fingerprint; made by `Base.of` or `Base.load`, which check them."""

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
        """Check tensors and compute their fingerprint.

        Args:
            tensors: the shared tensors, which must be finite.
            like: tensors whose names, shapes and dtypes are expected; their values do not matter.
            named: the fingerprint that is expected.
            what: how an error names the tensors.

        Raises:
            DataError: names, shapes or dtypes are not those of `like`, a value is not finite, or the fingerprint is
                not `named`.
        """
        if like is not None:
            check_names(tensors, like, what)
        for name, tensor in tensors.items():
            if like is not None:
                check_like(name, tensor, like[name])
            check_finite(name, tensor, f" of {what}")
        found = fingerprint(tensors)
        if named is not None and found != named:
            raise DataError(f"{what} has fingerprint {found[:16]}; expected {named[:16]}")
        # A view of a copy: nothing can be added to it after these checks.
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
        """Write the base, with plain JSON about it, in place of what is there.

        Raises:
            StorageError: the disk refuses.
        """
        save_tensors(stem, self.tensors, about, kind=_KIND)

    def save_new(self, stem: Path | str, about: Mapping[str, Any] | None = None) -> None:
        """Write a base that rounds can begin with, such as a pilot's or a released one.

        Raises:
            StorageError: a file is there already, or the disk refuses.
        """
        if Path(stem).with_suffix(".json").exists():
            raise StorageError(f"{stem} exists already; choose another name")
        self.save(stem, {"round": 0, **(about or {})})

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of each tensor."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return the BLAKE2b-256, in hex, of sorted names, dtypes, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=32)
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        head = json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode()
        digest.update(len(head).to_bytes(8, "little") + head)
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_names(found: Iterable[str], expected: Iterable[str], what: str) -> None:
    """Refuse tensors whose names are not exactly those expected.

    Raises:
        DataError: it names what is missing and what is too many.
    """
    found, expected = set(found), set(expected)
    missing, extra = sorted(expected - found), sorted(found - expected)
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
            f"{tuple(like.shape)}: do both sides run the same recipe and codec?"
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
