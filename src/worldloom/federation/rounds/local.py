"""What an owner trains the shared model on: its own frames and its own state, by the same `fit` as everywhere."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from worldloom.core.errors import ConfigError
from worldloom.core.files import read_json, write_json
from worldloom.core.progress import SILENT, Progress
from worldloom.data import DatasetSpec, Frames, Statistics
from worldloom.federation.rules.partition import PartitionConfig, fingerprint
from worldloom.models import JEPA, JEPAConfig, PixelNormalisation, Standardise, build_jepa
from worldloom.training import RunFolder, Segment, TrainingConfig, fit, held_out_losses, saved_steps


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """What a stretch of training made of a base: the shared part before and after, its steps, and of how many frames.

    `frames` counts those that training may draw from, each once: what an owner has, not how often it was looked at.
    """

    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]
    steps: int
    frames: int


class LocalTraining:
    """The training of one owner, in a run folder of its own.

    A stretch is known by its name and its base: asked for again, it goes on where it was, or answers what it made. With
    another base under the same name it begins anew, from the state that stands. What is sovereign (the parts that
    `partition` says, the optimiser's moments, the modules of the losses) stays in the folder.
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
        self._where, self._aligned = run.path / "stretch.json", run.path / "aligned.json"

    def stretch(
        self,
        name: str,
        base: Mapping[str, Tensor],
        steps: int,
        *,
        at: int | None = None,
        schedule: int | None = None,
        fixed: bool = False,
    ) -> Trained:
        """Train so many steps from a base; its tensors are exactly the shared part.

        `at` is the step of the schedule that it begins at, by default the training's own, and `schedule` of how many
        steps that is. With `fixed` the base does not move.

        Raises:
            CheckpointError: the base is of another model.
            TrainingError: see `worldloom.training.fit`.
        """
        known, here = fingerprint(base), self._here()
        if (here.get("name"), here.get("base")) != (name, known):
            here = self._begin(name, known, steps)
        return self._go_on(here, base, at, schedule, fixed=base if fixed else ())

    def settle(self, name: str, base: Mapping[str, Tensor], steps: int, *, fixed: bool = False) -> None:
        """Train a base at home for so many steps, in which the learning rate falls to 0.

        They are the last of a training as long as the shared one, or, where they are more, a whole one by themselves.

        Raises:
            CheckpointError, TrainingError: see `stretch`.
        """
        whole = max(self.training.steps, steps)
        self.stretch(name, base, steps, at=whole - steps, schedule=whole, fixed=fixed)

    def align(self, base: Mapping[str, Tensor], steps: int) -> None:
        """Let what is sovereign learn to meet a base, which does not move; nothing happens the second time.

        Averages of models that each learned its owner's conventions are of no use; of those that learned one, they are.

        Raises:
            CheckpointError, TrainingError: see `stretch`.
        """
        if not self._aligned.is_file():
            self.stretch("align", base, steps, at=0, fixed=True)
            write_json(self._aligned, {"base": fingerprint(base), "steps": steps})

    def pilot(self, base: Mapping[str, Tensor], steps: int) -> dict[str, Tensor]:
        """Train so many steps from an untrained base, and return it: what is sovereign here meets it from the first.

        Statistics that are shared are those of this owner's frames.

        Raises:
            CheckpointError, TrainingError: see `stretch`.
        """
        made = self.stretch("pilot", self.without_statistics(base), steps)
        write_json(self._aligned, {"base": fingerprint(made.after), "steps": steps})
        return dict(made.after)

    def alone(self, name: str, base: Mapping[str, Tensor], steps: int, *, at: int | None = None) -> None:
        """Train so many steps from a base, or on from what stands if that is what was made of it.

        Called again, it trains so many more, or goes on where it was.

        Raises:
            CheckpointError, TrainingError: see `stretch`.
        """
        known, here = fingerprint(base), self._here()
        if here.get("name") != name or self._stands() >= here["end"]:
            here = self._begin(name, known, steps, goes_on=here.get("base") == known)
        self._go_on(here, base, at)

    @cached_property
    def shared_statistics(self) -> tuple[str, ...]:
        """The statistics that the partition shares; usually there are none."""
        return _shared_statistics(self.model, self.frames.spec, self.partition)

    def without_statistics(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what of a base is trained: beside it stand the statistics of the run, at first of its own frames."""
        return {name: tensor for name, tensor in base.items() if name not in self.shared_statistics}

    def _here(self) -> dict[str, Any]:
        return dict(read_json(self._where)) if self._where.is_file() else {}

    def _begin(self, name: str, base: str, steps: int, *, goes_on: bool = False) -> dict[str, Any]:
        begin = self._stands()
        here = {"name": name, "base": base, "begin": begin, "end": begin + steps, "goes_on": goes_on}
        write_json(self._where, here)
        return here

    def _go_on(
        self,
        here: Mapping[str, Any],
        base: Mapping[str, Tensor],
        at: int | None,
        schedule: int | None = None,
        *,
        fixed: Collection[str] = (),
    ) -> Trained:
        resume = self.run.checkpoint_directory.is_dir()
        put = {} if here.get("goes_on") else dict(base)
        if resume:
            # Scales stay as the first base had them: where somebody moved them since, the delta sent moves them back.
            put = self.without_statistics(put)
        stretch = Segment(begin=here["begin"], end=here["end"], base=put, at=at, schedule=schedule, fixed=fixed)
        model = fit(
            self.training, self.model, self.frames, self.run, resume=resume, stretch=stretch, progress=self._progress
        )
        state = model.state_dict()
        partition = self.partition.split(state)
        drawn_from, _ = self.frames.split(self.training.validation_share, self.training.seed)
        frames = int((self.frames.lengths[drawn_from] + 1).sum())
        steps = here["end"] - here["begin"]
        return Trained(before=dict(base), after=partition.shared_of(state), steps=steps, frames=frames)

    def judge(self, base: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the losses of a base, beside what is sovereign here, on episodes that no training sees."""
        return held_out_losses(self.training, self.model, self.frames, self.run, base)

    def _stands(self) -> int:
        return max(saved_steps(self.run), default=0)


def initial_base(model: JEPAConfig, spec: DatasetSpec, partition: PartitionConfig, *, seed: int) -> dict[str, Tensor]:
    """Return the shared part of an untrained model: it depends on the shapes of frames and the seed, on no data.

    Statistics that are shared are units, and of no use: only a pilot can measure them (`check_has_a_pilot`).
    """
    state = _untrained(model, spec, seed).state_dict()
    return partition.split(state).shared_of(state)


def _shared_statistics(model: JEPAConfig, spec: DatasetSpec, partition: PartitionConfig) -> tuple[str, ...]:
    """Return the names of the tensors that a partition shares and that are measured on data, not trained.

    Owners of shards of one world may share them, for else each looks at it through scales of its own.
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
    """Refuse a consortium that shares statistics and begins with an untrained base.

    Raises:
        ConfigError: it names one of the statistics.
    """
    if shared := _shared_statistics(model, spec, partition):
        raise ConfigError(
            f"partition.shared matches {shared[0]!r}, which is measured on data, and an untrained base has seen none; "
            f"begin with what a pilot made (worldloom weave pilot), or name it in partition.sovereign"
        )


def _untrained(model: JEPAConfig, spec: DatasetSpec, seed: int) -> JEPA:
    unit = Statistics.unit(spec.observation, spec.action)
    return build_jepa(model, spec.observation, spec.action, unit, seed=seed)
