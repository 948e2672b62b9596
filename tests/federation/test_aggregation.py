import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from worldloom.core.errors import ConfigError, DataError
from worldloom.federation import AGGREGATORS, Aggregate, Aggregator, Deltas, capped
from worldloom.federation.rounds.aggregation import ClippedMean, CoordinateMedian, Krum, Mean, TrimmedMean

SHAPES = {"w": torch.Size((4, 3)), "b": torch.Size(()), "none": torch.Size((0, 2))}
ALL = [AGGREGATORS[name]() for name in AGGREGATORS]


def honest(owners: int, *, noise: float = 0.1) -> dict[str, dict[str, Tensor]]:
    """Deltas that are 1 everywhere, but for noise."""
    draw = torch.Generator().manual_seed(0)
    names = [f"owner-{i}" for i in range(owners)]
    return {name: {t: 1 + noise * torch.randn(s, generator=draw) for t, s in SHAPES.items()} for name in names}


def woven(by: Aggregator, deltas: Mapping[str, Mapping[str, Tensor]], cap: float = 1.0, **weights: float) -> Aggregate:
    given_ = capped({owner: weights.get(owner, 1.0) for owner in deltas}, cap)
    sources = {owner: delta.__getitem__ for owner, delta in deltas.items()}
    return by.aggregate(Deltas(sources=sources, weights=given_, shapes=SHAPES, cap=cap))


def away(found: Aggregate) -> float:
    return max((found.tensors[name] - 1).abs().max().item() for name in ("w", "b"))


WEIGHTS = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.one_of(st.floats(0, 1e308), st.sampled_from([0.0, 5e-324, 1e-308, 1.0, 1.7e308])),
    min_size=1,
    max_size=12,
)


@given(WEIGHTS, st.floats(0, 1, exclude_min=True))
def test_no_weight_is_above_the_cap_after_normalisation(weights: dict[str, float], cap: float) -> None:
    owners = [owner for owner, weight in weights.items() if weight > 0]
    if len(owners) * cap < 1 - 1e-6:
        with pytest.raises(ConfigError, match="cap"):
            capped(weights, cap)
        return
    assume(len(owners) * cap >= 1)
    found = capped(weights, cap)
    assert set(found) == set(weights)
    assert all(0 <= weight <= cap for weight in found.values())
    assert math.fsum(found.values()) == pytest.approx(1, abs=1e-9)
    assert all(found[owner] == 0 for owner in weights if owner not in owners)
    # Below the cap, proportions are kept; and nobody at the cap was given less than one below it.
    below = [owner for owner in owners if found[owner] < cap * (1 - 1e-12) and found[owner] > 1e-300]
    for one in below:
        for other in below:
            ratio = math.log(weights[one]) - math.log(weights[other])
            assert math.log(found[one]) - math.log(found[other]) == pytest.approx(ratio, abs=1e-6)
    assert all(weights[one] >= weights[other] for one in owners if found[one] >= cap for other in below)


@pytest.mark.parametrize(
    ("weights", "cap", "expected"),
    [
        ({"a": 9.0, "b": 1.0}, 0.5, {"a": 0.5, "b": 0.5}),
        ({"a": 8.0, "b": 1.0, "c": 1.0}, 0.4, {"a": 0.4, "b": 0.3, "c": 0.3}),
        ({"a": 60.0, "b": 30.0, "c": 6.0, "d": 4.0}, 0.4, {"a": 0.4, "b": 0.4, "c": 0.12, "d": 0.08}),
        ({"a": 7.0}, 1.0, {"a": 1.0}),
        ({"a": 1.0, "b": 1.0, "c": 5.0}, 1 / 3, {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}),
        ({"a": 1.7e308, "b": 1.7e308, "c": 5e-324}, 0.4, {"a": 0.4, "b": 0.4, "c": 0.2}),
    ],
)
def test_known_caps(weights: dict[str, float], cap: float, expected: dict[str, float]) -> None:
    assert capped(weights, cap) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("weights", "cap"),
    [
        ({"a": 1.0, "b": 1.0}, 0.4),
        ({"a": 0.0}, 1.0),
        ({}, 1.0),
        ({"a": 1.0, "b": 0.0}, 0.5),
        ({"a": -1.0, "b": 2.0}, 1.0),
        ({"a": math.nan}, 1.0),
        ({"a": math.inf}, 1.0),
        ({"a": 1.0}, 0.0),
        ({"a": 1.0}, 1.5),
    ],
)
def test_infeasible_caps_raise(weights: dict[str, float], cap: float) -> None:
    with pytest.raises(ConfigError):
        capped(weights, cap)


