from dataclasses import replace

import pytest
import torch

from worldloom.core.errors import ConfigError, DataError
from worldloom.core.types import Context
from worldloom.data import Statistics
from worldloom.heads import Heads
from worldloom.models import JEPA, JEPAConfig, build_jepa, load_model, save_model
from worldloom.models.encoders import Fusion, PatchConv, VectorMLP, ViT
from worldloom.models.predictors import MLPPredictor, TransformerPredictor
from worldloom.testing import check_world_model

SMALL_CONV = PatchConv(patch=4, channels=(8,), hidden=16)
PREDICTORS = [
    MLPPredictor(hidden=(16, 16)),
    MLPPredictor(hidden=(16,), norm="layer", activation="silu"),
    TransformerPredictor(depth=2, width=16, heads=2),
]


def build(case, **config) -> JEPA:
    values = {"encoder": SMALL_CONV, "predictor": PREDICTORS[0], "latent_dim": 6, "block": 2, **config}
    return build_jepa(JEPAConfig(**values), case.observation, case.action, case.statistics, seed=0)


@pytest.mark.parametrize("context", [1, 3])
@pytest.mark.parametrize("predictor", PREDICTORS, ids=lambda config: f"{config.name}-{getattr(config, 'norm', '')}")
def test_it_is_a_world_model_with_every_predictor(pixel_case, predictor, context) -> None:
    check_world_model(build(pixel_case, predictor=predictor, context=context).eval())


@pytest.mark.parametrize(
    "encoder", [Fusion(pixels=SMALL_CONV), ViT(patch=4, depth=1, width=16, heads=2), VectorMLP(hidden=(16,))]
)
def test_it_is_a_world_model_with_every_encoder(odd_case, encoder) -> None:
    check_world_model(build(odd_case, encoder=encoder, block=3).eval())


def test_without_an_encoder_the_one_that_suits_the_observation_is_taken(pixel_case, vector_case, odd_case) -> None:
    for case in (pixel_case, vector_case, odd_case):
        check_world_model(build(case, encoder=None).eval())


def test_it_knows_whether_the_training_pictures_had_colours(pixel_case, vector_case, tmp_path) -> None:
    coloured, statistics = build(pixel_case), pixel_case.statistics
    assert coloured.sees_colours
    assert not build(vector_case, encoder=None).sees_colours
    noise = torch.rand_like(statistics.pixel_mean)  # of a lossy video
    one = slice(None, 1)
    grey = replace(
        statistics,
        pixel_mean=statistics.pixel_mean[..., one] + noise,
        pixel_std=statistics.pixel_std[..., one] + 0 * noise,
    )
    model = build_jepa(coloured.config, pixel_case.observation, pixel_case.action, grey, seed=0)
    assert not model.sees_colours
    save_model(tmp_path, coloured)
    assert load_model(tmp_path).sees_colours


@pytest.mark.parametrize("predictor", PREDICTORS, ids=lambda config: f"{config.name}-{getattr(config, 'norm', '')}")
@pytest.mark.parametrize("context", [1, 3])
def test_a_rollout_feeds_each_prediction_back(pixel_case, predictor, context) -> None:
    model = build(pixel_case, predictor=predictor, context=context).eval()
    windows = pixel_case.windows(2, context + 4, 2)
    with torch.no_grad():
        latents = model.encode(windows.observations)[:, :context]
        whole = model.rollout(
            Context(latents=latents, actions=windows.actions[:, : context - 1]), windows.actions[:, None, context - 1 :]
        )
        for step in range(4):
            # One step at a time, from a context that slides over what was predicted.
            alone = model.rollout(
                Context(latents=latents[:, -context:], actions=windows.actions[:, step : step + context - 1]),
                windows.actions[:, None, step + context - 1 : step + context],
            )
            torch.testing.assert_close(alone[:, 0, 0], whole[:, 0, step])
            latents = torch.cat([latents, alone[:, 0]], dim=1)


def test_the_mlp_predictor_is_a_residual_perceptron_on_everything_it_is_given(pixel_case) -> None:
    predictor = build(pixel_case, context=2).predictor
    latents, past, actions = torch.randn(3, 2, 6), torch.randn(3, 1, 4), torch.randn(3, 5, 1, 4)
    for candidate in range(5):
        joined = torch.cat([latents.flatten(1), past[:, 0], actions[:, candidate, 0]], dim=1)
        expected = latents[:, -1] + predictor.mlp(joined)
        torch.testing.assert_close(predictor(latents, past, actions)[:, candidate, 0], expected)


@pytest.mark.parametrize("context", [1, 2])
def test_the_oldest_frame_and_block_of_the_context_matter(pixel_case, context) -> None:
    for predictor in PREDICTORS:
        model = build(pixel_case, predictor=predictor, context=context).eval()
        latents = torch.randn(1, context, 6)
        start = Context(latents=latents, actions=torch.zeros(1, context - 1, 4))
        actions = torch.zeros(1, 1, 1, 4)
        other = latents.clone()
        other[:, 0] += torch.randn(6)
        assert not torch.allclose(
            model.rollout(start, actions), model.rollout(Context(latents=other, actions=start.actions), actions)
        )
        if context > 1:
            later = Context(latents=latents, actions=start.actions + 1)
            assert not torch.allclose(model.rollout(start, actions), model.rollout(later, actions))


def test_training_predicts_what_a_rollout_does(pixel_case) -> None:
    model = build(pixel_case, context=2).eval()
    windows = pixel_case.windows(4, 5, 2)
    outputs = model(windows)
    torch.testing.assert_close(outputs.latents, model.encode(windows.observations))
    context = Context(latents=outputs.latents[:, :2], actions=windows.actions[:, :1])
    torch.testing.assert_close(outputs.predictions, model.rollout(context, windows.actions[:, None, 1:])[:, 0])


