import torch

from worldloom.models import TargetConfig, TargetEncoder


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
