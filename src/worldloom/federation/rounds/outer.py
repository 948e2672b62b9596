"""Outer optimisers: pure, deterministic functions from a base and the owners' mean delta to the next base."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from worldloom.core.config import Component
from worldloom.core.registry import Registry
from worldloom.federation.rounds.base import Base, check_names, check_values


class Outer(Component):
    """An optimiser step on the shared base."""

    @abstractmethod
    def step(
        self, base: Base, delta: Mapping[str, Tensor], momentum: Mapping[str, Tensor]
    ) -> tuple[Base, dict[str, Tensor]]:
        """Return the next base and momentum; the momentum before the first step is empty.

        Raises:
            DataError: the tensors' names differ, or the step is not finite.
        """


OUTER: Registry[type[Outer]] = Registry("outer optimiser")


@OUTER.register("fedavg")
class FedAvg(Outer):
    """base + mean delta (McMahan et al. 2017, arXiv 1602.05629)."""

    name: Literal["fedavg"] = "fedavg"

    def step(
        self, base: Base, delta: Mapping[str, Tensor], momentum: Mapping[str, Tensor]
    ) -> tuple[Base, dict[str, Tensor]]:
        """Step; see `Outer`."""
        check_names(delta, base.tensors, "the mean delta")
        moved = {name: _moved(tensor, delta[name].double()) for name, tensor in base.tensors.items()}
        return Base.of(moved, what="the next base"), {}


@OUTER.register("diloco")
class DiLoCo(Outer):
    """Nesterov momentum on the outer gradient -delta (Douillard et al. 2023, arXiv 2311.08105).

    m <- momentum m - delta; base <- base - learning_rate (momentum m - delta).
    """

    name: Literal["diloco"] = "diloco"
    learning_rate: float = Field(default=0.7, gt=0, le=100)
    momentum: float = Field(default=0.9, ge=0, lt=1)

    def step(
        self, base: Base, delta: Mapping[str, Tensor], momentum: Mapping[str, Tensor]
    ) -> tuple[Base, dict[str, Tensor]]:
        """Step; see `Outer`."""
        check_names(delta, base.tensors, "the mean delta")
        if momentum:
            check_names(momentum, base.tensors, "the outer momentum")
        moved, speeds = {}, {}
        for name, tensor in base.tensors.items():
            gradient = -delta[name].double()
            speed = self.momentum * momentum[name].double() + gradient if momentum else gradient
            moved[name] = _moved(tensor, -self.learning_rate * (gradient + self.momentum * speed))
            speeds[name] = speed.float()
            check_values(name, speeds[name], " of the outer momentum")
        return Base.of(moved, what="the next base"), speeds


def _moved(tensor: Tensor, by: Tensor) -> Tensor:
    return (tensor.double() + by).to(tensor.dtype)
