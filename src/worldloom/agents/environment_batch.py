"""The batch of environments that an agent acts in."""

from collections.abc import Sequence

from worldloom.core.errors import PlanningError
from worldloom.core.types import Goal, Observations


class EnvironmentBatch:
    """Knows how many environments there are, and refuses observations of another number."""

    def __init__(self) -> None:
        self._size: int | None = None

    def start(self, goal: Goal) -> None:
        """Begin an episode with one environment for each goal."""
        axes = goal.observations.axes
        if len(axes) != 1 or axes[0] < 1:
            raise PlanningError(f"goals need one leading axis, of environments; got {axes}. Add it: goal[None]")
        self._size = axes[0]

    def check(self, observations: Observations) -> None:
        """Raise `PlanningError` where no episode was begun, or the number of environments is not its goals'."""
        if self._size is None:
            raise PlanningError("act was called before reset; call reset(goal) at the start of an episode")
        if observations.axes != (self._size,):
            raise PlanningError(
                f"expected observations of the {self._size} environments that reset gave goals for; got leading axes "
                f"{observations.axes}. Call reset with the new goals, or select(rows) when episodes end"
            )

    def select(self, rows: Sequence[int]) -> list[int]:
        """Narrow to these environments, given by their places; return the places as a list."""
        size, places = self._size, [int(row) for row in rows]
        if size is None or not places or not all(0 <= place < size for place in places):
            raise PlanningError(f"cannot select environments {places} of {size}; name places of the last batch")
        self._size = len(places)
        return places
