"""Gymnasium environments with named factors of variation, and `VectorWorld`, which runs environments in parallel."""

from typing import TYPE_CHECKING, Any

from worldloom.envs.factors import FourRoomsFactors, MazeFactors, PitsFactors, RoomFactors, TwoRoomFactors
from worldloom.envs.registration import declares_plant, register_envs
from worldloom.envs.rendering import GL_REMEDY
from worldloom.envs.rooms import RoomEnv, RoomsVectorEnv
from worldloom.envs.tasks import Task, TaskOptions

if TYPE_CHECKING:
    from worldloom.envs.vector_world import Frame, VectorWorld, Where

__all__ = [
    "GL_REMEDY",
    "FourRoomsFactors",
    "Frame",
    "MazeFactors",
    "PitsFactors",
    "RoomEnv",
    "RoomFactors",
    "RoomsVectorEnv",
    "Task",
    "TaskOptions",
    "TwoRoomFactors",
    "VectorWorld",
    "Where",
    "declares_plant",
    "register_envs",
]

register_envs()


def __getattr__(name: str) -> Any:
    # Imported on first use, because it needs PyTorch and a process that only steps environments does not.
    if name in ("Frame", "VectorWorld", "Where"):
        from worldloom.envs import vector_world

        return getattr(vector_world, name)
    raise AttributeError(f"module 'worldloom.envs' has no attribute {name!r}")
