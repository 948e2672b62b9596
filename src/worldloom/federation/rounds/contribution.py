"""A contribution: the change of the shared tensors that an owner sends, and facts about it."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from worldloom.core.config import parse_component
from worldloom.core.errors import DataError
from worldloom.federation.record.envelope import SignedMessage
from worldloom.federation.record.statements import check_origin
from worldloom.federation.rounds.base import Base, check_like, check_names, check_values
from worldloom.federation.rounds.codecs import CODECS
from worldloom.federation.rules.constitution import Constitution
from worldloom.federation.rules.partition import Partition
from worldloom.federation.rules.ranges import Count, within


@dataclass(frozen=True, kw_only=True, eq=False)
class Contribution:
    """The delta of the shared tensors of a partition; create one with `Contribution.of`.

    `base` is the fingerprint of the base that training started from, and `data_class` is the strictest class of the
    data.

    Raises:
        DataError: a tensor is missing, not shared, not floating point or not finite, or a count is negative.
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
        check_names(self.tensors, self.partition.shared, "a contribution")
        for name, tensor in self.tensors.items():
            if not tensor.is_floating_point():
                raise DataError(
                    f"tensor {name!r} is {tensor.dtype}; expected floating point. "
                    f"Keep the tensor local: add it to partition.sovereign"
                )
            check_values(name, tensor)
        for name in ("round", "steps", "frames"):
            if getattr(self, name) < 0:
                raise DataError(f"a contribution has {name} {getattr(self, name)}; expected 0 or more")
        # A read-only view of a copy, so that it cannot change after this check.
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))

    @classmethod
    def of(
        cls, partition: Partition, before: Mapping[str, Tensor], after: Mapping[str, Tensor], **facts: Any
    ) -> "Contribution":
        """Return the contribution `after - before` of the shared tensors; other tensors of the states are ignored.

        `facts` are the remaining fields of the contribution.

        Raises:
            DataError: the states differ in shapes or dtypes, or a difference is not finite.
        """
        start, end = partition.shared_of(before), partition.shared_of(after)
        for name, tensor in start.items():
            check_like(name, end[name], tensor)
        with torch.no_grad():
            delta = {name: end[name].detach().cpu() - start[name].detach().cpu() for name in start}
        return cls(partition=partition, tensors=delta, **facts)

    def body(self) -> dict[str, Any]:
        """Return the fields other than the tensors, as JSON values."""
        return {name: getattr(self, name) for name in ("owner", "round", "base", "steps", "frames", "data_class")}


_COUNT = TypeAdapter(Count)


def read_contribution(message: SignedMessage, number: int, base: Base, constitution: Constitution) -> dict[str, Tensor]:
    """Check a member's contribution to a round and return its delta.

    This is the coordinator's trust boundary: later code does not check the delta again.

    Raises:
        DataError: the contribution is for another consortium, round or base, its data class is not permitted, its
            privacy settings are not those of the constitution, or the tensors are not a finite delta with the base's
            names and shapes.
    """
    check_origin(message, constitution)
    check_facts(message, number, base.fingerprint, constitution)
    check_spent(message, constitution)
    return parse_component(CODECS, constitution.codec).decode(message.tensors, base.shapes)


def check_facts(message: SignedMessage, number: int, base: str, constitution: Constitution) -> None:
    """Check the round, base, number of steps and data class of a contribution.

    Raises:
        DataError: one of these values is wrong; the message names the member.
    """
    body = message.body
    expected = {"owner": message.sender, "round": number, "base": base, "steps": constitution.inner_steps}
    for key, value in expected.items():
        if body.get(key) != value:
            raise DataError(
                f"the contribution of {message.sender} has {key} {body.get(key)!r}; expected {value!r}. "
                f"Use the coordinator's constitution, and train in the current round"
            )
    if body.get("data_class") not in constitution.classes:
        raise DataError(
            f"{message.sender} contributes a model trained on {body.get('data_class')} data; the constitution "
            f"allows only {', '.join(constitution.classes)} data. Train on allowed data"
        )
    check_frames(message.sender, body.get("frames"), constitution)


def check_frames(owner: str, frames: Any, constitution: Constitution) -> None:
    """Check an owner's number of training frames, from which its weight is computed.

    Raises:
        DataError: the number is not in the range of `Count`, or the weight would be 0.
    """
    if within(_COUNT, frames) is None:
        raise DataError(
            f"the contribution of {owner} has {reprlib.repr(frames)} frames; expected an integer from 0 to 10**15. "
            f"Run the same version on both sides"
        )
    if not frames and constitution.weighting != "equal":
        raise DataError(f"{owner} has no training frames, so its weight would be 0; leave {owner} out")


def check_spent(message: SignedMessage, constitution: Constitution) -> None:
    """Check that the spent privacy in a contribution was computed with the constitution's settings.

    Raises:
        DataError: the settings differ; the message names the member.
    """
    spent = message.body["spent"]
    if constitution.privacy is None and spent:
        raise DataError(
            f"{message.sender} reports spent privacy, but the constitution sets no privacy; use the coordinator's "
            f"constitution"
        )
    if constitution.privacy is not None:
        promised: dict[str, Any] = constitution.privacy.model_dump(mode="json", include={"clip", "noise", "delta"})
        if constitution.secure_aggregation:
            promised["share"] = 1 / constitution.threshold
        if any(spent.get(key) != value for key, value in promised.items()):
            raise DataError(
                f"the privacy settings of {message.sender} are not those of the constitution; expected {promised}, got "
                f"{dict(spent)}. Use the coordinator's constitution"
            )
