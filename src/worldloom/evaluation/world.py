"""The worlds of a protocol, which methods may act in them, and the locations in their error messages."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.core.closing import Closing
from worldloom.core.errors import ConfigError
from worldloom.core.seams import Policy, SafePolicy
from worldloom.envs import VectorWorld, Where
from worldloom.evaluation.protocol import Protocol


@dataclass(frozen=True, kw_only=True)
class ActingRules:
    """Which methods may act under a rule set. The restrictions apply only in plants; see `Worlds`.

    Attributes:
        methods: the names of the methods that obey the rule set.
        chosen: the names of methods that the user chose. An error is raised if one of them may not act; other methods
            that may not act are skipped.
        guard: returns a policy that follows the given logging policy as far as the rule set permits.
        simulator: whether a world that declares nothing counts as a simulator.
    """

    methods: Collection[str]
    chosen: Collection[str] = ()
    guard: Callable[[Policy], SafePolicy]
    simulator: bool = False


class Worlds(Closing):
    """The worlds of a protocol, one for each batch size up to `batch`; close the object, or use it in `with`.

    A *plant* is a real system: it exists once, and actions in it have consequences. A world is a plant if it declares
    that it is not a simulator. Under a rule set, a world that declares nothing is a plant too.

    Attributes:
        batch: the largest batch size; 1 for a plant.
        guard: see `ActingRules`; None where logging policies may act freely.
        repeats: whether a reset with the same seed must repeat a start exactly; a declared plant cannot promise that.

    Raises:
        ConfigError: the world declares that it is not a simulator, but the user declares the opposite; or, under a rule
            set, a plant's starts are reached by repeating recorded actions.
        EnvironmentFailure: the environment cannot be created.
    """

    def __init__(self, protocol: Protocol, batch: int, rules: ActingRules | None = None) -> None:
        self._protocol, self._rules = protocol, rules
        first = open_world(protocol, 1)
        self._open = {1: first}
        self._declared = first.simulator
        plant = not self._declared if self._declared is not None else rules is not None and not rules.simulator
        self.repeats = self._declared is not False
        self.batch = 1 if plant else batch
        self.guard = rules.guard if rules is not None and plant else None
        if self.batch > 1:
            self.close()  # the first copy was needed only for what it declares
        try:
            self._check()
        except ConfigError:
            self.close()
            raise

    def _check(self) -> None:
        if self._declared is False and self._rules is not None and self._rules.simulator:
            raise ConfigError(
                f"{self._protocol.env_id} declares that it is not a simulator; leave out --simulator (in Python, "
                f"simulator=True)"
            )
        if self.guard is not None and self._protocol.replays:
            raise ConfigError(
                f"protocol {self._protocol.title} reaches its starts by repeating recorded actions, which no guardrail "
                f"checks. {self._why_plant()}. Choose a protocol without start_steps"
            )

    def skipped(self, methods: Collection[str]) -> dict[str, str]:
        """Return the methods that may not act, each with the reason.

        Raises:
            ConfigError: none of the methods may act, or one of them was chosen by the user.
        """
        if self.guard is None or self._rules is None:
            return {}
        out = [name for name in methods if name not in self._rules.methods]
        wrong = sorted(set(out) & set(self._rules.chosen))
        if wrong or len(out) == len(methods):
            raise ConfigError(
                f"these methods do not obey the rule set: {', '.join(wrong or out)}. {self._why_plant()}, so they may "
                f"not act. Choose a method that obeys guardrails"
            )
        return dict.fromkeys(out, f"it does not obey the rule set. {self._why_plant()}")

    def _why_plant(self) -> str:
        """Return why the world counts as a plant."""
        name = self._protocol.env_id
        if self._declared is False:
            return f"{name} declares that it is not a simulator"
        return (
            f"{name} does not declare whether it is a simulator, and counts as a plant under a rule set (to declare a "
            f"simulator, set metadata['simulator'] = True in the environment's class, or pass --simulator)"
        )

    def of(self, size: int) -> VectorWorld:
        """Return the world of `size` parallel environments."""
        if size not in self._open:
            self._open[size] = open_world(self._protocol, size)
        return self._open[size]

    def close(self) -> None:
        """Close all worlds."""
        while self._open:
            self._open.popitem()[1].close()


def open_world(protocol: Protocol, size: int) -> VectorWorld:
    """Return `size` parallel environments of a protocol; close them, or use them in a `with` statement."""
    return VectorWorld(
        protocol.env_id, size, protocol.env_kwargs, native=not protocol.replays, pictures=protocol.pictures
    )


def tell_applied(world: VectorWorld, resume: Callable[[Float[Tensor, "B A"]], None]) -> None:
    """Tell what acts on a plant which action the plant is applying, because it may have replaced the last one.

    `resume` is the method of an `Actor` or a `SafePolicy`; on a simulator it is not called.
    """
    if (applied := world.applied()) is not None:
        resume(torch.from_numpy(applied)[None])


def naming(world: VectorWorld, seeds: Sequence[int], where: str) -> Where:
    """Return a function that describes a place for error messages: `where`, the episode's seed and the step."""

    def name(row: int | None) -> str:
        if row is not None:
            return f"{where}, episode seed {seeds[row]}, step {world.steps[row]}: "
        some = ", ".join(map(str, seeds[:5])) + (", ..." if len(seeds) > 5 else "")
        return f"{where}, one of the episode seeds {some}, step {world.steps.max()}: "

    return name
