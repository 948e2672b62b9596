import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from worldloom.models.losses import (
    LOSSES,
    Covariance,
    InverseDynamics,
    LossInputs,
    Prediction,
    SIGReg,
    Straightening,
    TemporalSimilarity,
    Variance,
    draw_samples,
)


def inputs(latents: Tensor, *, actions: Tensor | None = None, step: int = 0, horizon: int = 2) -> LossInputs:
    batch, frames, _ = latents.shape
    return LossInputs(
        latents=latents,
        predictions=latents[:, -horizon:] * 0.5,
        targets=latents[:, -horizon:],
        actions=torch.zeros(batch, frames - 1, 3) if actions is None else actions,
        step=step,
    )


def build(config):
    return config.build(latent_dim=4, block_size=3)


def normal(*axes: int, seed: int = 0) -> Tensor:
    return torch.randn(*axes, generator=torch.Generator().manual_seed(seed))


def test_prediction_is_the_mean_squared_error_and_can_stop_the_gradient() -> None:
    latents = normal(5, 3, 4).requires_grad_()
    loss = build(Prediction())(inputs(latents))
    torch.testing.assert_close(loss, (latents[:, -2:] * 0.5).square().mean())
    (both,) = torch.autograd.grad(loss, latents)
    (one_sided,) = torch.autograd.grad(build(Prediction(stop_gradient=True))(inputs(latents)), latents)
    # d/dz mean (z/2 - z)^2 = z / 2 over the count; with the target held, d/dz = (z/2 - z) / 2 ... = -z / 2.
    torch.testing.assert_close(both[:, -2:], latents[:, -2:].detach() / 2 / 40)
    torch.testing.assert_close(one_sided[:, -2:], -latents[:, -2:].detach() / 2 / 40)


@pytest.mark.parametrize("target", [1.0, 2.0])
def test_variance_is_the_hinge_on_each_std(target) -> None:
    latents = normal(50, 3, 4) * torch.tensor([0.1, 0.5, 1.0, 3.0])
    expected = [
        max(0.0, target - math.sqrt(latents[:, frame, dimension].var().item() + 1e-4))
        for frame in range(3)
        for dimension in range(4)
    ]
    loss = build(Variance(target=target))(inputs(latents))
    assert loss.item() == pytest.approx(sum(expected) / 12, rel=1e-4)


def test_covariance_is_the_sum_of_squares_off_the_diagonal() -> None:
    latents = normal(50, 3, 4) @ normal(4, 4, seed=1)
    total = 0.0
    for frame in range(3):
        matrix = torch.cov(latents[:, frame].T)
        total += sum(matrix[i, j].item() ** 2 for i in range(4) for j in range(4) if i != j) / 4
    assert build(Covariance())(inputs(latents)).item() == pytest.approx(total / 3, rel=1e-4)


@pytest.mark.parametrize("config", [Variance(samples="pooled"), Covariance(samples="pooled")])
def test_pooled_statistics_take_every_frame_as_a_sample(config) -> None:
    latents = 0.3 * normal(50, 3, 4) @ normal(4, 4, seed=1)
    alone = config.model_copy(update={"samples": "frame"})
    torch.testing.assert_close(
        build(config)(inputs(latents)), build(alone)(inputs(latents.reshape(150, 1, 4), horizon=1))
    )


@pytest.mark.parametrize("config", [Variance(samples="centred"), SIGReg(samples="centred")])
def test_what_is_static_in_a_window_cannot_satisfy_a_centred_statistic(config) -> None:
    static = normal(400, 1, 4).expand(-1, 5, -1)
    moving = normal(400, 5, 4, seed=1) * math.sqrt(5 / 4)  # the window's mean takes a fifth of the variance
    by_window = config.model_copy(update={"samples": "frame"})
    assert build(config)(inputs(moving)) < 0.2 * build(config)(inputs(static))
    assert build(by_window)(inputs(static)) < 0.2 * build(config)(inputs(static))
    assert draw_samples(static, "centred").abs().max() < 1e-6


def epps_pulley(values: Tensor) -> Tensor:
    """The statistic with its integral over the whole line, in closed form (Epps and Pulley 1983)."""
    count = len(values)
    return math.sqrt(2 * math.pi) * (
        torch.exp(-(values[:, None] - values).square() / 2).sum() / count
        - math.sqrt(2) * torch.exp(-values.square() / 4).sum()
        + count / math.sqrt(3)
    )


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_sigreg_is_the_epps_pulley_statistic_of_its_projections(shift) -> None:
    latents = normal(30, 2, 1) * 1.5 + shift  # in one dimension every projection is the sample or its mirror image
    fine = SIGReg(knots=400, limit=8.0).build(latent_dim=1, block_size=3)(inputs(latents))
    expected = torch.stack([epps_pulley(latents[:, frame, 0].double()) for frame in range(2)]).mean()
    assert fine.item() == pytest.approx(expected.item(), rel=1e-4)
    coarse = SIGReg().build(latent_dim=1, block_size=3)(inputs(latents))
    assert coarse.item() == pytest.approx(expected.item(), rel=0.02)


