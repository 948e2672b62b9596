"""What an agent remembers of an episode for a model that looks back."""

from collections import deque
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.core.seams import WorldModel
from worldloom.core.types import Context, Observations


class History:
    """The last environment steps of B environments, as far back as the model's context reaches.

    Before the start of an episode the first frame repeats and actions are zero, as in training windows.
    """

    def __init__(self, model: WorldModel) -> None:
        self._model = model
        self._device = torch.device(getattr(model, "device", "cpu"))
        reach = (model.spec.context - 1) * model.spec.block
        self._frames: deque[Observations] = deque(maxlen=reach + 1)
        self._actions: deque[Tensor] = deque(maxlen=reach)
        self._taken: Tensor | None = None

    def clear(self) -> None:
        """Forget the episode."""
        self._frames.clear()
        self._actions.clear()
        self._taken = None

    def see(self, observations: Observations) -> None:
        """Add the current frame."""
        # Simulators may reuse their buffers: what is looked at again later must be a copy.
        looks_back = self._model.spec.context > 1
        self._frames.append(observations.map(torch.clone) if looks_back else observations)

    def did(self, actions: Float[Tensor, "B _"]) -> None:
        """Add the environment action that leaves the current frame."""
        self._actions.append(actions)
        self._taken = actions

    def select(self, rows: Sequence[int]) -> None:
        """Narrow to these environments."""
        index = list(rows)
        self._frames = deque((frame[index] for frame in self._frames), maxlen=self._frames.maxlen)
        self._actions = deque((action[index] for action in self._actions), maxlen=self._actions.maxlen)
        self._taken = None if self._taken is None else self._taken[index]

    def context(self) -> Context:
        """Encode the frames that the model takes, one block apart, with the blocks between them."""
        spec = self._model.spec
        last = len(self._frames) - 1
        places = [max(0, last - back * spec.block) for back in range(spec.context - 1, -1, -1)]
        encoded = {place: self._model.encode(self._frames[place].to(self._device)) for place in dict.fromkeys(places)}
        latents = torch.stack([encoded[place] for place in places], dim=1)
        reach = (spec.context - 1) * spec.block
        actions = latents.new_zeros(latents.shape[0], reach, spec.action.size)
        if self._actions:
            actions[:, reach - len(self._actions) :] = torch.stack(tuple(self._actions), dim=1).to(actions)
        return Context(
            latents=latents,
            actions=actions.view(latents.shape[0], spec.context - 1, spec.block_size),
            taken=None if self._taken is None else self._taken.to(latents),
        )
