"""An owner's training of the shared model on its own frames, with `worldloom.training.fit`."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from worldloom.core.config import Shape, check_shape
from worldloom.core.errors import ConfigError
from worldloom.core.files import read_json, write_json
from worldloom.core.progress import SILENT, Progress
from worldloom.data import DatasetSpec, Frames, Statistics
from worldloom.federation.rounds.base import Base
from worldloom.federation.rules.partition import PartitionConfig
from worldloom.models import JEPA, JEPAConfig, PixelNormalisation, Standardise, build_jepa
from worldloom.training import RunFolder, Segment, TrainingConfig, fit, held_out_losses, saved_steps


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """The result of training from a base: the shared tensors before and after, the steps, and the number of frames.

    `frames` counts each frame of the training episodes once, however often training used the frame.
    """

    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]
    steps: int
    frames: int


class _Stretch(Shape):
    """The content of `segment.json`: the segment that was begun last, from step `begin` to step `end` of the run.

    If it `continues` the segment before it, it begins from the state of the run, not from the base.
    """

    name: str
    base: str
    begin: int
    end: int
    continues: bool


class LocalTraining:
    """The training of one owner, in its own run folder.

    Training proceeds in segments, each with a name and a base. A repeated call with the same name and base resumes the
    segment, or returns its result if it is finished. A call with the same name and another base begins a new segment
    from the run's current state. Sovereign parts (the sovereign tensors of `partition`, the optimiser's moments, the
    modules of the losses) stay in the folder.
    """

    def __init__(
        self,
        run: RunFolder,
        frames: Frames,
        *,
        training: TrainingConfig,
        model: JEPAConfig,
        partition: PartitionConfig,
        progress: Progress = SILENT,
    ) -> None:
        self.run, self.frames, self.training, self.model = run, frames, training, model
        self.partition, self._progress = partition, progress
        self._segment, self._aligned = run.path / "segment.json", run.path / "aligned.json"

    def train(
        self,
        name: str,
        base: Base,
        steps: int,
        *,
        at: int | None = None,
        schedule: int | None = None,
        frozen: bool = False,
    ) -> Trained:
        """Train for some steps from a base, which must contain exactly the shared tensors; return the result.

        `at` is the step of the learning-rate schedule at which the segment begins, by default the run's current step.
        `schedule` is the schedule's length in steps. With `frozen` the shared tensors are not trained.

        Raises:
            CheckpointError: the base belongs to a different model.
            TrainingError: see `worldloom.training.fit`.
        """
        segment = self._read_segment()
        if segment is None or (segment.name, segment.base) != (name, base.fingerprint):
            segment = self._begin(name, base, steps)
        return self._resume(segment, base, at, schedule, frozen=base.tensors if frozen else ())

    def fine_tune(self, name: str, base: Base, steps: int, *, frozen: bool = False) -> None:
        """Train a base for some steps for the owner's own use, while the learning rate falls to 0.

        The learning rate follows the last `steps` of the shared schedule. If that schedule has fewer steps, the
        learning rate follows a complete schedule of `steps`.

        Raises:
            CheckpointError, TrainingError: see `train`.
        """
        whole = max(self.training.steps, steps)
        self.train(name, base, steps, at=whole - steps, schedule=whole, frozen=frozen)

    def align(self, base: Base, steps: int) -> None:
        """Train the sovereign tensors against a frozen base; a second call does nothing.

        Models that each learned their owner's conventions cannot be averaged; aligned models can.

        Raises:
            CheckpointError, TrainingError: see `train`.
        """
        if not self._aligned.is_file():
            self.train("align", base, steps, at=0, frozen=True)
            write_json(self._aligned, {"base": base.fingerprint, "steps": steps})

    def pilot(self, base: Base, steps: int) -> Base:
        """Train for some steps from an untrained base, and return the trained base.

        This owner then counts as aligned to the trained base. Shared statistics are measured on this owner's frames.

        Raises:
            CheckpointError, TrainingError: see `train`.
        """
        made = Base.of(self.train("pilot", self.without_statistics(base), steps).after, what="the pilot's base")
        write_json(self._aligned, {"base": made.fingerprint, "steps": steps})
        return made

    def train_alone(self, name: str, base: Base, steps: int, *, at: int | None = None) -> None:
        """Train for some steps from a base, or continue if the current state was trained from that base.

        Each call trains for more steps, or resumes an interrupted segment.

        Raises:
            CheckpointError, TrainingError: see `train`.
        """
        segment = self._read_segment()
        if segment is None or segment.name != name or self._steps() >= segment.end:
            continues = segment is not None and segment.base == base.fingerprint
            segment = self._begin(name, base, steps, continues=continues)
        self._resume(segment, base, at)

    def judge(self, base: Base) -> dict[str, float]:
        """Return the losses of a base, with this owner's sovereign tensors, on held-out episodes."""
        return held_out_losses(self.training, self.model, self.frames, self.run, base.tensors)

    def untrained(self, seed: int) -> Base:
        """Return the untrained base of this model; see `initial_base`."""
        return initial_base(self.model, self.frames.spec, self.partition, seed=seed)

    @cached_property
    def like(self) -> Mapping[str, Tensor]:
        """The shared tensors of this model on the meta device: the names, shapes and dtypes of a base."""
        return {name: tensor.to("meta") for name, tensor in self.untrained(seed=0).tensors.items()}

    @cached_property
    def shared_statistics(self) -> tuple[str, ...]:
        """The names of the statistics that the partition shares; by default there are none."""
        return _shared_statistics(self.model, self.frames.spec, self.partition)

    def without_statistics(self, base: Base) -> Base:
        """Return a base without its shared statistics; the run's own statistics are used instead."""
        if not self.shared_statistics:
            return base
        return Base.of({name: tensor for name, tensor in base.tensors.items() if name not in self.shared_statistics})

    def _read_segment(self) -> _Stretch | None:
        return check_shape(read_json(self._segment), _Stretch, self._segment) if self._segment.is_file() else None

    def _begin(self, name: str, base: Base, steps: int, *, continues: bool = False) -> _Stretch:
        begin = self._steps()
        segment = _Stretch(
            name=name, base=base.fingerprint, begin=begin, end=begin + steps, continues=continues
        )  # fmt: skip
        write_json(self._segment, segment.model_dump())
        return segment

    def _resume(
        self,
        segment: _Stretch,
        base: Base,
        at: int | None,
        schedule: int | None = None,
        *,
        frozen: Collection[str] = (),
    ) -> Trained:
        resume = self.run.checkpoint_directory.is_dir()
        put = {} if segment.continues else dict(base.tensors)
        if resume:
            # Shared statistics stay as in the first base: if another member changes them, this delta reverses that.
            put = {name: tensor for name, tensor in put.items() if name not in self.shared_statistics}
        stretch = Segment(begin=segment.begin, end=segment.end, base=put, at=at, schedule=schedule, fixed=frozen)
        model = fit(
            self.training, self.model, self.frames, self.run, resume=resume, stretch=stretch, progress=self._progress
        )
        drawn_from, _ = self.frames.split(self.training.validation_share, self.training.seed)
        return Trained(
            before=base.tensors,
            after=self.partition.split(state := model.state_dict()).shared_of(state),
            steps=segment.end - segment.begin,
            frames=int((self.frames.lengths[drawn_from] + 1).sum()),
        )

    def _steps(self) -> int:
        return max(saved_steps(self.run), default=0)


