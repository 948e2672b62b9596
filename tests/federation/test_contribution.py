import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from worldloom.core.errors import DataError
from worldloom.federation import Base, Contribution, Partition, PartitionConfig
from worldloom.federation.rounds.codecs import Float32

FACTS = {"owner": "ada", "round": 3, "base": "00", "steps": 10, "frames": 640, "data_class": "open"}
SHARED = ("encoder.out.weight", "predictor.a")
SOVEREIGN = ("encoder.normalise.scale", "encoder.stem.weight", "norm.running_mean", "normalise_actions.shift")


def states(seed: int, names: tuple[str, ...]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    before, after = ({name: torch.randn(2, 3, generator=draw) for name in names} for _ in range(2))
    return before, after


@given(st.integers(0, 2**32 - 1), st.sets(st.sampled_from(SOVEREIGN)), st.sets(st.sampled_from(SHARED), min_size=1))
def test_a_contribution_is_the_delta_of_the_shared_part_alone(seed: int, kept: set[str], given_: set[str]) -> None:
    before, after = states(seed, (*sorted(kept), *sorted(given_)))
    partition = PartitionConfig().split(before)
    made = Contribution.of(partition, before, after, **FACTS)
    assert set(made.tensors) == given_
    assert all(torch.equal(made.tensors[name], after[name] - before[name]) for name in given_)
    assert not any(name in json.dumps(made.body()) for name in SOVEREIGN)
    # What is sovereign changes nothing of it.
    other = {name: tensor + 1 if name in kept else tensor for name, tensor in after.items()}
    again = Contribution.of(partition, before, other, **FACTS)
    assert all(torch.equal(made.tensors[name], again.tensors[name]) for name in given_)


def test_it_cannot_be_made_with_a_sovereign_name() -> None:
    partition = Partition(shared=("encoder.a",), sovereign=("norm.b",))
    with pytest.raises(DataError, match=r"norm\.b"):
        Contribution(partition=partition, tensors={"encoder.a": torch.zeros(1), "norm.b": torch.zeros(1)}, **FACTS)
    tensors = {"encoder.a": torch.zeros(1)}
    made = Contribution(partition=partition, tensors=tensors, **FACTS)
    tensors["norm.b"] = torch.zeros(1)
    assert set(made.tensors) == {"encoder.a"}
    with pytest.raises(TypeError):
        made.tensors["norm.b"] = torch.zeros(1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", SHARED)
def test_a_delta_that_is_not_finite_is_refused_by_name(name: str, bad: float) -> None:
    before, after = states(0, SHARED)
    after[name][1, 1] = bad
    with pytest.raises(DataError, match=name):
        Contribution.of(PartitionConfig().split(before), before, after, **FACTS)


def test_other_shapes_dtypes_and_counts_are_refused() -> None:
    before, after = states(0, SHARED)
    partition = PartitionConfig().split(before)
    for wrong in (torch.zeros(3, 2), torch.zeros(1, 3), torch.zeros(2, 3).double()):
        with pytest.raises(DataError, match=r"predictor\.a"):
            Contribution.of(partition, before, {**after, "predictor.a": wrong}, **FACTS)
    with pytest.raises(DataError, match="steps"):
        Contribution.of(partition, before, after, **{**FACTS, "steps": -1})


def test_a_delta_that_came_is_checked_against_the_base() -> None:
    shapes = Base.of({"a": torch.zeros(2, 3)}).shapes
    decode = Float32().decode
    assert torch.equal(decode({"a|value": torch.ones(2, 3)}, shapes)["a"], torch.ones(2, 3))
    for wrong in (torch.ones(3, 2), torch.full((2, 3), torch.nan), torch.ones(2, 3, dtype=torch.int64)):
        with pytest.raises(DataError, match="'a'"):
            decode({"a|value": wrong}, shapes)
    with pytest.raises(DataError, match="lacks"):
        decode({}, shapes)
