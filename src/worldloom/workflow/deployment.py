"""Deploys a run on a plant: reads the goal, checks that run and plant match, and writes the report."""

import itertools
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np

from worldloom.core.config import Config
from worldloom.core.errors import ConfigError, DataError
from worldloom.core.files import read_json, storage_errors, write_json
from worldloom.core.types import Goal, Observations
from worldloom.deploy import ControlReport, Link, draw_timeline
from worldloom.workflow.run import Run


class _GoalFile(Config):
    """A goal as JSON."""

    vector: tuple[float, ...] | None = None
    pixels: str | None = None


def read_goal(run: Run, path: Path) -> Goal:
    """Read a goal: a picture, or JSON with a `vector`, a picture as `pixels` (a path relative to the file), or both.

    Raises:
        DataError: the goal does not match the observations that the model was trained on.
    """
    spec = run.model.spec.observation
    if path.suffix.lower() != ".json":
        goal = run.read_picture(path) if spec.pixels is not None else None
        if goal is None or spec.vector:
            raise DataError(
                f"the goal {path} is not JSON, but the model expects a vector of {spec.vector} values; write the "
                f'goal as JSON: {{"vector": [...]}}, with "pixels" if the model also uses them'
            )
        return Goal(observations=goal)
    values = read_json(path)
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected a JSON object with 'vector', 'pixels' or both; got {type(values).__name__}")
    try:
        stated = _GoalFile.parse(values)
    except ConfigError as error:
        raise DataError(f"{path}: expected a goal with 'vector', 'pixels' or both: {error}") from None
    vector = pixels = None
    if stated.vector is not None:
        with np.errstate(over="ignore"):
            vector = np.array(stated.vector, np.float32)
        if not np.isfinite(vector).all():
            raise DataError(f"the vector in {path} has numbers above {np.finfo(np.float32).max:g}; correct them")
    if stated.pixels is not None and spec.pixels is not None:
        pixels = run.read_picture(path.parent / stated.pixels).pixels
    goal = Observations.from_numpy(None if pixels is None else pixels.numpy(), None if vector is None else vector[None])
    spec.check(goal)
    return Goal(observations=goal)


def check_plant(run: Run, link: Link) -> None:
    """Check that a plant has the observations and actions that the model was trained on.

    Raises:
        DataError: the observations or the actions differ.
    """
    spec = run.model.spec
    for name, ours, theirs in (
        ("observation", asdict(spec.observation), asdict(link.observation)),
        ("action", asdict(spec.action), asdict(link.action)),
    ):
        if ours != theirs:
            raise DataError(
                f"the model was trained with {name} {ours}, but the plant has {theirs}; deploy a run that was trained "
                f"on data from this plant"
            )


def store_report(run: Run, report: ControlReport) -> Path:
    """Write the report and the timeline of a deployment below the run folder; return their folder."""
    named = run.path / "deployments" / time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    for number in itertools.count(2):
        folder = named if number == 2 else named.with_name(f"{named.name}-{number - 1}")
        with storage_errors(folder), suppress(FileExistsError):  # of a deployment that ended in the same second
            folder.mkdir(parents=True)
            break
    write_json(folder / "report.json", report.to_json())
    draw_timeline(report, folder / "timeline.svg")
    return folder
