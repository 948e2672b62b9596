"""What a decision of an agent follows from: the same situation gives the same plan."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int, UInt8
from torch import Tensor

from worldloom.core.types import Batched, Context


@dataclass(frozen=True, kw_only=True)
class Situation(Batched):
    """Everything that a plan follows from, apart from the agent's own parts: the same situation gives the same plan.

    Attributes:
        goal: where to aim.
        initial: the candidates that the search starts from.
        safe: where each environment last had a plan that held.
        stages: how many stages of a sequence lie behind each environment.
        randomness: the state of the generator.
        stretch: the factor by which the calibrated margins are multiplied.
    """

    whole: ClassVar[frozenset[str]] = frozenset({"randomness"})

    context: Context
    goal: Float[Tensor, "B D"]
    initial: Float[Tensor, "B I T A"] | None
    safe: Float[Tensor, "B D"]
    stages: Int[Tensor, "B"] | None
    randomness: UInt8[Tensor, "_"]
    stretch: float = 1.0
