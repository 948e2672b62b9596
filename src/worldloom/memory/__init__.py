"""Memory: what was seen, kept across restarts, and the landmarks by which far goals are reached."""

from worldloom.memory.landmarks import Check, LandmarkConfig, LandmarkGraph, Route

__all__ = ["Check", "LandmarkConfig", "LandmarkGraph", "Route"]
