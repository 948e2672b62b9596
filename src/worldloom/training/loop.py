"""The training loop, for one or several devices. A resumed run gives the same result as an uninterrupted one."""

import copy
import functools
import logging
import math
import signal
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from worldloom.core.errors import CheckpointError, ConfigError, TrainingError
from worldloom.core.hardware import (
    choosable_threads,
    fastest_threads,
    retain_freed_memory,
    time_threads,
    use_threads,
)
from worldloom.core.progress import SILENT, Progress
from worldloom.core.seeds import derive_seed, numpy_generator, seeded_weights
from worldloom.core.types import Windows
from worldloom.data import (
    POSITIONS,
    Frames,
    SlidingPool,
    WindowSampler,
    compute_statistics,
    require_plausible,
    require_variation,
)
from worldloom.models import JEPA, JEPAConfig, alone, build_jepa, lay_like, save_model, whole
from worldloom.training.diagnostics import alarms, diagnose
from worldloom.training.learner import Learner
from worldloom.training.prefetch import prefetch
from worldloom.training.ranks import Ranks, make_fabric
from worldloom.training.run_folder import RunFolder
from worldloom.training.state import load_state, save_state, saved_steps
from worldloom.training.training_config import FREE, TrainingConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_logger = logging.getLogger(__name__)

_LEAST_MEASURED = 100  # steps; in a shorter training, measuring would take longer than it saves
_AHEAD = 8  # minimum number of batches whose frames are prefetched for a pool


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """The steps of a training run from `begin` (inclusive) to `end` (exclusive).

    `end` may exceed the configured steps. At step `begin`, the tensors in `base` replace the model's tensors of the
    same names; all other tensors, the losses' modules and the optimiser's moments do not change. An interrupted segment
    resumes at the step where it stopped. The learning rate is scheduled as if the segment began at step `at` (default:
    `begin`), so that a federation member that missed rounds has the same rate as the others. The schedule has
    `schedule` steps (default: `TrainingConfig.steps`). Model tensors named in `fixed` are not trained.
    """

    begin: int
    end: int
    base: Mapping[str, Tensor]
    at: int | None = None
    schedule: int | None = None
    fixed: Collection[str] = ()

    @property
    def shift(self) -> int:
        """The number of steps by which the schedule is ahead of training."""
        return 0 if self.at is None else self.at - self.begin


def fit(
    config: TrainingConfig,
    model_config: JEPAConfig,
    cache: Frames,
    run: RunFolder,
    *,
    fabric: "Fabric | None" = None,
    resume: bool = False,
    stretch: Segment | None = None,
    progress: Progress = SILENT,
) -> JEPA:
    """Train a world model on the frames of `cache`, save it in the run folder and return it in evaluation mode.

    The batch of step t depends only on (seed, t). A resumed run therefore gives the same parameters as an uninterrupted
    run on the same machine. A run on several devices gives the same parameters as a run on one device, up to rounding.
    For several devices, start the program with torchrun or pass a launched `fabric`.

    If `config.threads` is 0, a new run of at least 100 steps in one process on the CPU, without `compile`, measures at
    its start which number of threads is fastest, and records the number in the run folder. This number affects the
    parameters only by rounding.

    Federated training runs one segment, `stretch`, at a time: the first segment without `resume`, later segments with
    `resume`. The model is saved at the end of each segment.

    Raises:
        DataError: the observations never change, all actions are equal, or a value is absurd; see
            `worldloom.data.require_variation` and `require_plausible`.
        TrainingError: a loss is not finite (the last checkpoint is kept), another process is training in the folder,
            or the folder has checkpoints and `resume` is not set.
        CheckpointError: with `resume`, the configuration or the data changed; or the run's step is not in the segment.
        ConfigError: the number of processes does not match the configuration, or the processes have different settings
            or data.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint has been written; the message says how to resume.
    """
    retain_freed_memory()
    ranks = Ranks(fabric or make_fabric(config), config.timeout_minutes)
    progress = progress if ranks.first else SILENT
    stretch = stretch or Segment(begin=0, end=config.steps, base={})
    with run.lock(), use_threads(config.threads), ranks.watch():
        try:
            training = _Training(config, model_config, cache, run, ranks)
            if ranks.first and stretch.begin == 0:
                _warn_of_short_episodes(cache, config.horizon * model_config.block)
            return training.run(resume, stretch, progress)
        finally:
            run.close()


