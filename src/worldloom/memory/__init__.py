"""Memory: episodic memory that survives a restart, and a graph of landmarks that makes far goals reachable."""

from worldloom.memory.episodic import EpisodicMemory, Recalled
from worldloom.memory.landmark_graph import Check, LandmarkConfig, LandmarkGraph, Route
from worldloom.memory.looking import as_rows, draw_memories, export, summarise
from worldloom.memory.migrations import migrate
from worldloom.memory.records import Memories, MemoryConfig, MemorySpec, Where

__all__ = [
    "Check",
    "EpisodicMemory",
    "LandmarkConfig",
    "LandmarkGraph",
    "Memories",
    "MemoryConfig",
    "MemorySpec",
    "Recalled",
    "Route",
    "Where",
    "as_rows",
    "draw_memories",
    "export",
    "migrate",
    "summarise",
]
