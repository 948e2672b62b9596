import pytest
import torch

from worldloom.core.errors import ConfigError
from worldloom.training import TrainingConfig, make_fabric


def test_the_default_mix_is_the_measured_one() -> None:
    weights = {name: (loss.name, loss.weight) for name, loss in TrainingConfig().losses.items()}
    assert weights == {
        "prediction": ("prediction", 1.0),
        "variance": ("variance", 4.0),
        "covariance": ("covariance", 0.03),
        "temporal-similarity": ("temporal-similarity", 1.0),
        "inverse-dynamics": ("inverse-dynamics", 3.0),
    }


def test_losses_are_overridden_by_name_and_survive_json() -> None:
    config = TrainingConfig().override(
        [
            "losses.variance.weight=0",
            'losses.sigreg={"name": "sigreg", "weight": 0.1, "samples": "centred"}',
            'target={"decay": 0.99}',
        ]
    )
    assert config.losses["variance"].weight == 0
    assert config.losses["sigreg"].samples == "centred"
    assert TrainingConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("losses.variance.wieght=1", "did you mean 'weight'"),
        ('losses.x={"name": "vicreg"}', "unknown loss 'vicreg'"),
        ('losses.x={"weight": 1}', "expected a loss with a 'name'"),
        ("learning_rate=0", "greater than 0"),
        ("stpes=3", "did you mean 'steps'"),
        ('losses={"prediction": {"name": "prediction", "weight": 0}}', "every loss has weight 0"),
        ('losses={"a.b": {"name": "prediction"}}', "must not be empty or contain a dot"),
    ],
)
def test_a_wrong_setting_is_named(assignment, message) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingConfig().override([assignment])


def test_the_constant_schedule_warms_up_holds_and_falls_to_nothing() -> None:
    config = TrainingConfig(steps=100, learning_rate=1.0, warmup_steps=9, constant_share=0.5)
    rates = [config.learning_rate_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert set(rates[10:50]) == {1.0}
    assert rates[75] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.01
    assert rates[50:] == sorted(rates[50:], reverse=True)


def test_the_one_cycle_schedule_peaks_after_a_tenth() -> None:
    config = TrainingConfig(steps=100, learning_rate=1.0, schedule="one-cycle")
    rates = [config.learning_rate_at(step) for step in range(100)]
    assert max(rates) == rates[10] == 1.0
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[0] <= 0.01
    assert 0 < rates[99] <= 0.01


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("accelerator=cuda", "accelerator is 'cuda', but PyTorch finds no such device"),
        ("strategy=fsdp", "which needs several devices"),
        ("precision=16-mixed", "use bf16-mixed or 32-true"),
        ("compile=true", r"needs a C\+\+ compiler, but none of .*g\+\+.* is on PATH"),
    ],
)
def test_what_the_machine_cannot_do_is_said_before_training(override, told, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=told):
        make_fabric(TrainingConfig().override([override]))
