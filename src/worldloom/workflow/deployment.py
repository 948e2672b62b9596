"""Deploys a run on a plant: reads the goal, checks that run and plant match, and writes the report."""

import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from worldloom.core.errors import DataError
from worldloom.core.files import read_json, write_json
from worldloom.core.types import Goal, Observations
from worldloom.data import read_picture
from worldloom.deploy import ControlReport, Link, draw_timeline
from worldloom.workflow.run import Run


def read_goal(run: Run, path: Path) -> Goal:
    """Read a goal: a picture, or JSON with a `vector`, a picture as `pixels` (a path relative to the file), or both.

    Raises:
        DataError: the goal does not match the observations that the model was trained on.
    """
    spec = run.model.spec.observation
    if path.suffix.lower() != ".json":
        goal = read_picture(path, spec.pixels, values=run.picture_values) if spec.pixels is not None else None
        if goal is None or spec.vector:
            raise DataError(
                f"the goal {path} is not JSON, but the model expects a vector of {spec.vector} values; write the "
                f'goal as JSON: {{"vector": [...]}}, with "pixels" if the model also uses them'
            )
        return Goal(observations=goal)
    values = read_json(path)
    if not isinstance(values, dict) or (unknown := sorted(set(values) - {"vector", "pixels"})):
        raise DataError(
            f"{path}: expected a JSON object with 'vector', 'pixels' or both; got {unknown or type(values).__name__}"
        )
    vector = pixels = None
    if "vector" in values:
        try:
            vector = np.asarray(values["vector"], np.float32)
        except (TypeError, ValueError) as error:
            raise DataError(f"the vector in {path} must be a list of numbers: {error}") from None
        if vector.ndim != 1 or not np.isfinite(vector).all():
            raise DataError(
                f"the vector in {path} must be a flat list of finite numbers; got an array of shape {vector.shape}"
            )
    if "pixels" in values and spec.pixels is not None:
        file = path.parent / str(values["pixels"])
        pixels = read_picture(file, spec.pixels, values=run.picture_values).pixels
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
    folder = run.path / "deployments" / time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    write_json(folder / "report.json", report.to_json())
    draw_timeline(report, folder / "timeline.svg")
    return folder
