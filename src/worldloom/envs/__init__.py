"""Small pixel worlds with named factors of variation, registered with Gymnasium."""

from worldloom.envs.factors import FourRoomsFactors, MazeFactors, RoomFactors, TwoRoomFactors
from worldloom.envs.link import CallbackLink, Link, Reading, SocketLink
from worldloom.envs.link_env import LinkEnv
from worldloom.envs.plant import PlantServer, serve_plant
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
from worldloom.envs.wire import LinkError

__all__ = [
    "CallbackLink",
    "FourRoomsEnv",
    "FourRoomsFactors",
    "FourRoomsVectorEnv",
    "Link",
    "LinkEnv",
    "LinkError",
    "MazeEnv",
    "MazeFactors",
    "MazeVectorEnv",
    "PlantServer",
    "Reading",
    "RoomFactors",
    "SocketLink",
    "Task",
    "TaskOptions",
    "TwoRoomEnv",
    "TwoRoomFactors",
    "TwoRoomVectorEnv",
    "register_envs",
    "serve_plant",
]

register_envs()
