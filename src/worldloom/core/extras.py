"""The extras of `pip install 'worldloom[EXTRA]'`: what each promises, and the error text where one is missing."""

import importlib
from dataclasses import dataclass
from typing import Any

from worldloom.core.errors import ConfigError


@dataclass(frozen=True)
class Extra:
    """An optional part: what it promises, and the modules that it installs."""

    promise: str
    modules: tuple[str, ...]


EXTRAS = {
    "pusht": Extra("the world PushT", ("gym_pusht",)),
    "mujoco": Extra("the worlds Reacher, PointMaze and PointHazards", ("mujoco",)),
    "cube": Extra("the world Cube of OGBench", ("ogbench", "mujoco")),
    "hdf5": Extra("files of robomimic and stable-worldmodel", ("h5py",)),
    "minari": Extra("datasets of Minari", ("h5py",)),
    "tensorboard": Extra("TensorBoard figures of a training", ("tensorboard",)),
    "weave": Extra("a consortium over the network, and privacy accounting of sampled rounds", ("flwr", "opacus")),
}


def missing_extra(name: str, error: ImportError) -> str:
    """Return the message for a failed import of a module of the extra `name`."""
    promise = EXTRAS[name].promise
    return f"the extra '{name}' ({promise}) is not installed: {error}; run: pip install 'worldloom[{name}]'"


def require(module: str, extra: str) -> Any:
    """Import a module of an extra.

    Raises:
        ConfigError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(missing_extra(extra, error)) from error
