"""Fills and queries an episodic memory with the model of a run."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.core.errors import DataError
from worldloom.core.progress import SILENT, Progress
from worldloom.data import EpisodeDataset
from worldloom.memory import EpisodicMemory
from worldloom.workflow.run import Run

_log = logging.getLogger(__name__)


def encode_picture(run: Run, path: Path, memory: EpisodicMemory) -> Float[Tensor, "1 D"]:
    """Return the latent of a picture, to query a memory of the same model.

    Raises:
        CheckpointError: the memory belongs to a different model.
        DataError: the model needs more than pixels, or the picture has the wrong size.
    """
    memory.spec.check(run.model.spec, memory.path)
    return run.heads.examples([str(path)]).cpu()


def remember(run: Run, data: Path | str, memory: EpisodicMemory, *, progress: Progress = SILENT) -> int:
    """Append the episodes of a dataset to a memory, one record per model step; return the number of records.

    Raises:
        DataError: the dataset's observations or actions do not match the model, or the columns of its vector are in
            another order.
    """
    spec = run.model.spec
    dataset = EpisodeDataset.open(data)
    if dataset.spec.observation != spec.observation or dataset.spec.action.size != spec.action.size:
        raise DataError(
            f"{data} has observations {dataset.spec.observation} and actions of {dataset.spec.action.size} values; the "
            f"model expects observations {spec.observation} and actions of {spec.action.size} values. Use data with "
            f"these shapes"
        )
    _compare_columns(run.environment, dataset.spec.environment, str(data))
    count = 0
    with progress.task("remembering episodes", len(dataset), "episode") as task, torch.inference_mode():
        for number, stretch in zip(range(len(dataset)), memory.new_episodes(len(dataset)), strict=True):
            episode = dataset.episode(number)
            observations, latents, blocks = run.encode(episode)
            memory.append(
                latents,
                episodes=np.full(len(latents), stretch),
                steps=np.arange(len(latents)) * spec.block,
                actions=torch.cat([torch.zeros(1, spec.block_size), blocks.cpu()]),
                observations=observations,
            )
            count += len(latents)
            task.advance()
    memory.flush()
    return count


def _compare_columns(trained: Mapping[str, Any], given: Mapping[str, Any], data: str) -> None:
    """Check that the vector of a dataset has the columns of the run's data; warn if they have other names.

    Raises:
        DataError: the columns have the same names, in another order.
    """
    ours, theirs = trained.get("vector"), given.get("vector")
    if not isinstance(ours, list) or not isinstance(theirs, list) or ours == theirs:
        return
    names, others = (", ".join(str(column[0]) for column in columns) for columns in (ours, theirs))
    if sorted(map(str, ours)) == sorted(map(str, theirs)):
        raise DataError(
            f"the vector of {data} has the columns {others}, but the model was trained on {names}, in this order. "
            f"Convert the data again with --columns observation={names.replace(', ', ',')}"
        )
    _log.warning(
        "the vector of %s has the columns %s, and the model was trained on %s. Check that the columns mean the same",
        data,
        others,
        names,
    )
