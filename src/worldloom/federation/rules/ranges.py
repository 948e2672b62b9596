"""The permitted ranges of all numbers that other parties send; a number out of range is refused when it is received.

The ranges are far wider than honest values, and narrow enough that sums, products and conversions of numbers within
them never overflow. Integers stay below 2**53, so every JSON parser reads them exactly.
"""

from typing import Annotated, Any

from pydantic import Field, ValidationError

Count = Annotated[int, Field(ge=0, le=10**15)]
"""A number of frames, steps or bytes."""
Number = Annotated[int, Field(ge=0, le=10**6)]
"""The number of a round, or of an attempt at a round."""
Length = Annotated[int, Field(ge=0, le=10**12)]
"""A number of ledger entries."""
Share = Annotated[float, Field(ge=0, le=1)]
"""A weight or another share of a whole."""
Epsilon = Annotated[float, Field(ge=0, le=1e6)]
"""Spent privacy; a larger epsilon guarantees nothing and is reported as null."""
Magnitude = Annotated[float, Field(ge=-1e30, le=1e30)]
"""A part of a loss, or another figure without a narrower range."""
Loss = Annotated[float, Field(gt=0, le=1e30)]
"""A loss, which is a positive sum of squares."""
Seconds = Annotated[float, Field(gt=0, le=366 * 86400)]
"""A waiting time; the limit of a year is below the longest wait that the operating system allows."""

LARGEST_VALUE = 2.0**100
"""The largest magnitude that a tensor's values may have, about 1e30: sums over all rounds stay finite in float32."""


def within(kind: Any, value: Any) -> Any:
    """Return a value if it has the type and range of the pydantic `TypeAdapter` `kind`, otherwise None."""
    try:
        return kind.validate_python(value, strict=True)
    except ValidationError:
        return None
