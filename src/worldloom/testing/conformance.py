"""The guarantees of `WorldModel`, as checks for any implementation."""

import torch
from torch import Tensor

from worldloom.core.seams import WorldModel
from worldloom.core.types import ActionBounds, Context, ModelSpec, Observations

_ATTRIBUTES = (*WorldModel.__annotations__, *(name for name in vars(WorldModel) if not name.startswith("_")))


def check_world_model(model: WorldModel, *, seed: int = 0, tolerance: float = 1e-4) -> None:
    """Raise `AssertionError` if `model` breaks a guarantee of `WorldModel`; the message names the guarantee.

    The checks cover the attributes of `WorldModel`, shapes and finite values, and the following guarantees. Equal
    inputs give equal results. An observation's latent depends on that observation only. The prediction for a candidate
    or an environment does not depend on other candidates or environments. The first steps of a long rollout equal a
    short rollout. The first future action changes the first predicted frame. Inputs stay unchanged.

    The model may be untrained; put modules in evaluation mode first. `tolerance` is absolute and relative.
    """
    missing = [name for name in _ATTRIBUTES if not hasattr(model, name)]
    assert not missing, (
        f"expected a world model with {', '.join(_ATTRIBUTES)}; {type(model).__name__} lacks {', '.join(missing)}. "
        f"Subclass worldloom.core.seams.WorldModel, which has a default for 'device', and define the others"
    )
    spec, generator = model.spec, torch.Generator().manual_seed(seed)
    device = model.device
    batch, candidates, steps = 3, 4, 5
    observations = _observations(spec, (batch, spec.context), generator).to(device)
    bounds = ActionBounds.of(spec)

    def draw(*axes: int) -> Tensor:
        share = torch.rand(*axes, spec.block_size, generator=generator)
        return (bounds.low + share * (bounds.high - bounds.low)).to(device)

    def same(first: Tensor, second: Tensor) -> bool:
        return first.shape == second.shape and torch.allclose(first, second, rtol=tolerance, atol=tolerance)

    with torch.no_grad():
        kept = observations.map(torch.clone)
        latents = model.encode(observations)
        _check_latents("encode", latents, (batch, spec.context, spec.latent_dim))
        assert same(latents, model.encode(observations)), "encode returned different results for the same observations"
        for row in range(batch):
            assert same(latents[row], model.encode(observations[row])), (
                "encode depends on other observations in the batch, or does not accept any number of leading axes; "
                "use no batch statistics in evaluation"
            )
        for before, after in ((kept.pixels, observations.pixels), (kept.vector, observations.vector)):
            assert before is None or (after is not None and torch.equal(before, after)), (
                "encode changed its input in place; work on a copy"
            )

        context = Context(latents=latents, actions=draw(batch, spec.context - 1))
        actions = draw(batch, candidates, steps)
        kept_actions = actions.clone()
        futures = model.rollout(context, actions)
        _check_latents("rollout", futures, (batch, candidates, steps, spec.latent_dim))
        assert torch.equal(actions, kept_actions), "rollout changed its actions in place; work on a copy"
        assert same(futures, model.rollout(context, actions)), "rollout returned different results for the same actions"
        for candidate in range(candidates):
            alone = model.rollout(context, actions[:, candidate : candidate + 1])
            assert same(futures[:, candidate : candidate + 1], alone), (
                "a candidate's future depends on other candidates"
            )
        for row in range(batch):
            alone = model.rollout(context[row : row + 1], actions[row : row + 1])
            assert same(futures[row : row + 1], alone), "an environment's future depends on other environments"
        for length in range(1, steps):
            prefix = model.rollout(context, actions[:, :, :length])
            assert same(futures[:, :, :length], prefix), (
                f"the first {length} of {steps} steps differ from a rollout of {length} steps; "
                "let no step depend on later actions"
            )
        other = torch.cat([draw(batch, candidates, 1), actions[:, :, 1:]], dim=2)
        moved = (model.rollout(context, other)[:, :, 0] - futures[:, :, 0]).abs().amax()
        assert moved > 0, (
            "the first action does not change the first predicted frame; actions[t] leads from frame t to t + 1"
        )


def _check_latents(name: str, latents: object, shape: tuple[int, ...]) -> None:
    # A subclass of `WorldModel` inherits methods that return None for those it does not define.
    assert isinstance(latents, Tensor), f"{name} must return a tensor; got {type(latents).__name__}. Define {name}"
    assert tuple(latents.shape) == shape, f"{name} must return shape {shape}; got {tuple(latents.shape)}"
    assert latents.is_floating_point(), f"{name} must return floats; got {latents.dtype}"
    assert bool(latents.isfinite().all()), f"{name} returned values that are not finite"


def _observations(spec: ModelSpec, axes: tuple[int, ...], generator: torch.Generator) -> Observations:
    pixels = spec.observation.pixels
    vector = spec.observation.vector
    return Observations(
        pixels=None
        if pixels is None
        else torch.randint(0, 256, (*axes, *pixels), dtype=torch.uint8, generator=generator),
        vector=torch.randn(*axes, vector, generator=generator) if vector else None,
    )
