"""Named, versioned evaluation protocols: every convention is a field, and `describe` returns all of them as text."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict, Unpack

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64
from pydantic import Field, model_validator

from worldloom.core.config import Config
from worldloom.core.errors import ConfigError
from worldloom.core.picture_layout import PictureOptions
from worldloom.core.registry import nearest
from worldloom.core.seeds import derive_seed
from worldloom.envs import Frame

NonNegative = Annotated[float, Field(ge=0)]


class Condition(Config):
    """A further named vector of `size` values that must come within its own `radius` of the same vector at the goal.

    With a `period`, differences are taken around a circle of this circumference: 2 pi for an angle in radians. With
    `symmetry="cube"`, the vector is a quaternion (w, x, y, z), and its distance is the angle of the smallest rotation,
    in radians, between two cubes that look the same in 24 orientations.
    """

    name: str = Field(min_length=1)
    radius: float = Field(gt=0)
    unit: str = ""
    size: int = Field(default=1, ge=1)
    period: float = Field(default=0.0, ge=0)
    symmetry: Literal["", "cube"] = ""

    @model_validator(mode="after")
    def _quaternion(self) -> "Condition":
        if self.symmetry and (self.size != 4 or self.period):
            raise ValueError(
                f"'symmetry' needs a quaternion: size 4 and no period; got size {self.size} and period "
                f"{self.period:g}. Change these, or remove 'symmetry'"
            )
        return self

    def distance(
        self, values: Float[np.ndarray, "*rows C"], goal: Float[np.ndarray, "*rows C"]
    ) -> Float[np.ndarray, "*rows"]:
        """Return the distance between vectors and the goal's vectors."""
        if self.symmetry:
            return _cube_angle(values, goal)
        return np.asarray(np.linalg.norm(_around(values - goal, self.period), axis=-1))

    def describe(self) -> str:
        """Return the condition as text."""
        around = " (as a quaternion, up to the 24 rotations of a cube)" if self.symmetry else _circle(self.period)
        return f"the distance of '{self.name}'{around} is at most {_quantity(self.radius, self.unit)}"


