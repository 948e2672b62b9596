"""The inputs of an agent's decision."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int, UInt8
from torch import Tensor

from worldloom.core.types import Batched, Context


@dataclass(frozen=True, kw_only=True)
class Situation(Batched):
    """All inputs of a decision that vary: with the same fixed parts of an agent, equal situations give equal plans.

    Attributes:
        goal: the latents to aim at.
        initial: the candidates that the search starts from.
        safe: the state in which each environment last had a plan that satisfied the guardrails.
        stages: the number of stages of a sequence that each environment has completed.
        randomness: the state of the random generator.
        stretch: the factor on the calibrated margins.
    """

    whole: ClassVar[frozenset[str]] = frozenset({"randomness"})

    context: Context
    goal: Float[Tensor, "B D"]
    initial: Float[Tensor, "B I T A"] | None
    safe: Float[Tensor, "B D"]
    stages: Int[Tensor, "B"] | None
    randomness: UInt8[Tensor, "_"]
    stretch: float = 1.0
