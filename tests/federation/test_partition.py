import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from worldloom.core.errors import ConfigError
from worldloom.core.types import ActionSpec, ObservationSpec
from worldloom.data import DatasetSpec, Statistics
from worldloom.federation import Partition, PartitionConfig, check_has_a_pilot, fingerprint
from worldloom.models import JEPA, JEPAConfig, build_jepa
from worldloom.models.encoders import Fusion
from worldloom.recipes import RECIPES

ACTION = ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0))


def built(config: JEPAConfig) -> JEPA:
    try:
        observation = ObservationSpec(pixels=(64, 64, 3))
        return build_jepa(config, observation, ACTION, Statistics.unit(observation, ACTION), seed=0)
    except ConfigError:
        observation = ObservationSpec(vector=6)
        return build_jepa(config, observation, ACTION, Statistics.unit(observation, ACTION), seed=0)


def state_of(config: JEPAConfig) -> dict[str, torch.Tensor]:
    return built(config).state_dict()


@pytest.mark.parametrize("name", list(RECIPES))
def test_the_partition_is_total_and_disjoint_for_every_recipe(name: str) -> None:
    model = built(RECIPES[name]().model)
    state = model.state_dict()
    partition = PartitionConfig().split(state)
    assert sorted((*partition.shared, *partition.sovereign)) == sorted(state)
    assert not set(partition.shared) & set(partition.sovereign)
    assert any(name.startswith("encoder.") for name in partition.shared)
    assert any(name.startswith("predictor.") for name in partition.shared)
    assert set(partition.shared) <= {name for name, _ in model.named_parameters()}  # no statistic of anybody's data
    assert list(partition.shared_of(state)) == list(partition.shared)


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_of_frames_and_vectors_together_no_statistic_is_shared_by_default(positions: str) -> None:
    observation = ObservationSpec(pixels=(64, 64, 3), vector=6)
    encoder = Fusion.parse({"pixels": {"name": "vit", "positions": positions}})
    statistics = Statistics.unit(observation, ACTION)
    model = build_jepa(JEPAConfig(encoder=encoder), observation, ACTION, statistics, seed=0)
    sovereign = PartitionConfig().split(model.state_dict()).sovereign
    parts = ("encoder.pixels.normalise", "encoder.vector.standardise", "normalise_actions")
    assert {f"{part}.{name}" for part in parts for name in ("shift", "scale")} <= set(sovereign)
    spec = DatasetSpec(observation=observation, action=ACTION, labels={})
    check_has_a_pilot(model.config, spec, PartitionConfig())


def test_what_comes_from_an_owners_own_stem_is_sovereign() -> None:
    state = state_of(JEPAConfig(action_stem=3))
    partition = PartitionConfig().split(state)
    stem = {name for name in state if name.startswith("action_stem.")}
    assert stem
    assert stem <= set(partition.sovereign)
    assert "encoder.stem.weight" in PartitionConfig().split({"encoder.stem.weight": torch.zeros(1)}).sovereign


def test_an_undeclared_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'probe\.weight' is neither"):
        PartitionConfig().split({"encoder.a": torch.zeros(1), "probe.weight": torch.zeros(1)})


@given(st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.bool]))
def test_whole_numbers_are_never_shared(dtype: torch.dtype) -> None:
    state = {"encoder.batch.num_batches_tracked": torch.zeros((), dtype=dtype), "encoder.a": torch.zeros(2)}
    partition = PartitionConfig().split(state)
    assert partition.shared == ("encoder.a",)
    assert partition.sovereign == ("encoder.batch.num_batches_tracked",)


def test_a_name_stands_once() -> None:
    with pytest.raises(ConfigError, match="twice"):
        Partition(shared=("a",), sovereign=("a",))


def test_a_fingerprint_knows_every_byte_name_shape_and_dtype_and_no_order() -> None:
    state = {"a": torch.arange(4.0), "b": torch.tensor(1.0, dtype=torch.bfloat16), "c": torch.zeros(0)}
    known = fingerprint(state)
    assert len(known) == 64
    assert fingerprint(dict(reversed(state.items()))) == known
    assert fingerprint({**state, "a": torch.arange(8.0)[::2] / 2}) == known  # strides are no content
    changes = {
        "byte": {**state, "a": torch.tensor([0.0, 1, 2, 3.0000002])},
        "sign of zero": {**state, "a": torch.tensor([-0.0, 1, 2, 3])},
        "shape": {**state, "a": torch.arange(4.0).reshape(2, 2)},
        "dtype": {**state, "a": torch.arange(4.0).view(torch.int32)},
        "name": {"d": state["a"], "b": state["b"], "c": state["c"]},
    }
    for change in changes.values():
        assert fingerprint(change) != known
