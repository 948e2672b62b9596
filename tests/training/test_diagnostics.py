import math

import pytest
import torch
from blob_world import blob_cache

from worldloom.models import JEPAConfig
from worldloom.models.encoders import PatchConv
from worldloom.training import RunFolder, TrainingConfig, alarms, effective_rank, fit

HEALTHY = {
    "effective_rank": 12.0,
    "latent_dimensions": 64.0,
    "dead_dimensions": 0.0,
    "latent_std_min": 0.8,
    "moving_share": 0.3,
    "inverse_dynamics": 0.1,
    "open_loop": 0.2,
}


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_effective_rank_counts_equal_directions(rank) -> None:
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0][:rank]
    corners = torch.eye(rank).repeat(2, 1) * torch.tensor([1.0, -1.0]).repeat_interleave(rank)[:, None]
    assert effective_rank(corners @ basis + 7) == pytest.approx(rank, rel=1e-3)


def test_the_effective_rank_of_what_is_not_finite_is_not_a_number() -> None:
    latents = torch.randn(10, 3)
    latents[4, 1] = torch.inf
    assert math.isnan(effective_rank(latents))


def test_effective_rank_of_unequal_directions_is_the_exponential_of_their_entropy() -> None:
    latents = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(latents) == pytest.approx(expected, rel=1e-5)


def test_a_healthy_model_raises_no_alarm() -> None:
    assert alarms(HEALTHY) == []


@pytest.mark.parametrize(
    ("figures", "name", "remedy"),
    [
        ({"effective_rank": 1.2}, "collapse", "sigreg"),
        ({"dead_dimensions": 0.7}, "collapse", "variance"),
        ({"inverse_dynamics": 0.97}, "slow-features", "inverse-dynamics"),
        # As measured on Two Rooms with the recipe's failing setting: rank and probe look fair.
        (
            {"inverse_dynamics": 0.67, "probe/position/r2": 0.85, "probe/position/moving": 0.1},
            "slow-features",
            "inverse",
        ),
        ({"probe/position/r2": 0.1, "probe/position/moving": 0.5}, "slow-features", "centred"),
        ({"open_loop": 1.3}, "prediction", "context"),
    ],
)
def test_an_alarm_says_what_to_change(figures, name, remedy) -> None:
    (alarm,) = alarms({**HEALTHY, **figures})
    assert alarm.name == name
    assert remedy in alarm.remedy


def test_a_label_that_stands_still_raises_no_alarm() -> None:
    assert alarms({**HEALTHY, "probe/colour/r2": 0.0, "probe/colour/moving": 0.0}) == []


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    cache = blob_cache(episodes=120)
    model = JEPAConfig(encoder=PatchConv(patch=8, channels=(32, 32), hidden=128), latent_dim=32, block=2)

    def run(*overrides: str, steps: int = 350) -> dict:
        config = TrainingConfig(
            steps=steps, batch=32, horizon=6, checkpoint_every=1000, validation_share=0.2, threads=1
        )
        folder = RunFolder.create(tmp_path_factory.mktemp("trap") / "run", {}, {})
        fit(config.override(overrides), model, cache, folder)
        return folder.diagnostics()

    return run


@pytest.fixture(scope="module")
def good(train) -> dict:
    return train()


@pytest.fixture(scope="module")
def trapped(train) -> dict:
    return train("losses.inverse-dynamics.weight=0")


def assert_keeps_the_moving_body(diagnostics: dict) -> None:
    assert diagnostics["alarms"] == []
    assert diagnostics["figures"]["inverse_dynamics"] < 0.3
    assert diagnostics["figures"]["probe/position/r2"] > 0.6


def test_a_good_setting_keeps_the_moving_body_and_raises_no_alarm(good) -> None:
    assert_keeps_the_moving_body(good)


def test_centred_sigreg_keeps_it_without_inverse_dynamics(train) -> None:
    sigreg = '{"name": "sigreg", "weight": 0.1, "samples": "centred", "stride": 3}'
    off = [f"losses.{name}.weight=0" for name in ("inverse-dynamics", "variance", "covariance")]
    assert_keeps_the_moving_body(train(*off, f"losses.sigreg={sigreg}", steps=150))


def test_the_slow_feature_trap_is_caught_though_rank_and_loss_look_healthy(good, trapped) -> None:
    figures = trapped["figures"]
    assert figures["effective_rank"] > 0.5 * good["figures"]["effective_rank"]
    assert figures["dead_dimensions"] == 0
    assert figures["probe/position/r2"] < 0.2
    assert figures["inverse_dynamics"] > 0.8
    (alarm,) = [alarm for alarm in trapped["alarms"] if alarm["name"] == "slow-features"]
    assert "'position'" in alarm["message"]
    assert "inverse-dynamics" in alarm["remedy"]


def test_the_trap_is_caught_without_labels(trapped) -> None:
    figures = {name: value for name, value in trapped["figures"].items() if "/" not in name}
    assert "slow-features" in {alarm.name for alarm in alarms(figures)}
