"""Worlds, registered with Gymnasium, and links to plants that run on their own clock."""

import importlib
from typing import TYPE_CHECKING, Any

from worldloom.envs.factors import FourRoomsFactors, MazeFactors, PitsFactors, RoomFactors, TwoRoomFactors
from worldloom.envs.registration import register_envs
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

if TYPE_CHECKING:
    from worldloom.envs.link import CallbackLink, Link, Reading, SocketLink
    from worldloom.envs.link_env import LinkEnv
    from worldloom.envs.plant import PlantServer, serve_plant
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
    "PitsEnv",
    "PitsFactors",
    "PitsVectorEnv",
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

# Links need PyTorch's types; worlds do not, and are light to import.
_LINKS = {
    "CallbackLink": "link",
    "Link": "link",
    "LinkEnv": "link_env",
    "LinkError": "wire",
    "PlantServer": "plant",
    "Reading": "link",
    "SocketLink": "link",
    "serve_plant": "plant",
}

register_envs()


def __getattr__(name: str) -> Any:
    if name not in _LINKS:
        raise AttributeError(f"module 'worldloom.envs' has no attribute {name!r}")
    return getattr(importlib.import_module(f"worldloom.envs.{_LINKS[name]}"), name)
