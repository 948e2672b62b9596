"""worldloom: learn how a world works from reward-free logs, then plan in representation space."""

import importlib
import os
from typing import Any

__version__ = "0.1.0"

# OpenMP threads that wait for each other spin for milliseconds by default: on a core that is wanted elsewhere, that
# made training twenty times slower. A short spin costs nothing on a quiet machine. Read when PyTorch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# Loaded when first used, so that importing the package is light.
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