def test_the_mean_is_the_weighted_mean() -> None:
    deltas = honest(3)
    found = woven(Mean(), deltas, **{"owner-0": 2.0})
    expected = (2 * deltas["owner-0"]["w"] + deltas["owner-1"]["w"] + deltas["owner-2"]["w"]) / 4
    assert torch.allclose(found.tensors["w"], expected)
    assert found.weights == pytest.approx({"owner-0": 0.5, "owner-1": 0.25, "owner-2": 0.25})


@pytest.mark.parametrize("by", ALL, ids=lambda by: by.name)
def test_the_bits_do_not_depend_on_the_order_of_the_owners(by: Aggregator) -> None:
    deltas = honest(7, noise=1.0)
    one, other = woven(by, deltas), woven(by, dict(reversed(deltas.items())))
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in SHAPES)
    assert all(
        one.tensors[name].shape == shape and one.tensors[name].dtype == torch.float32 for name, shape in SHAPES.items()
    )


@pytest.mark.parametrize("by", ALL, ids=lambda by: by.name)
@pytest.mark.parametrize("bad", [torch.full((4, 3), torch.nan), torch.full((4, 3), torch.inf), torch.zeros(3, 4)])
def test_a_bad_tensor_is_refused_with_its_owner(by: Aggregator, bad: Tensor) -> None:
    deltas = honest(5)
    deltas["owner-3"]["w"] = bad
    with pytest.raises(DataError, match=r"'w'.*'owner-3'"):
        woven(by, deltas)


@pytest.mark.parametrize("by", ALL, ids=lambda by: by.name)
def test_an_owner_of_weight_0_is_not_read(by: Aggregator) -> None:
    deltas = honest(6)
    deltas["owner-2"] = {}
    assert away(woven(by, deltas, **{"owner-2": 0.0})) < 0.5


@pytest.mark.parametrize("attack", [-1.0, -20.0, 1e6, -1e28])
@pytest.mark.parametrize("by", [CoordinateMedian(), TrimmedMean(trim=0.2), Krum(bad=1)], ids=lambda by: by.name)
def test_one_bad_owner_of_five_cannot_carry_the_others_away(by: Aggregator, attack: float) -> None:
    deltas = honest(5)
    deltas["owner-1"] = {name: attack * tensor for name, tensor in deltas["owner-1"].items()}
    assert away(woven(by, deltas)) < 0.3 < away(woven(Mean(), deltas))


@given(st.floats(-1e30, 1e30), st.integers(3, 8))
def test_the_median_stays_within_the_values_of_the_others(value: float, owners: int) -> None:
    deltas = honest(owners)
    rest = torch.stack([deltas[f"owner-{i}"]["w"] for i in range(1, owners)])
    deltas["owner-0"] = {name: torch.full(shape, value) for name, shape in SHAPES.items()}
    found = woven(CoordinateMedian(), deltas).tensors["w"]
    assert (found >= rest.amin(0)).all()
    assert (found <= rest.amax(0)).all()


