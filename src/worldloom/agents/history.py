"""The recent frames and actions of an episode, for models with a context of several frames."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.core.seams import WorldModel
from worldloom.core.types import Batched, Context, Observations


@dataclass(frozen=True, kw_only=True)
class History(Batched):
    """The last environment steps of B environments, as many as the model's context needs.

    Before the start of an episode the first frame repeats and actions are zero, as in training windows.
    """

    model: WorldModel
    frames: tuple[Observations, ...] = ()
    actions: tuple[Float[Tensor, "B _"], ...] = ()
    taken: Float[Tensor, "B _"] | None = None

    @property
    def reach(self) -> int:
        """The number of environment steps that the context spans."""
        return (self.model.spec.context - 1) * self.model.spec.block

    def seen(self, observations: Observations) -> "History":
        """Return the history with the current frame appended."""
        # Simulators may reuse their buffers, so frames that are needed later must be copied.
        frame = observations.map(torch.clone) if self.reach else observations
        return replace(self, frames=(*self.frames, frame)[-self.reach - 1 :])

    def acted(self, actions: Float[Tensor, "B _"]) -> "History":
        """Return the history with the environment action that follows the current frame."""
        return replace(self, actions=(*self.actions, actions)[-self.reach :] if self.reach else (), taken=actions)

    def corrected(self, taken: Float[Tensor, "B _"]) -> "History":
        """Return the history with the environment action that was applied instead of the last one."""
        if not self.actions:
            return replace(self, taken=taken)
        return replace(self, actions=(*self.actions[:-1], taken.to(self.actions[-1])), taken=taken)

    def context(self) -> Context:
        """Return the model's context: encoded frames, one block apart, with the action blocks between them."""
        model, spec, reach = self.model, self.model.spec, self.reach
        last = len(self.frames) - 1
        places = [max(0, last - back * spec.block) for back in range(spec.context - 1, -1, -1)]
        encoded = {place: model.encode(self.frames[place].to(model.device)) for place in dict.fromkeys(places)}
        latents = torch.stack([encoded[place] for place in places], dim=1)
        actions = latents.new_zeros(latents.shape[0], reach, spec.action.size)
        if self.actions:
            actions[:, reach - len(self.actions) :] = torch.stack(self.actions, dim=1).to(actions)
        return Context(
            latents=latents,
            actions=actions.view(latents.shape[0], spec.context - 1, spec.block_size),
            taken=None if self.taken is None else self.taken.to(latents),
        )
