"""Fills and queries an episodic memory with the model of a run."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.core.errors import DataError
from worldloom.core.progress import SILENT, Progress
from worldloom.data import EpisodeDataset
from worldloom.memory import EpisodicMemory
from worldloom.workflow.run import Run


def encode_picture(run: Run, path: Path, memory: EpisodicMemory) -> Float[Tensor, "1 D"]:
    """Return the latent of a picture, to query a memory of the same model.

    Raises:
        CheckpointError: the memory belongs to a different model.
        DataError: the model needs more than pixels, or the picture has the wrong size.
    """
    memory.spec.check(run.model.spec, memory.path)
    return run.heads.examples([str(path)]).cpu()


def remember(run: Run, data: Path | str, memory: EpisodicMemory, *, progress: Progress = SILENT) -> int:
    """Append the episodes of a dataset to a memory, one record per frame that the model sees; return the record count.

    Raises:
        DataError: the dataset's observations or actions do not match the model.
    """
    spec = run.model.spec
    dataset = EpisodeDataset.open(data)
    if dataset.spec.observation != spec.observation or dataset.spec.action.size != spec.action.size:
        raise DataError(
            f"{data} has observations {dataset.spec.observation} and actions of {dataset.spec.action.size} values; the "
            f"model expects observations {spec.observation} and actions of {spec.action.size} values. Use data with "
            f"these shapes"
        )
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
