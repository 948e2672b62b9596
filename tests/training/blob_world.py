"""A tiny pixel world made in memory: a moving blob before a static background drawn anew for each episode."""

import numpy as np

from worldloom.core.types import ActionSpec, ObservationSpec
from worldloom.data import DatasetSpec, Frames

SIDE = 32


def blob_cache(*, episodes: int = 80, steps: int = 40, seed: int = 0) -> Frames:
    """Return frames of a blob moved by a persistent random walk (at most 2 px a step) over random walls."""
    random = np.random.default_rng(seed)
    frames = steps + 1
    heading = random.uniform(0, 2 * np.pi, (episodes, 1)) + random.normal(0, 0.4, (episodes, steps)).cumsum(1)
    wished = np.stack([np.cos(heading), np.sin(heading)], axis=-1).astype(np.float32)
    position = np.empty((episodes, frames, 2), np.float32)
    position[:, 0] = random.uniform(3, SIDE - 4, (episodes, 2))
    actions = np.zeros((episodes, frames, 2), np.float32)
    for t in range(steps):
        # Bounce: an action that would leave the picture is turned around, so that every action has its effect.
        outside = (position[:, t] + 2 * wished[:, t] < 3) | (position[:, t] + 2 * wished[:, t] > SIDE - 4)
        wished[:, t:][np.broadcast_to(outside[:, None], wished[:, t:].shape)] *= -1
        actions[:, t] = wished[:, t]
        position[:, t + 1] = np.clip(position[:, t] + 2 * actions[:, t], 3, SIDE - 4)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    # Walls: blocks of 4 x 4 pixels, each filled or not, the same in all frames of an episode.
    walls = np.kron(random.random((episodes, SIDE // 4, SIDE // 4)) < 0.3, np.ones((4, 4)))
    centre = position[..., None, None, :]
    blob = np.exp(-((columns - centre[..., 0]) ** 2 + (rows - centre[..., 1]) ** 2) / (2 * 1.5**2))
    pixels = np.empty((episodes, frames, SIDE, SIDE, 3), np.uint8)
    pixels[..., 0] = 255 * blob
    pixels[..., 1] = 255 * walls[:, None]
    pixels[..., 2] = pixels[..., 1]
    return make_cache(
        pixels=pixels.reshape(-1, SIDE, SIDE, 3),
        actions=actions.reshape(-1, 2),
        labels={"position": position.reshape(-1, 2)},
        episodes=episodes,
        steps=steps,
    )


def make_cache(
    *,
    actions: np.ndarray,
    labels: dict[str, np.ndarray],
    episodes: int,
    steps: int,
    pixels: np.ndarray | None = None,
    vector: np.ndarray | None = None,
) -> Frames:
    """Wrap arrays of equally long episodes, frame after frame."""
    observation = ObservationSpec(
        pixels=None if pixels is None else pixels.shape[1:], vector=0 if vector is None else vector.shape[1]
    )
    size = actions.shape[1]
    return Frames(
        spec=DatasetSpec(
            observation=observation,
            action=ActionSpec(low=(-1.0,) * size, high=(1.0,) * size),
            labels={name: column.shape[1] for name, column in labels.items()},
            environment={},
        ),
        fingerprint="in-memory",
        pixels=pixels,
        vector=vector,
        actions=actions,
        labels=labels,
        starts=np.arange(episodes) * (steps + 1),
        lengths=np.full(episodes, steps),
    )
