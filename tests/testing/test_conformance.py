from types import SimpleNamespace

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.core.seams import WorldModel
from worldloom.core.types import Context, Observations
from worldloom.testing import LinearWorld, check_world_model


@pytest.mark.parametrize("context", [1, 3])
@pytest.mark.parametrize("block", [1, 4])
def test_the_linear_world_keeps_every_promise(context: int, block: int) -> None:
    check_world_model(LinearWorld(context=context, block=block))
    check_world_model(LinearWorld(gain=((1.0, 0.5, 0.0), (0.0, 0.0, 2.0)), context=context, block=block))


def test_the_rollout_of_the_linear_world_is_the_sum_of_its_actions() -> None:
    world = LinearWorld(gain=((2.0, 0.0), (0.0, 0.5)), block=2)
    context = Context(latents=torch.tensor([[[1.0, 1.0]]]), actions=torch.zeros(1, 0, 4))
    actions = torch.tensor([[[[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, -1.0], [0.0, 0.0, -1.0, 1.0]]]])
    expected = torch.tensor([[[[5.0, 1.0], [5.0, 1.0], [3.0, 1.5]]]])
    torch.testing.assert_close(world.rollout(context, actions), expected)


class _BatchNormalised(LinearWorld):
    def encode(self, observations: Observations) -> Float[Tensor, "*axes D"]:
        latents = super().encode(observations)
        return latents - latents.mean()


class _SeesOtherCandidates(LinearWorld):
    def rollout(self, context: Context, actions: Float[Tensor, "B S T A"]) -> Float[Tensor, "B S T D"]:
        return super().rollout(context, actions - actions.mean(1, keepdim=True))


class _SeesTheFuture(LinearWorld):
    def rollout(self, context: Context, actions: Float[Tensor, "B S T A"]) -> Float[Tensor, "B S T D"]:
        return super().rollout(context, actions + actions.mean(2, keepdim=True))


class _ActsLate(LinearWorld):
    def rollout(self, context: Context, actions: Float[Tensor, "B S T A"]) -> Float[Tensor, "B S T D"]:
        return super().rollout(context, torch.cat([torch.zeros_like(actions[:, :, :1]), actions[:, :, :-1]], dim=2))


class _IncludesThePresent(LinearWorld):
    def rollout(self, context: Context, actions: Float[Tensor, "B S T A"]) -> Float[Tensor, "B S T2 D"]:
        future = super().rollout(context, actions)
        present = context.latents[:, -1:, None].expand(-1, future.shape[1], -1, -1)
        return torch.cat([present, future], dim=2)


class _Noisy(LinearWorld):
    def rollout(self, context: Context, actions: Float[Tensor, "B S T A"]) -> Float[Tensor, "B S T D"]:
        future = super().rollout(context, actions)
        return future + torch.randn(future.shape)


class _Overwrites(LinearWorld):
    def rollout(self, context: Context, actions: Float[Tensor, "B S T A"]) -> Float[Tensor, "B S T D"]:
        return super().rollout(context, actions.mul_(0.5))


@pytest.mark.parametrize("missing", ["spec", "device", "encode", "rollout"])
def test_a_model_that_lacks_an_attribute_of_the_seam_is_told_which_and_what_to_do(missing: str) -> None:
    world = LinearWorld()
    attributes = {name: getattr(world, name) for name in ("spec", "device", "encode", "rollout") if name != missing}
    bare = SimpleNamespace(**attributes)
    told = f"with spec, device, encode, rollout; SimpleNamespace lacks {missing}. Subclass"
    with pytest.raises(AssertionError, match=told):
        check_world_model.__wrapped__(bare)  # without the type check of the tests, which would refuse it first


def test_a_subclass_of_the_seam_has_its_defaults_and_is_told_what_it_left_out() -> None:
    world = LinearWorld()

    class Derived(WorldModel):
        spec, encode, rollout = world.spec, staticmethod(world.encode), staticmethod(world.rollout)

    class WithoutRollout(Derived):
        rollout = staticmethod(lambda context, actions: None)  # as the one that a subclass inherits

    check_world_model(Derived())
    assert Derived().device == torch.device("cpu")
    with pytest.raises(AssertionError, match="rollout must return a tensor; got NoneType. Define rollout"):
        check_world_model(WithoutRollout())


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (_BatchNormalised, "encode depends on other observations in the batch"),
        (_SeesOtherCandidates, "candidate's future depends on other candidates"),
        (_SeesTheFuture, "first 1 of 5 steps differ"),
        (_ActsLate, "first action does not change the first predicted frame"),
        (_IncludesThePresent, "rollout must return shape"),
        (_Noisy, "different results for the same actions"),
        (_Overwrites, "changed its actions in place"),
    ],
)
def test_a_broken_promise_is_named(broken: type[LinearWorld], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_world_model(broken())
