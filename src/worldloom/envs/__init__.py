"""Worlds with named factors of variation, registered with Gymnasium."""

from worldloom.envs.factors import FourRoomsFactors, MazeFactors, PitsFactors, RoomFactors, TwoRoomFactors
from worldloom.envs.registration import register_envs
from worldloom.envs.rendering import GL_REMEDY
from worldloom.envs.rooms import (
    FourRoomsEnv,
    FourRoomsVectorEnv,
    MazeEnv,
    MazeVectorEnv,
    PitsEnv,
    PitsVectorEnv,
    TwoRoomEnv,
    TwoRoomVectorEnv,
)
from worldloom.envs.tasks import Task, TaskOptions

__all__ = [
    "GL_REMEDY",
    "FourRoomsEnv",
    "FourRoomsFactors",
    "FourRoomsVectorEnv",
    "MazeEnv",
    "MazeFactors",
    "MazeVectorEnv",
    "PitsEnv",
    "PitsFactors",
    "PitsVectorEnv",
    "RoomFactors",
    "Task",
    "TaskOptions",
    "TwoRoomEnv",
    "TwoRoomFactors",
    "TwoRoomVectorEnv",
    "register_envs",
]

register_envs()