def test_sigreg_tells_a_normal_from_what_is_not_and_projects_by_step() -> None:
    loss = build(SIGReg())
    gaussian, line = normal(500, 2, 4), normal(500, 2, 1).expand(-1, -1, 4)
    two_points = normal(500, 2, 4).sign()
    assert loss(inputs(line)) > 10 * loss(inputs(gaussian))
    assert loss(inputs(two_points)) > 4 * loss(inputs(gaussian))
    assert loss(inputs(line, step=1)) == loss(inputs(line, step=1))
    assert loss(inputs(line, step=1)) != loss(inputs(line, step=2))
    strided = build(SIGReg(stride=2))(inputs(line))
    torch.testing.assert_close(strided, loss(inputs(line[:, :1], horizon=1)))


def test_minimising_sigreg_over_a_linear_map_whitens() -> None:
    samples = normal(256, 1, 4)
    weight = (0.3 * torch.eye(4) + 0.5).requires_grad_()  # nearly of rank one
    bias = torch.ones(4, requires_grad=True)
    loss = build(SIGReg(projections=64))
    optimizer = torch.optim.Adam([weight, bias], lr=0.05)
    for step in range(150):
        optimizer.zero_grad()
        loss(inputs(samples @ weight + bias, step=step, horizon=1)).backward()
        optimizer.step()
    final = (samples @ weight + bias).detach()[:, 0]
    torch.testing.assert_close(final.mean(0), torch.zeros(4), atol=0.1, rtol=0)
    torch.testing.assert_close(torch.cov(final.T), torch.eye(4), atol=0.2, rtol=0)


def test_temporal_similarity_is_the_squared_step() -> None:
    latents = torch.arange(5.0)[None, :, None].expand(2, -1, 4) * torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert build(TemporalSimilarity())(inputs(latents)).item() == pytest.approx((0 + 1 + 4 + 9) / 4)


@pytest.mark.parametrize(("angle", "expected"), [(0.0, 0.0), (math.pi / 2, 1.0), (math.pi, 2.0), (math.pi / 3, 0.5)])
def test_straightening_is_one_less_the_cosine_of_each_turn(angle, expected) -> None:
    headings = angle * torch.arange(6)
    velocity = torch.stack([headings.cos(), headings.sin()], dim=-1) * torch.rand(6, 1).add(0.5)
    path = torch.cat([torch.zeros(1, 2), velocity.cumsum(0)])[None]
    latents = torch.cat([path, torch.zeros(1, 7, 2)], dim=-1)
    assert build(Straightening())(inputs(latents)).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("frames", [2, 3])
def test_inverse_dynamics_reads_the_block_that_led_to_the_last_frame(frames) -> None:
    latents, actions = normal(6, 5, 4), normal(6, 4, 3, seed=1)
    loss = build(InverseDynamics(frames=frames, hidden=(8,)))
    errors = []
    for last in range(frames - 1, 5):
        # Written as the module unfolds it: dimension by dimension, the frames of each in order.
        window = latents[:, last - frames + 1 : last + 1].transpose(1, 2).flatten(1)
        errors.append(functional.mse_loss(loss.mlp(window), actions[:, last - 1]))
    torch.testing.assert_close(loss(inputs(latents, actions=actions)), torch.stack(errors).mean())


def test_inverse_dynamics_learns_an_action_that_shows_and_no_other() -> None:
    actions = normal(64, 4, 3)
    shown = torch.cat([torch.zeros(64, 1, 3), actions.cumsum(1)], dim=1)
    latents = torch.cat([shown, torch.ones(64, 5, 1)], dim=-1)
    for visible, bound in ((True, (0.0, 0.1)), (False, (0.7, 1.1))):
        loss = InverseDynamics(hidden=(64,)).build(latent_dim=4, block_size=3)
        data = inputs(latents if visible else latents[:, :1].expand(-1, 5, -1), actions=actions)
        optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            value = loss(data)
            value.backward()
            optimizer.step()
        assert bound[0] <= value.item() <= bound[1]


def test_every_registered_loss_is_finite_and_has_a_gradient() -> None:
    for name in LOSSES:
        latents = normal(8, 5, 4).mul(0.5).requires_grad_()
        loss = build(LOSSES[name]())(inputs(latents))
        (gradient,) = torch.autograd.grad(loss, latents)
        assert loss.isfinite(), name
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name
