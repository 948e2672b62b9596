"""The provenance of a run: everything that is needed to reproduce it."""

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from worldloom.core.hardware import describe_hardware

_PACKAGES = ("worldloom", "torch", "lightning-fabric", "numpy", "gymnasium", "pylance", "safetensors")


def describe_provenance(*, data_fingerprint: str, seeds: Mapping[str, int]) -> dict[str, Any]:
    """Return the data's fingerprint, the commit, versions, hardware, threads and seeds as JSON values."""
    return {
        "data": data_fingerprint,
        "commit": git_commit(Path.cwd()),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "hardware": describe_hardware(),
        "seeds": dict(seeds),
    }


def git_commit(directory: Path) -> str | None:
    """Return the commit of `directory`, or None outside a repository; '+changes' marks uncommitted changes."""
    try:
        commit = _git(directory, "rev-parse", "HEAD")
        changed = _git(directory, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changed else commit


def _git(directory: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
