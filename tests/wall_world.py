"""A square with a wall that has a door at its top: exact dynamics as a world model, the latent is the position."""

import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.core.actions import Walk
from worldloom.core.seams import WorldModel
from worldloom.core.types import ActionBounds, ActionSpec, Context, ModelSpec, Observations, ObservationSpec
from worldloom.heads import LatentEpisodes

STEP = 0.08  # the longest environment step, in a square from -1 to 1
WALL = 0.15  # half the thickness of the wall on x = 0
DOOR = 0.6  # the wall is open above this height


class WallWorld(WorldModel):
    """A point moves by STEP times its action; it slides along the wall. With `one_way` it never moves left."""

    def __init__(self, *, one_way: bool = False, block: int = 2) -> None:
        self.one_way = one_way
        self.spec = ModelSpec(
            observation=ObservationSpec(vector=2),
            action=ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0)),
            block=block,
            context=1,
            latent_dim=2,
            fingerprint=f"wall-world-{one_way}",
        )

    def encode(self, observations: Observations) -> Float[Tensor, "*axes D"]:
        assert observations.vector is not None
        return observations.vector

    def step(self, position: Float[Tensor, "*axes 2"], action: Float[Tensor, "*axes 2"]) -> Float[Tensor, "*axes 2"]:
        x, y = position.unbind(-1)
        dx, dy = (STEP * action).unbind(-1)
        if self.one_way:
            dx = (dx + STEP) / 2
        moved = (x + dx).clamp(-1, 1)
        moved = torch.where((y < DOOR) & (x <= -WALL), moved.clamp_max(-WALL), moved)
        moved = torch.where((y < DOOR) & (x >= WALL), moved.clamp_min(WALL), moved)
        risen = (y + dy).clamp(-1, 1)
        return torch.stack([moved, torch.where(moved.abs() < WALL, risen.clamp_min(DOOR), risen)], dim=-1)

    def rollout(self, context: Context, actions: Float[Tensor, "B S T A"]) -> Float[Tensor, "B S T D"]:
        position = context.latents[:, -1, None].expand(-1, actions.shape[1], -1)
        latents = []
        for block in actions.unbind(2):
            for action in block.unflatten(-1, (self.spec.block, 2)).unbind(-2):
                position = self.step(position, action)
            latents.append(position)
        return torch.stack(latents, dim=2)

    def episodes(self, count: int = 64, length: int = 25, seed: int = 0) -> LatentEpisodes:
        """Return random walks from random places."""
        generator = torch.Generator().manual_seed(seed)
        blocks = Walk().sample(self.spec, ActionBounds.of(self.spec), (count, 1, length), generator)
        start = 2 * torch.rand(count, 1, 2, generator=generator) - 1
        start[..., 0] = torch.where(start[..., 0].abs() < WALL, start[..., 0].sign() * WALL, start[..., 0])
        walked = self.rollout(Context(latents=start, actions=blocks[:, 0, :0]), blocks)[:, 0]
        return LatentEpisodes(
            latents=torch.cat([start, walked], dim=1), blocks=blocks[:, 0], lengths=torch.full((count,), length + 1)
        )
