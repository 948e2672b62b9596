import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from worldloom.core.errors import CheckpointError, DataError, TrainingError
from worldloom.core.progress import SILENT
from worldloom.core.types import ModelSpec
from worldloom.heads import FitConfig, Head, InverseModel, InverseModelConfig, LatentGeometry, Reversibility
from worldloom.models import MLP, Activation, Norm, load_tensors, save_tensors
from worldloom.testing import LinearWorld

WORLD = LinearWorld()


class ProductConfig(FitConfig):
    norm: Norm = "none"
    activation: Activation = "relu"
    learning_rate: float = 1e-2


class Product(Head[ProductConfig]):
    kind = "test-product"
    config_type = ProductConfig

    def __init__(self, spec: ModelSpec, config: ProductConfig) -> None:
        super().__init__()
        self.config = config
        self.network = MLP((spec.latent_dim, 32, 1), config.norm, config.activation)

    def forward(self, latents: Tensor) -> Tensor:
        product: Tensor = self.network(latents)
        return product


@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_a_head_learns_a_function_that_is_not_linear(norm: Norm, activation: Activation) -> None:
    values = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    head = Product(WORLD.spec, ProductConfig(norm=norm, activation=activation, steps=300))
    loss = head.fit(lambda step: (head(values) - values.prod(1, keepdim=True)).square().mean(), SILENT)
    assert loss < 0.1
    assert not head.training


def test_a_head_whose_loss_is_not_finite_is_stopped() -> None:
    head = Product(WORLD.spec, ProductConfig(steps=10))
    with pytest.raises(TrainingError, match="test product: the loss is nan at step 3; lower the learning rate"):
        head.fit(lambda step: head(torch.ones(1, 2)).sum() * (float("nan") if step == 3 else 1), SILENT)


def test_a_file_holds_what_the_head_states_and_the_models_fingerprint(tmp_path: Path) -> None:
    head = Product(WORLD.spec, ProductConfig(activation="gelu"))
    head.save(tmp_path / "product", WORLD)
    body = json.loads((tmp_path / "product.json").read_text())
    assert body["kind"] == "test-product"
    assert body["metadata"] == {
        "version": 1,
        "model": WORLD.spec.fingerprint,
        "config": {"steps": 1000, "batch": 512, "learning_rate": 0.01, "norm": "none", "activation": "gelu"},
        "figures": {},
    }
    back = Product.load(tmp_path / "product", WORLD)
    assert back.config == head.config
    assert not back.training
    for name, tensor in head.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has version 2; this version of worldloom reads test-product heads of version 1"),
        ({"model": "another"}, "was fitted on model 'another', .*; fit the head again, or load the model"),
        ({"config": {"norm": "none", "width": 3}}, "does not match its configuration: unknown key 'width'"),
        ({"config": {"norm": "layer"}}, "do not match the model in its configuration"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    Product(WORLD.spec, ProductConfig()).save(tmp_path / "product", WORLD)
    tensors, metadata = load_tensors(tmp_path / "product", kind="test-product")
    save_tensors(tmp_path / "product", tensors, {**metadata, **change}, kind="test-product")
    with pytest.raises(CheckpointError, match=message):
        Product.load(tmp_path / "product", WORLD)


@pytest.mark.parametrize("step_length", [0.0, -1.0, float("nan"), float("inf")])
def test_a_geometry_whose_unit_of_limits_is_no_length_is_refused(step_length: float) -> None:
    geometry = LatentGeometry(
        step_length=step_length,
        inverse=InverseModel(WORLD.spec, InverseModelConfig(hidden=(4,))),
        reversibility=Reversibility(gap=0.1, displacement=1.0),
    )
    with pytest.raises(DataError, match="step length"):
        geometry.check()
