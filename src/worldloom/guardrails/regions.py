"""Regions: sets of points for guardrails and objectives over probed quantities."""

import functools
import math
from abc import abstractmethod
from functools import cached_property
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from torch import Tensor

from worldloom.core.config import Component, component_of
from worldloom.core.registry import Registry


class Region(Component):
    """A set of points. To add a kind, register a subclass in `REGIONS`."""

    @property
    @abstractmethod
    def size(self) -> int:
        """The number of values of a point."""

    @abstractmethod
    def depth(self, points: Float[Tensor, "*axes L"]) -> Float[Tensor, "*axes"]:
        """Return the depth of points in the region: the Euclidean distance to the region's edge, negative outside."""

    @abstractmethod
    def within(self, other: "Region") -> bool:
        """Whether every point is in the other region too; false if that is unknown."""


REGIONS: Registry[type[Region]] = Registry("region")
RegionField = Annotated[SerializeAsAny[Region], BeforeValidator(component_of(REGIONS))]


@REGIONS.register("ball")
class Ball(Region):
    """All points within `radius` of `centre`."""

    name: Literal["ball"] = "ball"
    centre: tuple[float, ...] = Field(min_length=1)
    radius: float = Field(gt=0)

    @property
    def size(self) -> int:
        """The number of values of a point."""
        return len(self.centre)

    def depth(self, points: Float[Tensor, "*axes L"]) -> Float[Tensor, "*axes"]:
        """Return the depth of points in the ball; negative outside."""
        away: Tensor = (points - points.new_tensor(self.centre)).norm(dim=-1)
        return self.radius - away

    def within(self, other: Region) -> bool:
        """Whether every point is in the other region too."""
        if other.size != self.size:
            return False
        if isinstance(other, Ball):
            return math.dist(self.centre, other.centre) + self.radius <= other.radius
        if isinstance(other, Box):
            low, high = other.corners
            return all(
                lo <= at - self.radius and at + self.radius <= hi
                for lo, at, hi in zip(low, self.centre, high, strict=True)
            )
        return False


@REGIONS.register("box")
class Box(Region):
    """All points between two corners. A side is open if its value in a corner is null, or if the corner is missing."""

    name: Literal["box"] = "box"
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> "Box":
        if not self.low and not self.high:
            raise ValueError("expected a box with 'low', 'high' or both; got neither")
        if self.low and self.high and len(self.low) != len(self.high):
            raise ValueError(
                f"the corners of a box have {len(self.low)} and {len(self.high)} values; give both the same number of "
                f"values"
            )
        if any(lo >= hi for lo, hi in zip(*self.corners, strict=True)):
            raise ValueError(f"expected low < high on each side of a box; got low {self.low} and high {self.high}")
        return self

    @cached_property
    def corners(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The corners; open sides have infinite values."""
        low = tuple(-math.inf if side is None else side for side in self.low or (None,) * self.size)
        high = tuple(math.inf if side is None else side for side in self.high or (None,) * self.size)
        return low, high

    @property
    def size(self) -> int:
        """The number of values of a point."""
        return len(self.low or self.high)

    def depth(self, points: Float[Tensor, "*axes L"]) -> Float[Tensor, "*axes"]:
        """Return the depth of points in the box; negative outside."""
        low, high = (_point(corner, points.device, points.dtype) for corner in self.corners)
        beyond = torch.maximum(low - points, points - high)
        if beyond.shape[-1] == 1:
            return -beyond[..., 0]
        outside: Tensor = torch.linalg.vector_norm(beyond.clamp_min(0), dim=-1)
        return -(outside + beyond.amax(dim=-1).clamp_max(0))

    def within(self, other: Region) -> bool:
        """Whether every point is in the other region too."""
        if other.size != self.size:
            return False
        low, high = self.corners
        if isinstance(other, Box):
            other_low, other_high = other.corners
            return all(theirs <= mine for theirs, mine in zip(other_low, low, strict=True)) and all(
                mine <= theirs for theirs, mine in zip(other_high, high, strict=True)
            )
        if isinstance(other, Ball):
            sides = zip(low, high, other.centre, strict=True)
            return math.hypot(*(max(abs(lo - at), abs(hi - at)) for lo, hi, at in sides)) <= other.radius
        return False


@functools.lru_cache(maxsize=256)
def _point(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Float[Tensor, "L"]:
    """Return a point as a tensor, cached because a search uses the same point many times."""
    with torch.inference_mode(False):  # the cached tensor is used outside inference mode too, by gradient solvers
        return torch.tensor(values, device=device, dtype=dtype)
