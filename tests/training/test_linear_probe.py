import pytest
import torch

from worldloom.training import LinearProbe


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
