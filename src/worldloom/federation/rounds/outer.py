"""Outer optimisers: from a base and the owners' mean delta to the next base. Pure, and the same bits every time."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor

from worldloom.core.config import Component, component_of
from worldloom.core.registry import Registry
from worldloom.federation.rules.partition import check_finite, check_names

State = dict[str, Tensor]


class Outer(Component):
    """A step of the shared base."""

    @abstractmethod
    def step(
        self, base: Mapping[str, Tensor], delta: Mapping[str, Tensor], momentum: Mapping[str, Tensor]
    ) -> tuple[State, State]:
        """Return the next base and momentum; an empty momentum stands for none yet.

        Raises:
            DataError: the tensors are not of one model, or the step is not finite.
        """


OUTER: Registry[type[Outer]] = Registry("outer optimiser")

OuterField = Annotated[SerializeAsAny[Outer], BeforeValidator(component_of(OUTER))]


@OUTER.register("fedavg")
class FedAvg(Outer):
    """base + mean delta (McMahan et al. 2017, arXiv 1602.05629)."""

    name: Literal["fedavg"] = "fedavg"

    def step(
        self, base: Mapping[str, Tensor], delta: Mapping[str, Tensor], momentum: Mapping[str, Tensor]
    ) -> tuple[State, State]:
        """Step; see `Outer`."""
        check_names(delta, base, "the mean delta")
        return {name: _moved(name, base[name], delta[name].double()) for name in base}, {}


@OUTER.register("diloco")
class DiLoCo(Outer):
    """Nesterov momentum on the outer gradient -delta (Douillard et al. 2023, arXiv 2311.08105).

    m <- momentum m - delta; base <- base - learning_rate (momentum m - delta).
    """

    name: Literal["diloco"] = "diloco"
    learning_rate: float = Field(default=0.7, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)

    def step(
        self, base: Mapping[str, Tensor], delta: Mapping[str, Tensor], momentum: Mapping[str, Tensor]
    ) -> tuple[State, State]:
        """Step; see `Outer`."""
        check_names(delta, base, "the mean delta")
        if momentum:
            check_names(momentum, base, "the outer momentum")
        moved, kept = {}, {}
        for name in base:
            gradient = -delta[name].double()
            speed = self.momentum * momentum[name].double() + gradient if momentum else gradient
            moved[name] = _moved(name, base[name], -self.learning_rate * (gradient + self.momentum * speed))
            kept[name] = speed.float()
            check_finite(name, kept[name], " of the outer momentum")
        return moved, kept


def _moved(name: str, base: Tensor, by: Tensor) -> Tensor:
    moved = (base.double() + by).to(base.dtype)
    check_finite(name, moved, " of the next base")
    return moved
