import numpy as np
import pytest
import torch

from worldloom.core.config import parse_component
from worldloom.core.errors import DataError
from worldloom.federation import OUTER, Base, Outer
from worldloom.federation.rounds.outer import DiLoCo, FedAvg

BASE = Base.of({"a": torch.tensor([1.0, -2.0]), "b": torch.tensor(3.0)})
DELTA = {"a": torch.tensor([0.5, 0.25]), "b": torch.tensor(-1.0)}


def test_fedavg_is_base_and_delta() -> None:
    moved, momentum = FedAvg().step(BASE, DELTA, {})
    assert torch.equal(moved.tensors["a"], torch.tensor([1.5, -1.75]))
    assert moved.tensors["b"].item() == 2
    assert momentum == {}


def test_diloco_without_momentum_at_rate_1_is_fedavg() -> None:
    moved, _ = DiLoCo(learning_rate=1.0, momentum=0.0).step(BASE, DELTA, {})
    assert all(
        torch.equal(moved.tensors[name], FedAvg().step(BASE, DELTA, {})[0].tensors[name]) for name in BASE.tensors
    )


def test_diloco_follows_the_closed_form_of_nesterov_on_a_quadratic() -> None:
    """With gradient c x, (x, m) is multiplied by one matrix at each step."""
    rate, mu, c, steps = 0.7, 0.9, 0.3, 40
    matrix = np.array([[1 - rate * (1 + mu) * c, -rate * mu**2], [c, mu]])
    expected = np.linalg.matrix_power(matrix, steps) @ [5.0, 0.0]
    x, momentum = Base.of({"x": torch.tensor(5.0, dtype=torch.float64)}), {}
    for _ in range(steps):
        x, momentum = DiLoCo().step(x, {"x": -c * x.tensors["x"]}, momentum)
    assert x.tensors["x"].item() == pytest.approx(expected[0], abs=1e-5)
    assert abs(x.tensors["x"].item()) < 0.5


def test_diloco_agrees_with_sgd_of_torch() -> None:
    parameter = torch.nn.Parameter(BASE.tensors["a"].clone())
    sgd = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    base, momentum = Base.of({"a": BASE.tensors["a"]}), {}
    draw = torch.Generator().manual_seed(0)
    for _ in range(10):
        delta = torch.randn(2, generator=draw)
        parameter.grad = -delta
        sgd.step()
        base, momentum = DiLoCo().step(base, {"a": delta}, momentum)
    assert torch.allclose(base.tensors["a"], parameter.detach(), atol=1e-5)


@pytest.mark.parametrize("outer", [FedAvg(), DiLoCo()], ids=lambda outer: outer.name)
def test_a_step_is_pure_and_keeps_dtypes(outer: Outer) -> None:
    base = Base.of({"a": torch.tensor([1.0, -2.0], dtype=torch.bfloat16), "b": torch.tensor(3.0)})
    kept = {name: tensor.clone() for name, tensor in base.tensors.items()}
    one, other = outer.step(base, DELTA, {}), outer.step(base, DELTA, {})
    assert all(torch.equal(base.tensors[name], kept[name]) for name in kept)
    assert one[0].fingerprint == other[0].fingerprint
    assert all(one[0].tensors[name].dtype == tensor.dtype for name, tensor in kept.items())


@pytest.mark.parametrize("outer", [FedAvg(), DiLoCo()], ids=lambda outer: outer.name)
def test_other_names_and_steps_that_are_not_finite_are_refused(outer: Outer) -> None:
    with pytest.raises(DataError, match="lacks"):
        outer.step(BASE, {"a": DELTA["a"]}, {})
    with pytest.raises(DataError, match="'b'"):
        outer.step(BASE, {**DELTA, "b": torch.tensor(torch.nan)}, {})


def test_a_momentum_of_another_model_is_refused() -> None:
    with pytest.raises(DataError, match="momentum"):
        DiLoCo().step(BASE, DELTA, {"c": torch.zeros(1)})


@pytest.mark.parametrize("outer", [FedAvg(), DiLoCo(learning_rate=0.5)], ids=lambda outer: outer.name)
def test_it_is_read_back_from_its_name(outer: Outer) -> None:
    assert parse_component(OUTER, outer.model_dump(mode="json")) == outer
