"""Two ranks with half of the batch each against one rank with all of it, through the real model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

from worldloom.core.types import ActionSpec, Observations, ObservationSpec, Windows
from worldloom.data import Statistics
from worldloom.models import JEPAConfig, TargetConfig, TargetEncoder, build_jepa
from worldloom.models.distributed import gather, mean_over_ranks
from worldloom.models.encoders import PatchConv
from worldloom.models.losses import LOSSES, Covariance, LossInputs, SIGReg, Variance

WORLD = 2
CONFIGS = {
    **{name: LOSSES[name]() for name in LOSSES},
    **{f"{config.name}-centred": config for config in (Variance(samples="centred"), Covariance(samples="centred"))},
    "sigreg-pooled": SIGReg(samples="pooled"),
}


def make_windows() -> Windows:
    generator = torch.Generator().manual_seed(0)
    # The halves differ, so that a statistic of one half is not the whole's.
    brightness = torch.linspace(20, 255, 12)[:, None, None, None, None]
    pixels = (torch.rand(12, 5, 16, 16, 3, generator=generator) * brightness).to(torch.uint8)
    actions = torch.randn(12, 4, 4, generator=generator).clamp(-1, 1)
    return Windows(observations=Observations(pixels=pixels), actions=actions)


def compute(windows: Windows) -> dict[str, Tensor]:
    """Return every loss and all parameters' gradients of it, averaged over the ranks as data parallelism does."""
    statistics = Statistics(
        pixel_mean=torch.full((16, 16, 3), 60.0),
        pixel_std=torch.full((16, 16, 3), 50.0),
        vector_mean=None,
        vector_std=None,
        action_mean=torch.zeros(2),
        action_std=torch.ones(2),
    )
    config = JEPAConfig(encoder=PatchConv(patch=4, channels=(8,), hidden=16), latent_dim=6, block=2, context=2)
    spec = {"observation": ObservationSpec(pixels=(16, 16, 3)), "action": ActionSpec(low=(-1.0,) * 2, high=(1.0,) * 2)}
    results: dict[str, Tensor] = {}
    for name, loss_config in {**CONFIGS, "ema-target": LOSSES["prediction"]()}.items():
        model = build_jepa(config, **spec, statistics=statistics, seed=0).train()
        model.encoder.double()  # its gradients are sums of many terms that cancel
        torch.manual_seed(0)
        loss_module = loss_config.build(latent_dim=6, block_size=4)
        outputs = model(windows)
        targets = outputs.latents[:, 2:]
        if name == "ema-target":
            targets = TargetEncoder(model, TargetConfig())(windows.observations[:, 2:])
        loss = loss_module(
            LossInputs(
                latents=outputs.latents,
                predictions=outputs.predictions,
                targets=targets,
                actions=outputs.actions,
                step=3,
            )
        )
        loss.backward()
        results[f"{name}/loss"] = loss.detach()
        for key, parameter in nn.ModuleList([model, loss_module]).named_parameters():
            if parameter.grad is not None:
                results[f"{name}/gradient/{key}"] = mean_over_ranks(parameter.grad)
        results[f"{name}/running_mean"] = model.norm.running_mean.clone()
        results[f"{name}/running_variance"] = model.norm.running_variance.clone()
    return results


def run_rank(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=WORLD)
    windows = make_windows()
    half = slice(rank * 6, (rank + 1) * 6)
    part = Windows(observations=windows.observations[half], actions=windows.actions[half])
    results = compute(part)
    results["gathered"] = gather(part.actions)
    results["mean"] = mean_over_ranks(part.actions)
    save_file({key: value.contiguous() for key, value in results.items()}, f"{directory}/rank{rank}.safetensors")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    directory = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, args=(str(directory),), nprocs=WORLD)
    return [load_file(Path(directory) / f"rank{rank}.safetensors") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    return compute(make_windows())


@pytest.mark.parametrize("name", [*CONFIGS, "ema-target"])
def test_two_ranks_give_the_loss_and_gradient_of_the_whole_batch(ranks, whole, name) -> None:
    keys = [key for key in whole if key.startswith(f"{name}/")]
    assert sum("/gradient/model" in key or "/gradient/0." in key for key in keys) >= 5
    # Batch norm makes some gradients zero but for rounding: rounding is judged by the largest gradient.
    largest = max(whole[key].abs().max().item() for key in keys if "/gradient/" in key)
    for rank in ranks:
        assert {key for key in rank if key.startswith(f"{name}/")} == set(keys)
        for key in keys:
            torch.testing.assert_close(rank[key], whole[key], rtol=1e-4, atol=1e-5 * largest)


def test_the_halves_alone_would_be_wrong(whole) -> None:
    windows = make_windows()
    half = compute(Windows(observations=windows.observations[:6], actions=windows.actions[:6]))
    for name in CONFIGS:
        assert not torch.allclose(half[f"{name}/loss"], whole[f"{name}/loss"], rtol=1e-3), name


def test_gathering_keeps_the_order_of_ranks(ranks) -> None:
    actions = make_windows().actions
    for rank in ranks:
        assert torch.equal(rank["gathered"], actions)
        torch.testing.assert_close(rank["mean"], (actions[:6] + actions[6:]) / 2)
