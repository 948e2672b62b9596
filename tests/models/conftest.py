import numpy as np
import pytest
import torch

from worldloom.core.types import ActionSpec, Observations, ObservationSpec, Windows
from worldloom.data import Statistics

ACTION = ActionSpec(low=(-1.0, -2.0), high=(1.0, 4.0))


class Case:
    """An observation spec with made-up statistics, observations and windows of it."""

    def __init__(self, *, pixels: tuple[int, int, int] | None, vector: int) -> None:
        self.observation = ObservationSpec(pixels=pixels, vector=vector)
        self.action = ACTION
        generator = torch.Generator().manual_seed(0)
        self.statistics = Statistics(
            pixel_mean=None if pixels is None else 255 * torch.rand(pixels, generator=generator),
            pixel_std=None if pixels is None else 60 * torch.rand(pixels, generator=generator),
            vector_mean=torch.randn(vector, generator=generator) if vector else None,
            vector_std=torch.rand(vector, generator=generator) + 0.5 if vector else None,
            action_mean=torch.tensor([0.1, 1.0]),
            action_std=torch.tensor([0.6, 1.7]),
        )

    def observations(self, *axes: int, seed: int = 0) -> Observations:
        random = np.random.default_rng(seed)
        pixels, vector = self.observation.pixels, self.observation.vector
        return Observations.from_numpy(
            None if pixels is None else random.integers(0, 256, (*axes, *pixels), dtype=np.uint8),
            random.normal(size=(*axes, vector)).astype(np.float32) if vector else None,
        )

    def windows(self, batch: int, frames: int, block: int, seed: int = 0) -> Windows:
        low, high = torch.tensor(self.action.low).repeat(block), torch.tensor(self.action.high).repeat(block)
        share = torch.rand(batch, frames - 1, len(low), generator=torch.Generator().manual_seed(seed))
        return Windows(observations=self.observations(batch, frames, seed=seed), actions=low + share * (high - low))


@pytest.fixture
def pixel_case() -> Case:
    return Case(pixels=(16, 16, 3), vector=0)


@pytest.fixture
def vector_case() -> Case:
    return Case(pixels=None, vector=5)


@pytest.fixture
def odd_case() -> Case:
    """Frames that are not square and no multiple of a patch, with a vector beside them."""
    return Case(pixels=(19, 13, 2), vector=3)