def initial_base(model: JEPAConfig, spec: DatasetSpec, partition: PartitionConfig, *, seed: int) -> Base:
    """Return the shared part of an untrained model; it depends only on the frames' shapes and the seed, not on data.

    Shared statistics have placeholder values until a pilot measures them; see `check_has_a_pilot`.
    """
    state = _untrained(model, spec, seed).state_dict()
    return Base.of(partition.split(state).shared_of(state), what="the initial base")


def _shared_statistics(model: JEPAConfig, spec: DatasetSpec, partition: PartitionConfig) -> tuple[str, ...]:
    """Return the names of the shared tensors that are measured on data, not trained.

    Owners with data of the same world may share them, so that all normalise their data in the same way.
    """
    untrained = _untrained(model, spec, 0)
    measured = {
        f"{where}.{name}"
        for where, module in untrained.named_modules()
        if isinstance(module, PixelNormalisation | Standardise)
        for name, _ in module.named_buffers()
    }
    return tuple(name for name in partition.split(untrained.state_dict()).shared if name in measured)


def check_has_a_pilot(model: JEPAConfig, spec: DatasetSpec, partition: PartitionConfig) -> None:
    """Check that a consortium with an untrained initial base shares no statistics, which that base could not contain.

    Raises:
        ConfigError: the partition shares statistics; the message names one.
    """
    if shared := _shared_statistics(model, spec, partition):
        raise ConfigError(
            f"the shared tensor {shared[0]!r} is a statistic that is measured on data, but the initial base is "
            f"untrained and has no measured values. Let one owner train the initial base ('worldloom weave pilot'), "
            f"or keep the tensor local: add it to partition.sovereign"
        )


def _untrained(model: JEPAConfig, spec: DatasetSpec, seed: int) -> JEPA:
    unit = Statistics.unit(spec.observation, spec.action)
    return build_jepa(model, spec.observation, spec.action, unit, seed=seed)
