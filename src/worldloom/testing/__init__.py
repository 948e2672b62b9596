"""Conformance kits for the protocols of `worldloom.core`, and small fakes with a closed form."""

from worldloom.testing.conformance import check_world_model
from worldloom.testing.linear_world import LinearWorld

__all__ = [
    "LinearWorld",
    "check_world_model",
]
