from pathlib import Path

import pytest
import torch
from blob_world import blob_cache
from train_blobs import MODEL

from worldloom.core.types import ActionBounds, Context
from worldloom.models import load_model
from worldloom.training import RunFolder, TrainingConfig, fit

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_model_trained_on_a_gpu_predicts_the_same_on_a_cpu(tmp_path: Path, precision: str) -> None:
    config = TrainingConfig(steps=30, batch=16, horizon=2, accelerator="cuda", precision=precision, validate_every=30)
    run = RunFolder.create(tmp_path / "run", {}, {})
    model = fit(config, MODEL, blob_cache(episodes=10), run)
    assert model.device.type == "cuda"
    bounds = ActionBounds.of(model.spec)
    actions = bounds.low + (bounds.high - bounds.low) * torch.rand(2, 5, 3, model.spec.block_size)
    latents = torch.randn(2, model.spec.context, model.spec.latent_dim)
    context = Context(latents=latents, actions=torch.zeros(2, model.spec.context - 1, model.spec.block_size))
    there = load_model(run.model_directory, "cuda").rollout(
        Context(latents=context.latents.cuda(), actions=context.actions.cuda()), actions.cuda()
    )
    here = load_model(run.model_directory, "cpu").rollout(context, actions)
    torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-3)
