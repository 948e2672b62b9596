"""The world of a protocol, and the locations in its error messages."""

from collections.abc import Sequence

from worldloom.envs import VectorWorld, Where
from worldloom.evaluation.protocol import Protocol


def open_world(protocol: Protocol, size: int) -> VectorWorld:
    """Return `size` parallel environments of a protocol; close them, or use them in a `with` statement."""
    return VectorWorld(
        protocol.env_id, size, protocol.env_kwargs, native=not protocol.replays, pictures=protocol.pictures
    )


def naming(world: VectorWorld, seeds: Sequence[int], where: str) -> Where:
    """Return a function that names a place in the world: `where`, the episode's seed and the step."""

    def name(row: int | None) -> str:
        if row is not None:
            return f"{where}, episode seed {seeds[row]}, step {world.steps[row]}: "
        some = ", ".join(map(str, seeds[:5])) + (", ..." if len(seeds) > 5 else "")
        return f"{where}, one of the episode seeds {some}, step {world.steps.max()}: "

    return name
