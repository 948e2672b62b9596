"""The batch of environments that an agent acts in."""

from collections.abc import Sequence

from worldloom.core.errors import PlanningError
from worldloom.core.types import Goal, Observations


class EnvironmentBatch:
    """Stores the number of environments, and checks that each batch of observations has this number."""

    def __init__(self) -> None:
        self._size: int | None = None

    def start(self, goal: Goal) -> None:
        """Begin an episode with one environment for each goal."""
        axes = goal.observations.axes
        if len(axes) != 1 or axes[0] < 1:
            raise PlanningError(
                f"expected goals with one leading axis, for at least one environment; got leading axes {axes}. For a "
                f"single goal without this axis, pass goal[None]"
            )
        self._size = axes[0]

    def check(self, observations: Observations) -> None:
        """Raise `PlanningError` if no episode was started, or there are not as many observations as goals."""
        if self._size is None:
            raise PlanningError("act was called before reset; call reset(goal) at the start of an episode")
        if observations.axes != (self._size,):
            raise PlanningError(
                f"expected observations of the {self._size} environments of the last reset; got leading axes "
                f"{observations.axes}. Call reset with the new goals, or select(rows) when episodes end"
            )

    def select(self, rows: Sequence[int]) -> list[int]:
        """Keep only the environments at these places of the batch; return the places as a list."""
        size, places = self._size, [int(row) for row in rows]
        if size is None or not places or not all(0 <= place < size for place in places):
            raise PlanningError(
                f"expected one or more indices from 0 to below {size or 0}, the size of the last batch; got {places}. "
                f"Pass indices of that batch; without a batch, first call reset(goal)"
            )
        self._size = len(places)
        return places
