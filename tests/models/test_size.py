"""A model that fits into no machine is refused by arithmetic, before memory is allocated for it."""

import resource
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from worldloom.core.errors import CheckpointError, ConfigError, DataError
from worldloom.core.types import ActionSpec, ObservationSpec
from worldloom.data import Statistics
from worldloom.models import JEPAConfig, build_from, build_jepa
from worldloom.models.size import shapes_of

PIXELS, VECTOR = ObservationSpec(pixels=(64, 64, 3)), ObservationSpec(vector=8)
BOTH = ObservationSpec(pixels=(64, 64, 3), vector=8)
ACTION = ActionSpec(low=(-1.0,), high=(1.0,))
LARGEST = 65_536
CASES: list[tuple[ObservationSpec, dict[str, Any]]] = [
    (PIXELS, {"encoder": {"name": "patch-conv", "hidden": LARGEST, "patch": 1, "channels": [LARGEST]}}),
    (PIXELS, {"encoder": {"name": "vit", "width": 65_532, "heads": 3, "depth": 1024}}),
    (VECTOR, {"encoder": {"name": "vector", "hidden": [LARGEST] * 64}}),
    (VECTOR, {"encoder": {"name": "vector"}, "predictor": {"name": "mlp", "hidden": [LARGEST] * 64}}),
    (VECTOR, {"encoder": None, "predictor": {"name": "transformer", "width": LARGEST, "depth": 1024}}),
    (VECTOR, {"encoder": None, "latent_dim": LARGEST, "context": LARGEST}),
    (ObservationSpec(pixels=(LARGEST, LARGEST, LARGEST)), {"encoder": {"name": "patch-conv", "hidden": LARGEST}}),
]


@pytest.fixture
def limited() -> Iterator[None]:
    """Let allocations of more than 32 GiB fail, on any machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**35, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(("observation", "model"), CASES)
def test_a_model_beyond_any_machine_is_refused(
    observation: ObservationSpec, model: dict[str, Any], limited: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worldloom.models.size.psutil.virtual_memory", lambda: type("M", (), {"total": 2**34}))
    began = time.perf_counter()
    with torch.device("meta"):
        statistics = Statistics.unit(observation, ACTION)
    with pytest.raises(
        ConfigError, match=r"parameters need [0-9,]+ GiB, but this machine has 16 GiB|too large for any"
    ):
        build_jepa(JEPAConfig.parse(model), observation, ACTION, statistics, seed=0)
    assert time.perf_counter() - began < 20


@pytest.mark.parametrize(
    "model",
    [
        {"latent_dim": 10**12},
        {"block": 2**63},
        {"context": 0},
        {"encoder": {"name": "vit", "depth": 10**9}},
        {"encoder": {"name": "patch-conv", "channels": [1] * 1000}},
        {"encoder": {"name": "vector", "hidden": [-5]}},
        {"predictor": {"name": "mlp", "hidden": [8] * 100_000}},
    ],
)
def test_sizes_beyond_any_model_are_refused_as_they_are_read(model: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="less than or equal|greater than or equal|at most|shorter"):
        JEPAConfig.parse(model)


def test_the_shapes_of_an_observation_are_bounded() -> None:
    for values in ({"pixels": (10**6, 64, 3)}, {"vector": 2**40}):
        with pytest.raises(DataError, match="Correct the observation's shape"):
            ObservationSpec(**values)


@pytest.mark.parametrize(
    ("observation", "model"),
    [
        (PIXELS, {}),
        (PIXELS, {"encoder": {"name": "stemmed-patch-conv"}, "action_stem": 2}),
        (PIXELS, {"encoder": {"name": "vit"}, "predictor": {"name": "transformer"}}),
        (PIXELS, {"encoder": {"name": "vit", "positions": "sincos"}}),
        (VECTOR, {"encoder": None, "context": 2}),
        (BOTH, {"encoder": {"name": "fusion"}}),
    ],
)
def test_the_size_of_every_part_is_known_before_it_is_built(
    observation: ObservationSpec, model: dict[str, Any]
) -> None:
    config = JEPAConfig.parse(model)

    def build() -> torch.nn.Module:
        return build_jepa(config, observation, ACTION, Statistics.unit(observation, ACTION), seed=0)

    built = build()
    assert shapes_of(build) == {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    with pytest.raises(CheckpointError, match="do not match the model in its configuration"):
        build_from({**built.state_dict(), "norm.running_mean": torch.zeros(1)}, build, "model")


def test_a_part_that_needs_values_is_built_without_the_check() -> None:
    def build() -> torch.nn.Module:
        layer = torch.nn.Linear(2, 2)
        assert layer.weight.sum().item() != 0
        return layer

    assert shapes_of(build) is None
    assert build_from(torch.nn.Linear(2, 2).state_dict(), build, "model").weight.shape == (2, 2)
