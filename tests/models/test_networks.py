import pytest
import torch

from worldloom.core.errors import TrainingError
from worldloom.models import MLP, LinearProbe, TargetConfig, TargetEncoder, fit_head


def normal(*axes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*axes, generator=torch.Generator().manual_seed(seed))


def test_a_probe_finds_a_linear_map_and_says_what_it_does_not_explain() -> None:
    latents, weight = normal(20, 50, 6) * 3 + 1, normal(6, 2, seed=1)
    labels = latents @ weight + 5
    probe = LinearProbe.fit(latents, labels, ridge=1e-8)
    torch.testing.assert_close(probe.weight, weight, atol=1e-4, rtol=1e-4)
    assert probe.score(latents, labels).r2 > 0.9999
    noise = 2 * normal(20, 50, 2, seed=2)
    score = probe.score(latents, labels + noise)
    assert score.error == pytest.approx(noise.norm(dim=-1).mean().item(), rel=1e-3)
    assert 1 - score.r2 == pytest.approx((noise.var() / (labels + noise).var(dim=(0, 1)).mean()).item(), rel=0.05)


def test_a_probe_of_unrelated_labels_explains_nothing_unseen() -> None:
    probe = LinearProbe.fit(normal(500, 6), normal(500, 1, seed=1))
    assert probe.score(normal(500, 6, seed=2), normal(500, 1, seed=3)).r2 < 0.02


def test_a_probe_survives_latents_that_do_not_vary() -> None:
    probe = LinearProbe.fit(torch.ones(10, 3), torch.arange(10.0)[:, None])
    torch.testing.assert_close(probe(torch.ones(1, 3)), torch.tensor([[4.5]]))


@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_a_head_learns_a_function_that_is_not_linear(norm, activation) -> None:
    values = normal(256, 2)
    torch.manual_seed(0)
    head = MLP((2, 32, 1), norm=norm, activation=activation)
    loss = fit_head(head, lambda step: (head(values) - values.prod(1, keepdim=True)).square().mean(), 300, 1e-2)
    assert loss < 0.1
    assert not head.training


def test_a_head_whose_loss_is_not_finite_is_stopped() -> None:
    head = MLP((1, 1))
    with pytest.raises(TrainingError, match="distance: the loss is nan at step 3; lower the learning rate"):
        fit_head(
            head,
            lambda step: head(torch.ones(1)).sum() * (float("nan") if step == 3 else 1),
            10,
            description="distance",
        )


def test_a_target_follows_and_carries_no_gradient(vector_case) -> None:
    from worldloom.models import JEPAConfig, build_jepa
    from worldloom.models.encoders import VectorMLP

    case = vector_case
    config = JEPAConfig(encoder=VectorMLP(hidden=(8,)), latent_dim=4)
    model = build_jepa(config, case.observation, case.action, case.statistics, seed=0).train()
    target = TargetEncoder(model, TargetConfig(decay=0.9)).train()
    observations = case.observations(6, 3)
    torch.testing.assert_close(target(observations), model.encode(observations))
    before = [parameter.clone() for parameter in target.parameters()]
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(1.0)
    target.follow(model)
    for old, new in zip(before, target.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.1)
    assert not target(observations).requires_grad
    assert model.encode(observations).requires_grad