def held_out_losses(
    config: TrainingConfig, model_config: JEPAConfig, cache: Frames, run: RunFolder, base: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return each loss by name, and their weighted sum as `total`, on windows of held-out episodes.

    The model comes from the run's latest checkpoint; without a checkpoint, the model is untrained. The tensors of
    `base` then replace the model's tensors of the same names, so that several bases can be compared with one model.
    Latents are normalised by the statistics of these windows, as in training.

    Raises:
        CheckpointError: the base belongs to a different model, or the checkpoints to a different training run.
    """
    ranks = Ranks(make_fabric(config), config.timeout_minutes)
    with use_threads(config.threads):
        return _Training(config, model_config, cache, run, ranks).losses(base)


def _warn_of_short_episodes(cache: Frames, steps: int) -> None:
    short = int((cache.lengths < steps).sum())
    if short:
        _logger.warning(
            "of %d episodes %d are shorter than a window of %d steps and are not trained on; shorten the horizon or "
            "the block to use them",
            len(cache.lengths),
            short,
            steps,
        )


class _Training:
    def __init__(
        self, config: TrainingConfig, model_config: JEPAConfig, cache: Frames, run: RunFolder, ranks: Ranks
    ) -> None:
        fabric = ranks.fabric
        if config.batch % fabric.world_size:
            raise ConfigError(
                f"training.batch must be a multiple of the number of devices ({fabric.world_size}); got "
                f"{config.batch}. Change training.batch or training.devices"
            )
        self.config, self.folder, self.ranks, self.fabric = config, run, ranks, fabric
        sampling = {"context": model_config.context, "horizon": config.horizon, "block": model_config.block}
        training, validation = cache.split(config.validation_share, config.seed)
        self.cache, self.episodes = cache, training
        self.sampler = WindowSampler(cache, **sampling, episodes=training)
        self.order = None
        if config.pool_windows is not None:
            self.order = SlidingPool(len(self.sampler), config.pool_windows, seed=derive_seed(config.seed, "batches"))
        self.kept: list[Windows] | None = None
        self.expected: int | None = None  # the turn of the pool for which frames were last prefetched
        held_out = validation[cache.lengths[validation] >= config.horizon * model_config.block]
        if len(validation) and not len(held_out):
            _logger.warning(
                "none of the %d held-out episodes is long enough for a window, so the diagnostics use training "
                "episodes. Collect more or longer episodes, or shorten the horizon or the block",
                len(validation),
            )
        self.held_out_sampler = WindowSampler(cache, **sampling, episodes=held_out if len(held_out) else training)
        self.statistics = compute_statistics(cache, seed=config.seed, episodes=training)
        self.new_model = functools.partial(
            build_jepa,
            model_config,
            cache.spec.observation,
            cache.spec.action,
            self.statistics,
            seed=config.seed,
        )
        self.model = self.new_model()
        with seeded_weights(config.seed, "losses"):
            self.learner = Learner(self.model, config)
        if config.compile:
            self.model.encoder.compile()
            self.model.predictor.compile()
        self.identity = {
            "training": config.model_dump(mode="json", exclude=set(FREE)),
            "model": model_config.model_dump(mode="json"),
            "data": cache.fingerprint,
        }

    def _check_data(self) -> None:
        encoder = self.model.config.encoder
        sees = {"pixels", "vector"} if encoder is None else encoder.sees
        require_variation(self.cache, self.episodes, pixels="pixels" in sees, vector="vector" in sees)
        if "vector" in sees:
            require_plausible(self.cache, self.statistics)
        if self.config.symmetry is not None:
            self.config.symmetry.check(self.cache.spec)

    def run(self, resume: bool, stretch: Segment, progress: Progress) -> JEPA:
        config, fabric, last = self.config, self.fabric, stretch.end
        self.shift = stretch.shift
        self.schedule = config.model_copy(update={"steps": stretch.schedule or config.steps})
        self.fixed = [parameter for name, parameter in self.model.named_parameters() if name in stretch.fixed]
        self._choose_threads(last - stretch.begin, resume)
        wrapped = fabric.setup_module(self.learner)
        self.optimizer = self._optimizer()  # after the module's setup, because sharding replaces its parameters
        optimizer = fabric.setup_optimizers(self.optimizer)
        if not resume and saved_steps(self.folder):
            raise TrainingError(f"{self.folder.path} already has checkpoints; resume the run or choose another folder")
        done = load_state(self.folder, self.learner, self.optimizer, self.identity) if resume else 0
        self._begin(stretch, done)
        self.ranks.require_same({**self.identity, "steps done": done})
        if not done:
            self._check_data()
        if fabric.is_global_zero:
            self.folder.forget_after(done)
        meter = _FigureMeter(config.batch * (self.model.spec.context + config.horizon))
        pace = _Pace()
        with (
            _interrupts() as interrupted,
            prefetch(self._batch, range(done, last)) as next_batch,
            progress.task("training", last, "step") as task,
        ):
            task.advance(done)
            for step in range(done, last):
                with meter.phase("wait"):
                    windows = next_batch()
                figures = self._step(wrapped, optimizer, windows, step, meter)
                meter.add(figures)
                task.advance(1, loss=figures["loss"])
                finished = step + 1
                if finished % config.log_every == 0 or finished == last:
                    with meter.phase("log"):
                        pace.check(finished, meter.seconds_per_step)
                        self.folder.log(finished, {**meter.take(), "learning_rate": self._rate(step)})
                if finished % config.validate_every == 0 or finished == last:
                    with meter.phase("validate"):
                        self._validate(finished)
                stop = self.ranks.any(interrupted.is_set())
                if finished % config.checkpoint_every == 0 or finished == last or stop:
                    with meter.phase("checkpoint"):
                        state = (self.learner, self.optimizer, self.identity)
                        save_state(self.folder, finished, *state, write=fabric.is_global_zero)
                        self.ranks.wait()
                if stop and finished < last:
                    message = f"stopped after step {finished} of {last}; resume {self.folder.path} to continue"
                    _logger.warning(message)
                    raise KeyboardInterrupt(message)
        model = self._whole_model().eval()
        if fabric.is_global_zero:
            save_model(self.folder.model_directory, model, {"steps": last})
        self.ranks.wait()
        return model

    def _choose_threads(self, steps: int, resume: bool) -> None:
        """Set the number of CPU threads to the recorded number or, in a new run, to the fastest number."""
        one_cpu = self.fabric.world_size == 1 and self.fabric.device.type == "cpu"
        if self.config.threads or self.config.compile or not (one_cpu and choosable_threads()):
            return
        if not resume and steps >= _LEAST_MEASURED:
            windows, learner = self._batch(0), copy.deepcopy(self.learner).train()
            observations = windows.observations

            def work() -> None:
                with self.fabric.autocast():
                    total, _ = learner(observations.pixels, observations.vector, windows.actions, 0)
                total.backward()

            with torch.random.fork_rng(devices=[]):
                times = time_threads(work)
            self.folder.record_threads(fastest_threads(times), times)
        recorded = self.folder.threads
        if recorded is not None:
            torch.set_num_threads(min(recorded, choosable_threads()))

    def losses(self, base: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the losses on held-out windows with a base."""
        done = load_state(self.folder, self.learner, self._optimizer(), self.identity)
        self._put(base)
        learner = self.learner.to(self.fabric.device).train()
        _, windows = (part.to(self.fabric.device) for part in self._validation())
        observations = windows.observations
        with torch.no_grad():
            total, losses = learner(observations.pixels, observations.vector, windows.actions, done)
        return {"total": total.item(), **{name: loss.item() for name, loss in losses.items()}}

    def _optimizer(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            [parameter for parameter in self.learner.parameters() if parameter.requires_grad],
            lr=self.config.learning_rate,
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
            fused=self.fabric.device.type in ("cpu", "cuda"),
        )

    def _rate(self, step: int) -> float:
        return self.schedule.learning_rate_at(max(0, step + self.shift))

    def _begin(self, stretch: Segment, done: int) -> None:
        """Check that `done` is in the segment, and load the segment's base at its first step."""
        if not stretch.begin <= done <= stretch.end:
            raise CheckpointError(
                f"{self.folder.path} is at step {done}; expected a step from {stretch.begin} to {stretch.end}. Restore "
                f"the run's checkpoints, or start the segment at step {done}"
            )
        if done == stretch.begin:
            self._put(stretch.base)

    def _put(self, base: Mapping[str, Tensor]) -> None:
        """Replace the model's tensors that `base` names."""
        state = self.model.state_dict()
        if unknown := sorted(set(base) - set(state)):
            raise CheckpointError(
                f"the base has a tensor {unknown[0]!r}, but the model has no such tensor; use a base of the same model"
            )
        for name, tensor in base.items():
            if tensor.shape != state[name].shape:
                raise CheckpointError(
                    f"{name!r} of the base has shape {tuple(tensor.shape)}; expected {tuple(state[name].shape)}. Use a "
                    f"base of the same model"
                )
        with torch.no_grad():
            for name, tensor in base.items():
                state[name].copy_(lay_like(tensor, state[name]))

    def _step(
        self, wrapped: nn.Module, optimizer: Any, windows: Windows, step: int, meter: "_FigureMeter"
    ) -> dict[str, float]:
        """Make one optimiser step, or raise `TrainingError` if a figure is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(step)
        self.learner.train()
        with meter.phase("forward"):
            observations = windows.observations
            total, losses = wrapped(observations.pixels, observations.vector, windows.actions, step)
        with meter.phase("backward"):
            optimizer.zero_grad(set_to_none=True)
            self.fabric.backward(total)
            for parameter in self.fixed:
                parameter.grad = None  # the optimiser skips tensors without a gradient
            norm = self.fabric.clip_gradients(wrapped, optimizer, max_norm=self.config.clip, error_if_nonfinite=False)
            # One transfer for all figures, before the step, so that the parameters stay finite.
            assert norm is not None
            values = torch.stack([total, whole(norm), *losses.values()]).tolist()
        names = ["loss", "gradient_norm", *(f"loss/{name}" for name in losses)]
        figures = dict(zip(names, values, strict=True))
        if not all(math.isfinite(value) for value in values):
            raise TrainingError(self._not_finite(figures, step))
        with meter.phase("optimizer"):
            optimizer.step()
            self.learner.after_step()
        return figures

    def _not_finite(self, figures: Mapping[str, float], step: int) -> str:
        wrong = ", ".join(f"{name} = {value}" for name, value in figures.items() if not math.isfinite(value))
        return (
            f"training stopped at step {step}: {wrong}; all figures: {figures}. The last checkpoint is in "
            f"{self.folder.checkpoint_directory}. Lower training.learning_rate ({self.config.learning_rate}) or "
            f"training.clip ({self.config.clip}), or check the data with 'worldloom data validate'"
        )

    def _batch(self, step: int) -> Windows:
        """Sample the batch of all ranks and read this rank's part, so the data does not depend on the ranks."""
        if self.order is None:
            generator = numpy_generator(self.config.seed, "batch", step, 0)
            batch = generator.integers(len(self.sampler), size=self.config.batch)
        else:
            first = step * self.config.batch
            turn = self.order.turn(first)
            if turn != self.expected:  # prefetch the frames in the pool and those that come next
                self.expected = turn
                self.sampler.expect(self.order.coming(turn, _AHEAD * self.config.batch))
            batch = self.order.draws(first, self.config.batch)
        size = self.config.batch // self.fabric.world_size
        part = slice(self.fabric.global_rank * size, (self.fabric.global_rank + 1) * size)
        windows = self.sampler.at(batch[part])
        if self.config.symmetry is not None:
            positions = numpy_generator(self.config.seed, "positions", step).integers(POSITIONS, size=len(batch))
            action_size = self.cache.spec.action.size
            windows = self.config.symmetry.turn_windows(windows, positions[part], action_size=action_size)
        return windows.to(self.fabric.device)

    def _validate(self, step: int) -> None:
        """Log the diagnostics on held-out episodes and, in the second half of training, their alarms."""
        model = self._whole_model()
        if not self.fabric.is_global_zero:
            return
        model.eval()
        fitted, held_out = (windows.to(self.fabric.device) for windows in self._validation())
        with alone():
            figures = diagnose(model, fitted, held_out)
        found = alarms(figures) if 2 * step >= self.config.steps else []
        for alarm in found:
            _logger.warning("step %d: %s. What to change: %s", step, alarm.message, alarm.remedy)
        self.folder.log(step, {**figures, "alarms": len(found)})
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        self.folder.write_diagnostics({"step": step, "figures": finite, "alarms": [asdict(alarm) for alarm in found]})

    def _validation(self) -> list[Windows]:
        """Return the windows for the diagnostics, which are always the same."""
        if self.kept is not None:
            return self.kept
        drawn = [
            sampler.sample(self.config.validation_windows, numpy_generator(self.config.seed, "validation", name))
            for sampler, name in ((self.sampler, "fit"), (self.held_out_sampler, "held-out"))
        ]
        if self.order is not None:
            self.kept = drawn  # spread over all data, so reading them again would need as many chunks
        return drawn

    def _whole_model(self) -> JEPA:
        """Return the model, or a full copy of a sharded model; all ranks must call this method."""
        if self.config.strategy == "ddp":
            return self.model
        model = self.new_model()
        model.load_state_dict({name: whole(tensor) for name, tensor in self.model.state_dict().items()})
        return model.to(self.fabric.device)


class _FigureMeter:
    """Averages the figures between two logged steps, and measures the time of each phase."""

    def __init__(self, frames: int) -> None:
        self._frames = frames
        self._reset()

    def _reset(self) -> None:
        self._figures: list[dict[str, float]] = []
        self._seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def add(self, figures: dict[str, float]) -> None:
        self._figures.append(figures)

    @property
    def seconds_per_step(self) -> float:
        """The mean time of a step since the last `take`, without waiting, logging, validation and checkpoints."""
        return sum(self._seconds[name] for name in ("forward", "backward", "optimizer")) / len(self._figures)

    def take(self) -> dict[str, float]:
        """Return the means, the encoded frames per second and each phase's share of the time; then reset."""
        seconds = time.perf_counter() - self._start
        means = {name: float(np.mean([step[name] for step in self._figures])) for name in self._figures[-1]}
        shares = {f"time/{name}": spent / seconds for name, spent in self._seconds.items()}
        rate = self._frames * len(self._figures) / seconds
        self._reset()
        return {**means, "frames_per_second": rate, **shares}


class _Pace:
    """Warns when training has become much slower than it was."""

    _SLOW, _PATIENCE = 2.0, 3  # slow: this many times the fastest interval; this many intervals in a row

    def __init__(self) -> None:
        self._best, self._slow = math.inf, 0

    def check(self, step: int, seconds: float) -> None:
        """Take the mean time of a step in the last interval; warn once for each slow period."""
        self._best = min(self._best, seconds)
        self._slow = self._slow + 1 if seconds > self._SLOW * self._best else 0
        if self._slow != self._PATIENCE:
            return
        threads = torch.get_num_threads()
        remedy = (
            ""
            if threads == 1
            else (" Other processes slow a single thread less: press Ctrl-C once, and resume with --threads 1")
        )
        _logger.warning(
            "step %d: a training step takes %.0f ms, but it took %.0f ms before. Other processes probably use the CPU; "
            "end them, or let training continue more slowly.%s",
            step, 1e3 * seconds, 1e3 * self._best, remedy,
        )  # fmt: skip


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that the current step completes; a second Ctrl-C stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.getsignal(signal.SIGINT) or signal.SIG_DFL

    def handle(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