def test_the_median_is_weighted_and_takes_the_middle_of_two() -> None:
    deltas = {o: {n: torch.full(s, v) for n, s in SHAPES.items()} for o, v in (("a", 1.0), ("b", 2.0), ("c", 9.0))}
    assert woven(CoordinateMedian(), deltas).tensors["b"].item() == 2
    assert woven(CoordinateMedian(), deltas, c=3.0).tensors["b"].item() == 9
    assert woven(CoordinateMedian(), deltas, c=2.0).tensors["b"].item() == 5.5


def test_clipping_bounds_a_large_delta_and_leaves_the_others() -> None:
    deltas = honest(5)
    deltas["owner-4"] = {name: 1e4 * tensor for name, tensor in deltas["owner-4"].items()}
    found = woven(ClippedMean(multiple=1.5), deltas)
    assert away(found) < 0.4
    factors = {owner: note["factor"] for owner, note in found.notes.items()}
    assert factors.pop("owner-4") < 1e-3
    assert set(factors.values()) == {1.0}
    norm = math.sqrt(
        sum(t.double().square().sum().item() for t in woven(ClippedMean(limit=0.5), deltas).tensors.values())
    )
    assert 0.45 < norm <= 0.5 + 1e-6


def test_clipping_takes_zero_deltas() -> None:
    deltas = {owner: {name: torch.zeros(shape) for name, shape in SHAPES.items()} for owner in "abc"}
    assert woven(ClippedMean(), deltas).tensors["w"].abs().max() == 0


def test_krum_drops_the_bad_and_holds_the_cap_over_those_it_keeps() -> None:
    deltas = honest(5)
    deltas["owner-0"] = {name: -tensor for name, tensor in deltas["owner-0"].items()}
    found = woven(Krum(bad=1), deltas, 0.3, **{"owner-2": 100.0})
    assert [owner for owner, note in found.notes.items() if note["dropped"]] == ["owner-0"]
    assert found.weights["owner-0"] == 0
    assert max(found.weights.values()) <= 0.3
    assert math.fsum(found.weights.values()) == pytest.approx(1)
    one = woven(Krum(bad=1, kept=1), deltas)
    assert any(torch.equal(one.tensors["w"], deltas[f"owner-{i}"]["w"]) for i in range(1, 5))
    with pytest.raises(ConfigError, match="at least 5 owners"):
        woven(Krum(bad=1), honest(4))


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 0.4, "b": 0.4}, {"a": 1.5, "b": -0.5}])
def test_weights_that_are_not_the_owners_or_not_a_share_raise(weights: dict[str, float]) -> None:
    delta = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    with pytest.raises(ConfigError, match="capped"):
        Deltas(sources={"a": delta.__getitem__, "b": delta.__getitem__}, weights=weights, shapes=SHAPES)


def test_means_read_tensor_by_tensor_and_owner_by_owner() -> None:
    deltas, seen = honest(3), []

    def source(owner: str, name: str) -> Tensor:
        seen.append((name, owner))
        return deltas[owner][name]

    sources = {owner: lambda name, owner=owner: source(owner, name) for owner in deltas}
    Mean().aggregate(Deltas(sources=sources, weights=capped(dict.fromkeys(deltas, 1.0), 1.0), shapes=SHAPES))
    assert seen == [(name, owner) for name in sorted(SHAPES) for owner in sorted(deltas)]


def test_the_sum_of_squares_does_not_depend_on_threads() -> None:
    draw = torch.Generator().manual_seed(0)
    big = {"w": torch.randn(300_001, generator=draw)}
    shapes = {"w": torch.Size((300_001,))}
    before = torch.get_num_threads()
    norms = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            one = Deltas(sources={"a": big.__getitem__}, weights={"a": 1.0}, shapes=shapes)
            found = ClippedMean().aggregate(one)
            norms.append(found.notes["a"]["norm"])
    finally:
        torch.set_num_threads(before)
    assert norms[0] == norms[1] == pytest.approx(big["w"].double().norm().item(), rel=1e-12)
