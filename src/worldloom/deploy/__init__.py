"""Deployment: links to plants that run on their own clock, and the control loop that drives them."""

from worldloom.deploy.control import ControlLoop, ControlReport
from worldloom.deploy.link import CallbackLink, Link, PlantReading, SocketLink
from worldloom.deploy.link_env import LinkEnv
from worldloom.deploy.plant import PlantServer
from worldloom.deploy.timeline import draw_timeline
from worldloom.deploy.wire import LinkError

__all__ = [
    "CallbackLink",
    "ControlLoop",
    "ControlReport",
    "Link",
    "LinkEnv",
    "LinkError",
    "PlantReading",
    "PlantServer",
    "SocketLink",
    "draw_timeline",
]