class SuccessRule(Config):
    """The rule that decides when an episode has succeeded.

    With `source="environment"`, the environment decides. Otherwise the vector `name` must come within `radius` of the
    same vector at the goal. The vector is an info, or a named part of the observation vector (the complete observation
    vector if `name` is empty). With `source="named"` it is the info or the part, whichever has the name. Several names
    joined by "+" form one vector. The conditions `also` must be satisfied at the same step. With `largest`, the largest
    difference of any value replaces the Euclidean distance. With a `period`, differences are taken around a circle of
    this circumference; a list has the period of each value, and 0 for a value on a line. With `hold`, the rule must be
    satisfied at so many consecutive steps, and the last of them is the step of the success.
    """

    source: Literal["named", "info", "observation", "environment"] = "named"
    name: str = ""
    radius: float = Field(default=0.0, ge=0)
    unit: str = ""
    largest: bool = False
    period: NonNegative | tuple[NonNegative, ...] = 0.0
    also: tuple[Condition, ...] = ()
    hold: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _named(self) -> "SuccessRule":
        if self.source in ("named", "info") and not self.name:
            raise ValueError(f"a success rule with source {self.source!r} needs a name; set 'name'")
        if self.also and (self.source == "environment" or not self.radius):
            raise ValueError(
                f"'also' needs a success rule with source 'named', 'info' or 'observation' and a radius above 0; got "
                f"source {self.source!r} and radius {self.radius}. Change these, or remove 'also'"
            )
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the vectors, in the order in which `vector` joins them."""
        return (*self.name.split("+"), *(condition.name for condition in self.also))

    def vector(self, frame: Frame) -> Float64[np.ndarray, "R L"]:
        """Return the vectors of the rule, joined.

        Raises:
            ConfigError: the world has no vector of this name, or one with another number of values.
        """
        parts = [frame.vector((name,), self.source, "the success rule") for name in self.names]
        first = len(parts) - len(self.also)
        own = sum(part.shape[1] for part in parts[:first])
        periods = len(self.period) if isinstance(self.period, tuple) else own
        sizes = [(self.name, periods, own)]
        sizes += [(each.name, each.size, part.shape[1]) for each, part in zip(self.also, parts[first:], strict=True)]
        for name, expected, got in sizes:
            if got != expected:
                raise ConfigError(
                    f"the success rule needs {name!r} with {expected} values; this environment returns {got}. Choose a "
                    f"protocol for this environment"
                )
        return np.concatenate(parts, axis=1)

    def distance(
        self, values: Float[np.ndarray, "*#rows L"], goal: Float[np.ndarray, "*#rows L"]
    ) -> Float[np.ndarray, "..."]:
        """Return the distance between vectors and the goal's vectors; a distance of at most `radius` is a success.

        With further conditions, it is the largest of the rule's own distance and the conditions' distances. A
        condition's distance is scaled by `radius` / (the condition's radius).
        """
        values, goal = np.broadcast_arrays(values, goal)
        end = values.shape[-1]
        worst = np.zeros(values.shape[:-1])
        for condition in reversed(self.also):
            begin = end - condition.size
            away = condition.distance(values[..., begin:end], goal[..., begin:end])
            worst = np.maximum(worst, away * (self.radius / condition.radius))
            end = begin
        first = _around(values[..., :end] - goal[..., :end], self.period)
        away = np.abs(first).max(axis=-1) if self.largest else np.linalg.norm(first, axis=-1)
        return np.asarray(np.maximum(worst, away))

    @classmethod
    def parse_text(cls, text: str) -> "SuccessRule":
        """Parse `NAME:TOLERANCE`, `info:NAME:TOLERANCE`, `observation[:NAME]:TOLERANCE` or `env`.

        Names joined by "+" form one vector. Further conditions `NAME:TOLERANCE`, or `NAME~:TOLERANCE` for an angle in
        radians, follow after commas.

        Raises:
            ConfigError: the text has none of these forms.
        """
        if text == "env":
            return cls(source="environment")
        first, *others = text.split(",")
        *parts, tolerance = first.split(":")
        source = parts.pop(0) if parts and parts[0] in ("info", "observation") else "named"
        try:
            if len(parts) > 1:
                raise ValueError("too many colons")
            also: list[dict[str, Any]] = []
            for other in others:
                name, radius = other.split(":")
                angle = {"period": 2 * math.pi, "unit": "rad"} if name.endswith("~") else {}
                also.append({"name": name.removesuffix("~"), "radius": float(radius), **angle})
            values = {"source": source, "name": parts[0] if parts else "", "radius": float(tolerance), "also": also}
            return cls.parse(values)
        except (ValueError, ConfigError) as error:
            raise ConfigError(
                f"success rule {text!r} is invalid ({error}); expected NAME:TOLERANCE such as position:3, "
                f"info:NAME:TOLERANCE, observation:TOLERANCE, observation:NAME:TOLERANCE, or env. Add "
                f"further conditions after a comma, such as ,angle~:0.35"
            ) from None

    def describe(self) -> str:
        """Return the rule as text."""
        held = f"; held for {self.hold} consecutive steps, the last of which counts" if self.hold > 1 else ""
        if self.source == "environment":
            return (
                "the environment decides by its info 'success', by its info 'is_success' if it has no 'success', or "
                f"by 'terminated' if it has neither{held}"
            )
        place = "info or observation" if self.source == "named" else self.source
        what = f"'{self.name}' ({place})" if self.name else "the observation vector"
        measure = "largest difference of a value" if self.largest else "Euclidean distance"
        text = f"the {measure} from {what} to the same vector at the goal{_circle(self.period)}"
        first = f"{text} is at most {_quantity(self.radius, self.unit)}"
        return "; ".join([first, *(f"and {condition.describe()}" for condition in self.also)]) + held


class Crossing(Config):
    """Pairs of start and goal that lie on different sides of a line: value `index` of the info `name` equals `at`.

    Both are at least `clearance` away from the line.
    """

    name: str = Field(min_length=1)
    index: int = Field(default=0, ge=0)
    at: float
    clearance: float = Field(default=0.0, ge=0)
    unit: str = ""

    def side(self, frame: Frame) -> Int64[np.ndarray, "R"]:
        """Return -1 or 1 for the side of each row, and 0 nearer to the line than `clearance`.

        Raises:
            ConfigError: the world has no info of this name, or one with fewer values.
        """
        values = frame.numbers(self.name, "the protocol's choice of pairs")
        if values.shape[1] <= self.index:
            raise ConfigError(
                f"the protocol's choice of pairs needs value {self.index} of {self.name!r}; this environment returns "
                f"{values.shape[1]} values. Choose a protocol for this environment"
            )
        away = values[:, self.index] - self.at
        return np.where(np.abs(away) < self.clearance, 0, np.sign(away)).astype(np.int64)

    def describe(self) -> str:
        """Return the restriction as text."""
        return (
            f"start and goal lie on different sides of the line where value {self.index} of '{self.name}' (info) is "
            f"{_quantity(self.at, self.unit)}, each at least {_quantity(self.clearance, self.unit)} away from it"
        )


class Limit(Config):
    """A limit on the world: no value of the info `name` may exceed `most` at any step of an episode."""

    name: str
    most: float = 0.0
    unit: str = ""

    def broken(self, values: Float64[np.ndarray, "R L"]) -> Bool[np.ndarray, "R"]:
        """Return which rows break the limit; NaN breaks it."""
        return np.asarray(~(values <= self.most).all(axis=1))

    def describe(self) -> str:
        """Return the limit as text."""
        return f"'{self.name}' (info) is at most {_quantity(self.most, self.unit)}"


class Split(Config):
    """Episodes that are counted together.

    `task` is passed to the world's `reset(options={"task": ...})`. With goals of the logging policy, the policy acts
    for `goal_offset` steps from the start, and the frame that it reaches is the goal. Before the start, the policy acts
    for a number of steps sampled uniformly from 0 to `start_steps`, so that episodes start in the middle of its
    behaviour. A method that explores may act for `exploration` steps in each episode's world; then the world is reset
    to the start, and the method receives the goal. Other methods do not explore. `exploration_task` contains the task
    options that differ during exploration.
    """

    episodes: int = Field(default=100, ge=1)
    task: dict[str, Any] = Field(default_factory=dict)
    goal_offset: int | None = Field(default=None, ge=1)
    start_steps: int = Field(default=0, ge=0)
    exploration: int = Field(default=0, ge=0)
    exploration_task: dict[str, Any] = Field(default_factory=dict)


class Changes(TypedDict, total=False):
    """Conventions that `Protocol.customise` changes; None keeps a convention unchanged.

    `split` keeps only one split; `exploration` is the number of steps in each episode's world before a method receives
    the goal.
    """

    budget: int | None
    episodes: int | None
    seed: int | None
    env_kwargs: Mapping[str, Any] | None
    split: str | None
    exploration: int | None


class Protocol(Config):
    """How success is measured: the world, its starts and goals, the budget and the success rule.

    `goal_source` is the `world` or the `logged-policy`. In the latter case, the goal is the policy's frame after
    `goal_offset` steps from the same reset seed, so it is reachable. The budget is a number of environment steps, or a
    multiple of the shortest path if the world provides it. `min_distance` is the minimum distance between start and
    goal, as the success rule measures it; by default, logged goals are farther away than the rule's radius. With
    `count_solved`, logged goals that the start already satisfies are kept and count as successes, as is common in the
    field. With a `crossing`, logged pairs on one side of its line are skipped. The reset seeds of the episodes depend
    only on `seed`, the split, and the protocol's name and version; with `pairs_of`, this name replaces the protocol's
    own, so that protocols which differ in what they skip draw from the same pairs.
    Episodes that break one of the `limits` are counted, and continue. `pictures` says how the world's pictures are
    stored, if this is not clear from the observation space.
    """

    name: str
    version: int = Field(default=1, ge=1)
    env_id: str
    env_kwargs: dict[str, Any] = Field(default_factory=dict)
    pictures: PictureOptions | None = None
    goal_source: Literal["world", "logged-policy"] = "world"
    splits: dict[str, Split] = Field(min_length=1)
    policy: str = "directed-walk"
    policy_options: dict[str, Any] = Field(default_factory=dict)
    success: SuccessRule
    limits: tuple[Limit, ...] = ()
    min_distance: float | None = Field(default=None, ge=0)
    count_solved: bool = False
    crossing: Crossing | None = None
    pairs_of: str = ""
    budget: int | None = Field(default=None, ge=1)
    budget_over_shortest: float | None = Field(default=None, gt=0)
    frame_skip: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> "Protocol":
        if (self.budget is None) == (self.budget_over_shortest is None):
            raise ValueError(
                f"expected exactly one of 'budget' and 'budget_over_shortest'; got {self.budget} and "
                f"{self.budget_over_shortest}. Set one, and remove the other"
            )
        logged = self.goal_source == "logged-policy"
        for name, split in self.splits.items():
            if logged and (split.goal_offset is None or split.task):
                raise ValueError(
                    f"split {name!r} uses goals of the logging policy, which need a goal_offset and no task; got "
                    f"goal_offset {split.goal_offset} and task {split.task}. Set goal_offset, and remove task"
                )
            if not logged and (split.goal_offset is not None or split.start_steps):
                raise ValueError(
                    f"split {name!r} has goal_offset {split.goal_offset} and start_steps {split.start_steps}, which "
                    f"only goals of the logging policy use. Set goal_source 'logged-policy', or remove both"
                )
        if self.crossing is not None and not logged:
            raise ValueError(
                f"'crossing' needs goal_source 'logged-policy'; got {self.goal_source!r}. Change it, or remove "
                f"'crossing'"
            )
        if self.count_solved and (not logged or self.min_distance is not None or self.success.hold > 1):
            raise ValueError(
                f"'count_solved' needs goal_source 'logged-policy', no min_distance and hold 1; got "
                f"{self.goal_source!r}, min_distance {self.min_distance} and hold {self.success.hold}. Change these, "
                f"or remove 'count_solved'"
            )
        if logged and self.budget is None:
            raise ValueError(
                "'budget_over_shortest' needs the shortest path to the goal, which is unknown for goals of the logging "
                "policy; set 'budget' to a number of steps instead"
            )
        return self

    @property
    def title(self) -> str:
        """The name and version, such as `two-room@1`."""
        return f"{self.name}@{self.version}"

    @property
    def fingerprint(self) -> str:
        """A digest of every convention; it does not depend on the root seed, which only selects the episodes."""
        values = self.model_dump(mode="json", exclude={"seed"})
        # Later conventions are left out if they are off, so that older protocols keep their digests.
        for name in ("largest", "period", "also"):
            if not getattr(self.success, name):
                del values["success"][name]
        if self.success.hold == 1:
            del values["success"]["hold"]
        for condition in values["success"].get("also", ()):
            if not condition["symmetry"]:
                del condition["symmetry"]
        for name in ("count_solved", "limits", "pictures", "crossing", "pairs_of"):
            if not getattr(self, name):
                del values[name]
        for split in values["splits"].values():
            for name in ("start_steps", "exploration", "exploration_task"):
                if not split[name]:
                    del split[name]
        text = json.dumps(values, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def least_distance(self) -> float | None:
        """The minimum distance between start and goal, or None if there is no minimum."""
        logged = self.goal_source == "logged-policy" and not self.count_solved
        if self.min_distance is None and logged and self.success.source != "environment":
            return self.success.radius
        return self.min_distance

    def task(self, split: str) -> dict[str, Any]:
        """Return the task options for the world, `min_distance` included."""
        least = {} if self.min_distance is None else {"min_distance": self.min_distance}
        return {**least, **self.splits[split].task}

    def episode_seed(self, split: str, index: int) -> int:
        """Return the reset seed of one episode, from the stream "evaluation", which training never uses.

        The seed is below 2**31, so that every simulator accepts it and every JSON reader keeps it exactly.
        """
        name = self.pairs_of or self.name
        return derive_seed(self.seed, "evaluation", name, self.version, split, index) % 2**31

    def start_steps(self, split: str, index: int) -> int:
        """Return the number of steps for which the logging policy acts before the start of one episode."""
        most = self.splits[split].start_steps
        return derive_seed(self.episode_seed(split, index), "start") % (most + 1)

    @property
    def replays(self) -> bool:
        """Whether starts are reached by repeating the logging policy's actions."""
        return any(split.start_steps for split in self.splits.values())

    def customise(self, **changes: Unpack[Changes]) -> "Protocol":
        """Return the protocol with changed conventions; its name ends in "-custom", unless only the seed differs.

        Raises:
            ConfigError: a convention or the split does not exist, or a value is out of range.
        """
        for name in changes:
            if name not in Changes.__annotations__:
                raise ConfigError(f"unknown convention {name!r}; {nearest(name, Changes.__annotations__)}")
        values: dict[str, Any] = self.model_dump()
        given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
        if "split" in given:
            split = given["split"]
            if split not in self.splits:
                raise ConfigError(f"protocol {self.title} has no split {split!r}; {nearest(split, self.splits)}")
            values["splits"] = {split: values["splits"][split]}
        for each in values["splits"].values():
            each.update((name, given[name]) for name in ("episodes", "exploration") if name in given)
        if "budget" in given:
            values.update(budget=given["budget"], budget_over_shortest=None)
        values["env_kwargs"] |= given.get("env_kwargs", {})
        if Protocol.parse(values) != self and not self.name.endswith("-custom"):
            values["name"] = f"{self.name}-custom"
        return Protocol.parse({**values, "seed": given.get("seed", self.seed)})

    def describe(self) -> list[str]:
        """Return every convention as a line of text."""
        counts = ", ".join(f"{name} ({split.episodes} episodes)" for name, split in self.splits.items())
        arguments = f"with {_json(self.env_kwargs)}" if self.env_kwargs else "with its default arguments"
        if self.budget is not None:
            budget = f"{self.budget} environment steps"
        else:
            budget = f"{self.budget_over_shortest:g} times the fewest steps needed, as computed by the world"
        skip = (
            "none: the agent receives every frame and chooses every action"
            if self.frame_skip == 1
            else f"each action is repeated {self.frame_skip} times; the agent gets one frame in {self.frame_skip}"
        )
        return [
            f"Protocol: {self.title}, digest {self.fingerprint}.",
            f"World: {self.env_id}, {arguments}; all its randomness comes from the episode's seed.",
            f"Splits: {counts}.",
            *self._describe_goals(),
            f"Seeds: root {self.seed}; each episode's seed comes from the stream 'evaluation', which neither "
            f"collection nor training uses. All methods have the same starts and goals."
            + (f" The pairs are drawn in the order of {self.pairs_of}@{self.version}." if self.pairs_of else ""),
            f"Success: {self.success.describe()}. It counts at any step within the budget, including the start, and "
            f"ends the episode. Termination and truncation also end it.",
            *(
                f"Limit: {limit.describe()} at each step, including the start. An episode that breaks the limit counts "
                f"as a violation, whether or not it reaches the goal."
                for limit in self.limits
            ),
            *self._describe_exploration(),
            f"Budget: {budget}.",
            f"Frame skip: {skip}. A model's action block belongs to the method and is independent of the frame skip.",
            "Agent input: the observation and an observation of the goal; no info, no reward.",
            "Intervals: Wilson score intervals at 95%; episodes are treated as independent.",
            "Path length: SPL is the mean of success x shortest / max(taken, shortest) (Anderson et al. 2018). The "
            "ratio is steps taken / shortest, over successes. If success has a radius, an episode can take fewer steps "
            "than the shortest path to the goal itself.",
        ]

    def _describe_exploration(self) -> list[str]:
        steps = {name: split.exploration for name, split in self.splits.items() if split.exploration}
        if not steps:
            return []
        each = "; ".join(f"{name}: {count} steps" for name, count in steps.items())
        return [
            f"Exploration: before a method that explores receives the goal, it acts in each episode's world from the "
            f"start ({each}), with observations only. The world is then reset to the start. Other methods do not "
            f"explore."
            + "".join(
                f" During exploration, {_json(split.exploration_task)} overrides the task options of {name}."
                for name, split in self.splits.items()
                if split.exploration_task
            )
        ]

    def _describe_goals(self) -> list[str]:
        least = ""
        if self.least_distance is not None:
            least = f" Start and goal are more than {_quantity(self.least_distance, self.success.unit)} apart."
        if self.goal_source == "world":
            tasks = "; ".join(f"{name}: {_json(self.task(name))}" for name in self.splits)
            return [f"Starts and goals: the world samples them at reset from the task options {tasks}.{least}"]
        offsets = "; ".join(f"{name}: {split.goal_offset} steps" for name, split in self.splits.items())
        options = f" with {_json(self.policy_options)}" if self.policy_options else ""
        before = "; ".join(f"{name}: 0 to {split.start_steps}" for name, split in self.splits.items())
        lead = (
            f" first acts for a uniformly sampled number of steps ({before}) to reach the start. It then"
            if self.replays
            else ""
        )
        again = ", the actions up to the start are repeated," if self.replays else ""
        lines = (
            f"Starts and goals: the world is reset with the episode's seed. The logging policy "
            f"'{self.policy}'{options}{lead} acts ({offsets}, or fewer if the world ends the episode); the frame "
            f"that it reaches is the goal. The world is reset with the same seed{again} and the agent acts."
        )
        if self.min_distance is not None:
            lines += f"{least} Closer pairs are skipped, and the next seed is used."
        elif self.least_distance is not None:
            lines += " Goals that the start already satisfies are skipped, and the next seed is used."
        if self.crossing is not None:
            lines += f" In all pairs, {self.crossing.describe()}; others are skipped too."
        if self.count_solved:
            lines += (
                " Goals that the start already satisfies are included and count as successes, as in published figures; "
                "the report shows their number."
            )
        return [lines]


