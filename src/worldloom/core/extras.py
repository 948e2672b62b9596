"""The extras of `pip install 'worldloom[EXTRA]'`: their features, and the error message for a missing extra."""

import importlib
from dataclasses import dataclass
from typing import Any

from worldloom.core.errors import ConfigError


@dataclass(frozen=True)
class Extra:
    """An optional part of worldloom: `promise` describes its features, `modules` are the modules that it needs."""

    promise: str
    modules: tuple[str, ...]


EXTRAS = {
    "pusht": Extra("the PushT environment", ("gym_pusht",)),
    "mujoco": Extra("the Reacher, PointMaze and PointHazards environments", ("mujoco",)),
    "cube": Extra("the Cube environment of OGBench", ("ogbench", "mujoco")),
    "hdf5": Extra("robomimic and stable-worldmodel files", ("h5py",)),
    "minari": Extra("Minari datasets", ("h5py",)),
    "tensorboard": Extra("TensorBoard logs of training runs", ("tensorboard",)),
    "weave": Extra("a consortium over the network, and privacy accounting of sampled rounds", ("flwr", "opacus")),
}


def missing_extra(name: str, error: ImportError) -> str:
    """Return the message for a failed import of a module of the extra `name`."""
    promise = EXTRAS[name].promise
    return f"the extra '{name}' ({promise}) is not installed: {error}; run: pip install 'worldloom[{name}]'"


def require(module: str, extra: str) -> Any:
    """Import a module of an extra.

    Raises:
        ConfigError: the extra is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(missing_extra(extra, error)) from error
