"""Less memory for activations, and the same gradient."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from blob_world import blob_cache
from train_blobs import CONFIG, MODEL
from train_ranks import VIT

from worldloom.core.errors import ConfigError
from worldloom.data import WindowSampler, compute_statistics
from worldloom.models import JEPAConfig, build_jepa
from worldloom.models.predictors import TransformerPredictor
from worldloom.training.learner import Learner

LOSSES = ["batch=16", 'losses.straightening={"name": "straightening", "weight": 0.1}']


@pytest.fixture(scope="module")
def cache():
    return blob_cache(episodes=10)


@pytest.fixture
def step(cache) -> Callable[..., tuple[torch.Tensor, Learner, int]]:
    """Return the gradient of one step, the learner, and the bytes that were kept for it."""

    def take(model_config: JEPAConfig, *overrides: str) -> tuple[torch.Tensor, Learner, int]:
        config = CONFIG.override([*LOSSES, *overrides])
        statistics = compute_statistics(cache, seed=0)
        model = build_jepa(model_config, cache.spec.observation, cache.spec.action, statistics, seed=0)
        torch.manual_seed(0)
        learner = Learner(model, config).train()
        sampler = WindowSampler(cache, context=model_config.context, horizon=config.horizon, block=model_config.block)
        windows = sampler.sample(config.batch, np.random.default_rng(0))
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total, _ = learner(windows.observations.pixels, None, windows.actions, 0)
        total.backward()
        gradients = [parameter.grad.flatten() for parameter in learner.parameters() if parameter.grad is not None]
        return torch.cat(gradients), learner, sum(kept.values())

    return take


def assert_same_gradient(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one - other).abs().max() < 1e-5 * one.abs().max()


@pytest.mark.parametrize("model", [MODEL, VIT], ids=["patch-conv", "vit"])
@pytest.mark.parametrize("parts", [2, 3])
def test_parts_give_the_gradient_of_the_whole_batch_with_less_kept(step, model, parts) -> None:
    whole, before, kept = step(model)
    in_parts, after, kept_in_parts = step(model, f"accumulate={parts}")
    assert_same_gradient(whole, in_parts)
    assert kept_in_parts < kept / 2
    # The running statistics see the batch once, however often it is encoded.
    assert torch.equal(before.model.norm.running_mean, after.model.norm.running_mean)


def test_a_batch_in_parts_is_not_several_smaller_batches(step) -> None:
    whole, _, _ = step(MODEL)
    smaller, _, _ = step(MODEL, "batch=8")
    assert (whole - smaller).abs().max() > 1e-3 * whole.abs().max()


def test_checkpointed_blocks_give_the_same_gradient_with_less_kept(step) -> None:
    model = VIT.model_copy(update={"predictor": TransformerPredictor(depth=1, width=16, heads=2)})
    plain, _, kept = step(model)
    checkpointed, _, kept_checkpointed = step(model, "activation_checkpointing=true")
    assert torch.equal(plain, checkpointed)
    assert kept_checkpointed < kept / 2


def test_checkpointing_without_blocks_names_what_serves_instead(step) -> None:
    with pytest.raises(ConfigError, match=r"transformer blocks.*training\.accumulate"):
        step(MODEL, "activation_checkpointing=true")
