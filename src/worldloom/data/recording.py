"""Recording of one batch of episodes from a vectorised environment."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from worldloom.core.errors import DataError, EnvironmentFailure
from worldloom.core.progress import ProgressTask
from worldloom.core.registry import nearest
from worldloom.core.seams import Policy, SeeingPolicy
from worldloom.core.types import ActionSpec, Episode, Observations
from worldloom.data.policies import infos_for
from worldloom.envs import VectorWorld

_log = logging.getLogger(__name__)

_LARGEST_LABEL = 256  # values; larger info columns are pictures or maps, kept only if they are requested


class RecordingBatch:
    """A recorder of the episodes with these `numbers`. Every recorded frame is complete, even after an interrupt."""

    def __init__(self, world: VectorWorld, numbers: range, steps: int, labels: Mapping[str, int | None] | None) -> None:
        self._world, self._numbers, self._steps, self._wanted = world, numbers, steps, labels
        size, pixels, vector = len(numbers), world.observation.pixels, world.observation.vector
        self._pixels = None if pixels is None else np.empty((size, steps + 1, *pixels), np.uint8)
        self._vector = np.empty((size, steps + 1, vector), np.float32) if vector else None
        self._actions = np.empty((size, steps, world.action.size), np.float32)
        self._labels: dict[str, np.ndarray] = {}
        self._left_out: set[str] = set()  # infos that were found not to be in every frame
        self._frames = np.zeros(size, np.int64)  # complete frames of each episode
        self._ended = np.zeros(size, bool)
        self._terminated = np.zeros(size, bool)
        self._step = 0

    def run(
        self, policy: Policy, seeds: list[int], generators: list[np.random.Generator], name: str, task: ProgressTask
    ) -> None:
        """Record until every episode has ended or has its full number of steps.

        Raises:
            EnvironmentFailure: the environment failed; the message gives the episode and the step.
            DataError: the policy `name` failed or returned an action out of bounds, or a requested label is missing.
            ConfigError: the environment lacks an info that the policy needs.
        """
        rows = np.arange(len(self._numbers))
        frame = self._world.reset(seeds, self._where)
        observations, labels = frame.observations, self._world.labels(frame)
        self._begin(labels)
        self._add(rows, observations, labels)
        task.advance(len(rows))
        policy.reset(generators)
        latest = observations.map(lambda part: part.clone())
        infos = infos_for(policy, frame, name)
        while self._step < self._steps and len(rows):
            self._step += 1
            actions = self._actions_of(policy, latest, infos, name)
            frame = self._world.step(actions, rows, by=f"policy {name!r}, ")
            observations = frame.observations
            self._actions[rows, self._step - 1] = _as_stored(actions[rows], self._world.action)
            self._add(rows, observations, self._world.labels(frame))
            task.advance(len(rows))
            self._terminated[rows], self._ended[rows] = frame.terminated, frame.over
            for whole, part in ((latest.pixels, observations.pixels), (latest.vector, observations.vector)):
                if whole is not None and part is not None:
                    whole[rows] = part
            for info, values in infos_for(policy, frame, name).items():
                infos[info][rows] = values
            rows = rows[~frame.over]

    def _actions_of(
        self, policy: Policy, latest: Observations, infos: Mapping[str, np.ndarray], name: str
    ) -> np.ndarray:
        try:
            if isinstance(policy, SeeingPolicy):
                policy.see(infos)
            return np.array(policy.act(latest), np.float32)
        except Exception as error:
            raise DataError(
                f"policy {name!r}, {self._where(None)}raised {type(error).__name__}: {error}. Repair the policy"
            ) from error

    def episodes(self, seeds: list[int], policy: str, truncated_by: str | None = None) -> list[Episode]:
        """Return the recorded episodes with at least two frames; the metadata of unfinished ones get `truncated_by`."""
        found = []
        for row, number in enumerate(self._numbers):
            frames = int(self._frames[row])
            if frames < 2:
                continue
            metadata: dict[str, Any] = {
                "episode": number,
                "seed": seeds[row],
                "policy": policy,
                "terminated": bool(self._terminated[row]),
            }
            if truncated_by is not None and not self._ended[row]:
                metadata["truncated_by"] = truncated_by
            found.append(
                Episode(
                    pixels=None if self._pixels is None else self._pixels[row, :frames],
                    vector=None if self._vector is None else self._vector[row, :frames],
                    actions=self._actions[row, : frames - 1],
                    labels={name: column[row, :frames] for name, column in self._labels.items()},
                    metadata=metadata,
                )
            )
        return found

    @property
    def labels(self) -> dict[str, int]:
        """The size of each label column."""
        return {name: column.shape[2] for name, column in sorted(self._labels.items())}

    def _where(self, row: int | None) -> str:
        first, last = self._numbers[0], self._numbers[-1]
        if row is not None:
            place = f"episode {self._numbers[row]}"
        else:
            place = f"episode {first}" if first == last else f"episodes {first} to {last}"
        return f"{place}, step {self._step}: "

    def _begin(self, labels: Mapping[str, np.ndarray]) -> None:
        """Choose the label columns from the infos of the reset."""
        if self._wanted is None:
            names = [name for name, column in labels.items() if column.shape[1] <= _LARGEST_LABEL]
        else:
            names = list(self._wanted)
            for name in names:
                if name not in labels:
                    raise DataError(
                        f"label {name!r} is not one of the numeric infos that {self._world.id!r} returns on reset; "
                        f"{nearest(name, labels)}"
                    )
        self._labels = {
            name: np.empty((len(self._numbers), self._steps + 1, labels[name].shape[1]), np.float32) for name in names
        }

    def _add(self, rows: Int64[np.ndarray, "R"], observations: Observations, labels: Mapping[str, np.ndarray]) -> None:
        for name in list(self._labels):
            store, column = self._labels[name], labels.get(name)
            expected = None if self._wanted is None else self._wanted[name]
            if column is None or column.shape[1] != (expected or store.shape[2]):
                if self._wanted is None:
                    del self._labels[name]
                    self._leave_out([name], "missing or has a different size than before")
                    continue
                raise EnvironmentFailure(
                    f"{self._where(None)}info {name!r} is missing or has a different size than before. Repair the "
                    f"environment, or leave {name!r} out of the labels"
                )
            finite = np.isfinite(column).all(axis=1)
            if not finite.all():
                row = int(rows[np.flatnonzero(~finite)[0]])
                raise EnvironmentFailure(
                    f"{self._where(row)}info {name!r} is not finite: {column[~finite][0]}. Repair the environment, or "
                    f"leave {name!r} out of the labels"
                )
            store[rows, self._step] = column
        if self._wanted is None:
            small = [name for name, column in labels.items() if column.shape[1] <= _LARGEST_LABEL]
            self._leave_out(
                [name for name in small if name not in self._labels.keys() | self._left_out], "missing on reset"
            )
        if self._pixels is not None and observations.pixels is not None:
            self._pixels[rows, self._step] = observations.pixels.numpy()
        if self._vector is not None and observations.vector is not None:
            self._vector[rows, self._step] = observations.vector.numpy()
        self._frames[rows] = self._step + 1  # last, because the frame counts as complete from here on

    def _leave_out(self, names: list[str], why: str) -> None:
        """Warn that numeric infos are not stored as labels."""
        self._left_out.update(names)
        if names:
            _log.warning(
                "%sinfo %s is %s, and is not stored as a label. Repair the environment if it should return this info "
                "in every frame",
                self._where(None),
                ", ".join(map(repr, names)),
                why,
            )


def _as_stored(actions: Float32[np.ndarray, "R A"], spec: ActionSpec) -> Float32[np.ndarray, "R A"]:
    """Return the actions that the environment applied: clipped to the bounds, or one-hot for discrete choices."""
    if spec.discrete:
        one_hot: np.ndarray = np.eye(spec.size, dtype=np.float32)[actions.argmax(axis=1)]
        return one_hot
    clipped: np.ndarray = np.clip(actions, np.array(spec.low, np.float32), np.array(spec.high, np.float32))
    return clipped