def test_training_latents_are_normalised_over_the_batch_and_evaluation_takes_running_statistics(pixel_case) -> None:
    model = build(pixel_case).train()
    windows = pixel_case.windows(16, 4, 2)
    for _ in range(100):  # the running statistics come within 0.9^100 of the batch's
        latents = model(windows).latents.flatten(0, 1)
    torch.testing.assert_close(latents.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std(0), torch.ones(6), atol=2e-2, rtol=0)
    torch.testing.assert_close(model.eval().encode(windows.observations).flatten(0, 1), latents, atol=5e-2, rtol=5e-2)


def test_actions_are_normalised_by_the_data(pixel_case) -> None:
    model = build(pixel_case)
    mean, std = pixel_case.statistics.action_mean, pixel_case.statistics.action_std
    block = torch.cat([mean + std, mean - 2 * std])
    torch.testing.assert_close(model.normalise_actions(block), torch.tensor([1.0, 1.0, -2.0, -2.0]))


def test_an_action_that_never_varies_is_not_blown_up(pixel_case) -> None:
    pixel_case.statistics.action_std.zero_()
    values = build(pixel_case).normalise_actions(torch.tensor([1.0, 4.0, 1.0, 4.0]))
    assert values.abs().max() <= 100


def test_a_plan_can_be_improved_by_gradient(pixel_case) -> None:
    model = build(pixel_case).eval().requires_grad_(False)
    actions = torch.zeros(2, 3, 4, 4, requires_grad=True)
    context = Context(latents=torch.randn(2, 1, 6), actions=torch.zeros(2, 0, 4))
    model.rollout(context, actions)[:, :, -1].square().sum().backward()
    assert (actions.grad.abs().amax(dim=(0, 1, 3)) > 0).all()  # from the last step back to the first


def test_encoding_many_frames_in_parts_changes_nothing(vector_case) -> None:
    model = build(vector_case, encoder=VectorMLP(hidden=(8,))).eval()
    observations = vector_case.observations(3, 700)
    latents = model.encode(observations)
    assert latents.shape == (3, 700, 6)
    torch.testing.assert_close(latents[2, 699:], model.encode(observations[2, 699:]))


def test_other_observations_are_refused(pixel_case, odd_case) -> None:
    with pytest.raises(
        DataError, match=r"expects pixels \(16, 16, 3\) and a vector of 0 values; got pixels \(19, 13, 2\)"
    ):
        build(pixel_case).encode(odd_case.observations(1))


def test_statistics_of_other_actions_are_refused(pixel_case) -> None:
    statistics = pixel_case.statistics
    wrong = Statistics(
        pixel_mean=statistics.pixel_mean,
        pixel_std=statistics.pixel_std,
        vector_mean=None,
        vector_std=None,
        action_mean=torch.zeros(5),
        action_std=torch.ones(5),
    )
    with pytest.raises(ConfigError, match="5 action dimensions; expected 2"):
        build_jepa(JEPAConfig(), pixel_case.observation, pixel_case.action, wrong, seed=0)


@pytest.mark.parametrize("shared", [2, 3])
def test_an_action_stem_stands_before_the_predictor_alone(pixel_case, shared) -> None:
    model = build(pixel_case, action_stem=shared, context=2).eval()
    check_world_model(model)
    assert model.action_stem.mix.weight.shape == (shared, 2)
    windows = pixel_case.windows(3, 6, 2)
    model.train()
    before = model(windows)
    with torch.no_grad():
        model.action_stem.mix.weight.neg_()
    after = model(windows)
    assert torch.equal(before.actions, after.actions), "what was done is not changed, only what the predictor is told"
    assert not torch.allclose(before.predictions, after.predictions)


def test_an_action_stem_undoes_another_convention(pixel_case) -> None:
    """A world whose actions are turned looks, behind the right stem, like the one whose actions are not."""
    model = build(pixel_case, action_stem=2).eval()
    context = Context(latents=torch.randn(1, 1, 6), actions=torch.zeros(1, 0, 4))
    actions = torch.randn(1, 5, 3, 4)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    straight = model.rollout(context, actions)
    normalised = model.normalise_actions(actions).unflatten(-1, (2, 2)) @ turn.T
    scale, shift = model.normalise_actions.scale, model.normalise_actions.shift
    turned = normalised.flatten(-2) / scale + shift
    with torch.no_grad():
        model.action_stem.mix.weight.copy_(turn.T @ model.action_stem.mix.weight)
    torch.testing.assert_close(model.rollout(context, turned), straight, rtol=1e-4, atol=1e-5)


def test_models_encode_alike_only_with_the_same_encoder_context_and_block(pixel_case) -> None:
    ours, other = build(pixel_case), build(pixel_case)
    with torch.no_grad():
        next(other.predictor.parameters()).add_(1)
    assert ours.encodes_like(other)
    assert not ours.encodes_like(build(pixel_case, context=3))
    with torch.no_grad():
        next(other.encoder.parameters()).add_(1)
    assert not ours.encodes_like(other)


def test_a_run_with_another_encoder_is_no_peer(pixel_case, tmp_path) -> None:
    ours, other = build(pixel_case), build(pixel_case)
    save_model(tmp_path / "same" / "model", other, {})
    assert Heads(tmp_path, ours).peer(str(tmp_path / "same")).encodes_like(ours)
    with torch.no_grad():
        next(other.encoder.parameters()).add_(1)
    save_model(tmp_path / "other" / "model", other, {})
    with pytest.raises(ConfigError, match="different encoder"):
        Heads(tmp_path, ours).peer(str(tmp_path / "other"))
