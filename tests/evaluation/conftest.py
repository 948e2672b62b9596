"""The fixtures of the dot world."""

from dot_world import agents, logged, protocol, wander  # noqa: F401 - fixtures
