"""What leaves an owner: the change of the shared tensors, and facts about how it came to be."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from worldloom.core.errors import DataError
from worldloom.federation.record.envelope import SignedMessage
from worldloom.federation.rules.constitution import Constitution
from worldloom.federation.rules.partition import Partition, check_finite, check_like, check_names


@dataclass(frozen=True, kw_only=True, eq=False)
class Contribution:
    """The delta of exactly the shared part of a partition; made by `Contribution.of`.

    `base` is the fingerprint of the shared part that it set out from, `data_class` the strictest class of its data.

    Raises:
        DataError: a tensor is not shared, is missing, holds whole numbers or is not finite, or a count is negative.
    """

    partition: Partition
    tensors: Mapping[str, Tensor]
    owner: str
    round: int
    base: str
    steps: int
    frames: int
    data_class: str

    def __post_init__(self) -> None:
        check_contribution(self.tensors, self.partition.shared)
        for name in ("round", "steps", "frames"):
            if getattr(self, name) < 0:
                raise DataError(f"a contribution has {name} {getattr(self, name)}; expected 0 or more")
        # A view of a copy: nothing can be added to it after this check.
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))

    @classmethod
    def of(
        cls,
        partition: Partition,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        *,
        owner: str,
        round: int,
        base: str,
        steps: int,
        frames: int,
        data_class: str,
    ) -> "Contribution":
        """Return `after - before` of the shared part; whatever else the states hold is not looked at.

        Raises:
            DataError: the states differ in shapes or dtypes, or a difference is not finite.
        """
        start, end = partition.shared_of(before), partition.shared_of(after)
        for name, tensor in start.items():
            check_like(name, end[name], tensor)
        with torch.no_grad():
            delta = {name: end[name].detach().cpu() - start[name].detach().cpu() for name in start}
        return cls(
            partition=partition,
            tensors=delta,
            owner=owner,
            round=round,
            base=base,
            steps=steps,
            frames=frames,
            data_class=data_class,
        )

    def body(self) -> dict[str, Any]:
        """Return the facts beside the tensors, as JSON values."""
        return {
            "owner": self.owner,
            "round": self.round,
            "base": self.base,
            "steps": self.steps,
            "frames": self.frames,
            "data_class": self.data_class,
        }


def check_contribution(tensors: Mapping[str, Tensor], shared: "Mapping[str, Tensor] | tuple[str, ...]") -> None:
    """Refuse what is not a delta of the shared part: given as its names, or as a base whose shapes must be met too.

    Raises:
        DataError: a tensor is missing, too many, of another shape, of whole numbers, or not finite; it is named.
    """
    check_names(tensors, shared, "a contribution")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise DataError(f"tensor {name!r} is {tensor.dtype}; expected floating point: whole numbers have no mean")
        if isinstance(shared, Mapping) and tensor.shape != shared[name].shape:
            raise DataError(
                f"tensor {name!r} has shape {tuple(tensor.shape)}; expected {tuple(shared[name].shape)} as in the base"
            )
        check_finite(name, tensor)


_SPENT = {"clip", "noise", "delta", "round", "share", "in_sum", "epsilon"}


def check_facts(message: SignedMessage, number: int, base: str, constitution: Constitution) -> None:
    """Refuse what a member says of its contribution where it is of another round or base, or of a class that may not.

    Raises:
        DataError: it names the member and the fact.
    """
    body = message.body
    expected = {"owner": message.sender, "round": number, "base": base, "steps": constitution.inner_steps}
    for key, value in expected.items():
        if body.get(key) != value:
            raise DataError(f"a contribution of {message.sender} has {key} {body.get(key)!r}; expected {value!r}")
    if body.get("data_class") not in constitution.classes:
        raise DataError(
            f"{message.sender} contributes what it learned of {body.get('data_class')} data; the constitution lets "
            f"{', '.join(constitution.classes)} data shape the base"
        )
    if type(body.get("frames")) is not int or body["frames"] < 0:
        raise DataError(f"a contribution of {message.sender} does not say its frames")


def check_spent(message: SignedMessage, constitution: Constitution) -> None:
    """Refuse a contribution that does not say what privacy it spent, or was made private otherwise than agreed.

    Raises:
        DataError: it names the member.
    """
    spent = message.body.get("spent")
    if not isinstance(spent, dict):
        raise DataError(f"a contribution of {message.sender} does not say what privacy it spent")
    if set(spent) - _SPENT or not all(isinstance(value, int | float | None) for value in spent.values()):
        raise DataError(
            f"a contribution of {message.sender} says of its privacy what it should not; expected numbers for "
            f"{', '.join(sorted(_SPENT))} at most"
        )
    if constitution.privacy is not None:
        promised: dict[str, Any] = constitution.privacy.model_dump(mode="json", include={"clip", "noise", "delta"})
        if constitution.secure_aggregation:
            promised["share"] = 1 / constitution.threshold
        if any(spent.get(key) != value for key, value in promised.items()):
            raise DataError(f"a contribution of {message.sender} was not made private as the constitution says")
