"""worldloom: learn how a world works from reward-free logs, then plan in representation space."""

__version__ = "0.1.0"