def _around(difference: np.ndarray, period: float | tuple[float, ...]) -> np.ndarray:
    """Return the differences; with a period, along the shorter arc of the circle."""
    if isinstance(period, tuple):
        columns = [_around(difference[..., index], each) for index, each in enumerate(period)]
        return np.stack(columns, axis=-1)
    return (difference + period / 2) % period - period / 2 if period else difference


def _cube_angle(values: Float[np.ndarray, "*rows 4"], goal: Float[np.ndarray, "*rows 4"]) -> Float[np.ndarray, "*rows"]:
    """Return the angle in radians of the smallest rotation from each orientation to the goal's, for a plain cube.

    Orientations are quaternions (w, x, y, z), which need not have length 1. A rotation by `2 acos(|w|)` becomes smaller
    if one of the cube's 24 rotations follows; the largest |w| of the 24 products is given by Grimmer, "Disorientations
    and coincidence rotations for cubic lattices" (1974).
    """
    tiny = np.finfo(np.float64).tiny
    first, second = (each / np.maximum(np.linalg.norm(each, axis=-1, keepdims=True), tiny) for each in (goal, values))
    (a, b, c, d), (w, x, y, z) = np.moveaxis(first, -1, 0), np.moveaxis(second, -1, 0)
    # The rotation between the two, conj(goal) * value, as absolute values in descending order.
    between = [
        a * w + b * x + c * y + d * z,
        a * x - b * w - c * z + d * y,
        a * y + b * z - c * w - d * x,
        a * z - b * y + c * x - d * w,
    ]
    e = np.sort(np.abs(np.stack(between)), axis=0)[::-1]
    largest = np.max([e[0], (e[0] + e[1]) / math.sqrt(2), e.sum(axis=0) / 2], axis=0)
    return np.asarray(2 * np.arccos(np.clip(largest, 0.0, 1.0)))


def _circle(period: float | tuple[float, ...]) -> str:
    if isinstance(period, tuple):
        return f" (around circles of {', '.join(f'{each:.4g}' for each in period)}; 0 is a line)" if any(period) else ""
    return f" (around a circle of {period:.4g})" if period else ""


def _quantity(value: float, unit: str) -> str:
    return f"{value:g} {unit}".rstrip()


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
