"""Small pixel worlds with named factors of variation, registered with Gymnasium."""

from worldloom.envs.factors import FourRoomsFactors, MazeFactors, RoomFactors, TwoRoomFactors
from worldloom.envs.registration import register_envs
from worldloom.envs.rooms import (
    FourRoomsEnv,
    FourRoomsVectorEnv,
    MazeEnv,
    MazeVectorEnv,
    TwoRoomEnv,
    TwoRoomVectorEnv,
)
from worldloom.envs.tasks import Task, TaskOptions

__all__ = [
    "FourRoomsEnv",
    "FourRoomsFactors",
    "FourRoomsVectorEnv",
    "MazeEnv",
    "MazeFactors",
    "MazeVectorEnv",
    "RoomFactors",
    "Task",
    "TaskOptions",
    "TwoRoomEnv",
    "TwoRoomFactors",
    "TwoRoomVectorEnv",
    "register_envs",
]

register_envs()
