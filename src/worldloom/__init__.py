"""worldloom: learn how a world works from reward-free logs, then plan in representation space."""

import importlib
import os
from typing import Any

__version__ = "0.1.0"

# By default, waiting OpenMP threads spin for milliseconds. If other processes need the core, training was twenty times
# slower. A short spin costs nothing on an idle machine. The variable is read when PyTorch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# Loaded on first use, so that importing the package is fast.
_WHERE = {
    "EpisodeDataset": "worldloom.data",
    "Recipe": "worldloom.recipes",
    "Run": "worldloom.workflow",
    "Session": "worldloom.workflow",
    "collect": "worldloom.workflow",
    "evaluate": "worldloom.workflow",
    "load_recipe": "worldloom.recipes",
    "plan_once": "worldloom.workflow",
    "report_path": "worldloom.workflow",
    "train": "worldloom.workflow",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'worldloom' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
