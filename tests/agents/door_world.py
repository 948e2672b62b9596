"""A square with a wall on x = 0 and a door at each end: exact dynamics as a world model, the latent is the position."""

import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.core.actions import Walk
from worldloom.core.seams import WorldModel
from worldloom.core.types import ActionBounds, ActionSpec, Context, ModelSpec, Observations, ObservationSpec
from worldloom.memory import LandmarkConfig, LandmarkGraph

STEP = 0.1  # the longest environment step, in a square from -1 to 1; a block is one step
WALL = 0.15  # half the thickness of the wall
DOOR = 0.6  # the wall is open above this height, and below its negative
TOP, BOTTOM = 1.0, -1.0


class DoorWorld(WorldModel):
    """A point that walls stop; `closed` names the door (TOP or BOTTOM) that is shut."""

    def __init__(self, closed: tuple[float, ...] = ()) -> None:
        self.closed = closed
        self.spec = ModelSpec(
            observation=ObservationSpec(vector=2),
            action=ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0)),
            block=1,
            context=1,
            latent_dim=2,
            fingerprint="door-world",
        )

    def encode(self, observations: Observations) -> Float[Tensor, "*axes D"]:
        assert observations.vector is not None
        return observations.vector

    def step(self, position: Float[Tensor, "*axes 2"], action: Float[Tensor, "*axes 2"]) -> Float[Tensor, "*axes 2"]:
        x, y = position.unbind(-1)
        dx, dy = (STEP * action.clamp(-1, 1)).unbind(-1)
        open_ = torch.zeros_like(y, dtype=torch.bool)
        for door in (TOP, BOTTOM):
            if door not in self.closed:
                open_ |= y * door > DOOR
        moved = (x + dx).clamp(-1, 1)
        moved = torch.where(~open_ & (x <= -WALL), moved.clamp_max(-WALL), moved)
        moved = torch.where(~open_ & (x >= WALL), moved.clamp_min(WALL), moved)
        risen = (y + dy).clamp(-1, 1)
        # Within a door one cannot go into the wall beside it.
        beside = torch.where(y > 0, risen.clamp_min(DOOR), risen.clamp_max(-DOOR))
        return torch.stack([moved, torch.where(moved.abs() < WALL, beside, risen)], dim=-1)

    def rollout(self, context: Context, actions: Float[Tensor, "B S T A"]) -> Float[Tensor, "B S T D"]:
        position = context.latents[:, -1, None].expand(-1, actions.shape[1], -1)
        latents = []
        for action in actions.unbind(2):
            position = self.step(position, action)
            latents.append(position)
        return torch.stack(latents, dim=2)

    def wander(self, count: int, length: int, seed: int = 0) -> Float[Tensor, "E N 2"]:
        """Return random walks from random places."""
        generator = torch.Generator().manual_seed(seed)
        walks = Walk(renewal=0.1).sample(self.spec, ActionBounds.of(self.spec), (count, 1, length), generator)
        start = 2 * torch.rand(count, 1, 2, generator=generator) - 1
        start[..., 0] = torch.where(start[..., 0].abs() < WALL, start[..., 0].sign() * WALL, start[..., 0])
        there = self.rollout(Context(latents=start, actions=walks[:, 0, :0]), walks)[:, 0]
        return torch.cat([start, there], dim=1)

    def graph(self, *, learned: bool = True, reversible: bool = True) -> LandmarkGraph:
        """Return landmarks, learned from walks over the whole square or none yet."""
        graph = LandmarkGraph(self.spec, LandmarkConfig(), step_length=STEP, reversible=reversible)
        if learned:
            walks = self.wander(60, 60)
            lines = torch.arange(60).repeat_interleave(61).numpy()
            graph.learn(walks.flatten(0, 1), lines, torch.arange(61).repeat(60).numpy())
        return graph
