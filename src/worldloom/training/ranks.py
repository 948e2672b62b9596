"""The processes of a training run, one per device: launch, synchronisation and failures."""

import atexit
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from worldloom.core.errors import ConfigError, TrainingError, WorldloomError
from worldloom.core.processes import on_this_machine, world
from worldloom.core.seeds import derive_seed
from worldloom.models import Block
from worldloom.training.training_config import TrainingConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric  # imported where it is used: it takes a second to load

T = TypeVar("T")


def make_fabric(config: TrainingConfig) -> "Fabric":
    """Create and launch the `Fabric` that `config` describes.

    Raises:
        ConfigError: torchrun did not start one process per device, or this machine does not support a setting.
    """
    launched = distributed.is_torchelastic_launched()
    if (world() if launched else 1) != config.devices:
        came = f"torchrun started {world()} processes" if launched else "the program was not started with torchrun"
        raise ConfigError(
            f"training.devices is {config.devices}, but {came}; start the program with torchrun so that there is "
            f"one process per device (on one machine: torchrun --nproc-per-node {config.devices}), or change "
            f"training.devices"
        )
    if config.strategy == "fsdp" and (config.devices == 1 or config.compile):
        what = "needs several devices" if config.devices == 1 else "does not support training.compile"
        raise ConfigError(
            f"training.strategy is fsdp, which {what}; set training.strategy to ddp, or use several devices without "
            f"training.compile"
        )
    _check_machine(config)
    from lightning_fabric import Fabric

    if config.devices == 1:
        fabric = Fabric(accelerator=config.accelerator, devices=1, precision=config.precision)
    else:
        from lightning_fabric.strategies.ddp import DDPStrategy
        from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

        local = on_this_machine()
        timeout = timedelta(minutes=config.timeout_minutes)
        fabric = Fabric(
            accelerator=config.accelerator,
            devices=local,
            num_nodes=config.devices // local,
            strategy=DDPStrategy(**_no_buffers(), timeout=timeout)
            if config.strategy == "ddp"
            else ModelParallelStrategy(
                _shard, data_parallel_size=config.devices, tensor_parallel_size=1, timeout=timeout
            ),
            precision=config.precision,
        )
    fabric.launch()
    atexit.register(_leave)
    return fabric


def _leave() -> None:
    """End the communication threads. Without this, they would abort the process when it exits."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _shard(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard the transformer blocks one by one, so that only one block is unsharded at a time, and the rest together."""
    from torch.distributed.fsdp import fully_shard

    data_parallel = mesh["data_parallel"]
    for block in [part for part in module.modules() if isinstance(part, Block)]:
        fully_shard(block, mesh=data_parallel)
    fully_shard(module, mesh=data_parallel)
    return module


def _check_machine(config: TrainingConfig) -> None:
    """Raise `ConfigError` for settings that this machine does not support, before anything is read or compiled."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name in there if there[name]) if config.accelerator == "auto" else config.accelerator
    if not there[device]:
        raise ConfigError(
            f"training.accelerator is {device!r}, but PyTorch finds no such device; set training.accelerator to auto "
            f"or cpu, or install the driver and a PyTorch build for this device"
        )
    if config.precision == "16-mixed" and device == "cpu":
        raise ConfigError("training.precision is 16-mixed, which needs a GPU; use bf16-mixed or 32-true on a CPU")
    if config.precision == "bf16-mixed" and device == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("training.precision is bf16-mixed, which this GPU does not support; use 16-mixed or 32-true")
    compilers = [os.environ.get("CXX", "g++"), "clang++", "c++"]
    if config.compile and device == "cpu" and not any(shutil.which(name) for name in compilers):
        raise ConfigError(
            f"training.compile needs a C++ compiler, but none of {', '.join(compilers)} is on PATH; install a compiler "
            f"(apt install g++), or set training.compile to false"
        )


def _no_buffers() -> dict[str, Any]:
    """Return options that disable the exchange of buffers, because all ranks compute the same running statistics."""
    names = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}


class Ranks:
    """The processes of a Fabric, with synchronisation between them; a single process never waits.

    A rank that fails raises its error at once, which ends its process and torchrun. Ranks that wait for this rank raise
    `TrainingError` within `timeout_minutes`.
    """

    def __init__(self, fabric: "Fabric", timeout_minutes: float) -> None:
        self.fabric = fabric
        self.rank, self.count = fabric.global_rank, fabric.world_size
        self.first, self.first_here = self.rank == 0, fabric.local_rank == 0
        # Ranks wait with Gloo, which does not keep a GPU busy and detects processes that have ended.
        timeout = timedelta(minutes=timeout_minutes)
        self._group = distributed.new_group(backend="gloo", timeout=timeout) if self.count > 1 else None
        self._timeout_minutes = timeout_minutes

    def wait(self) -> None:
        """Wait until all ranks call this method.

        Raises:
            TrainingError: a rank has ended, or did not call this method within the timeout.
        """
        self.any(False)

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is True on any rank."""
        return bool(self._most(int(flag)))

    def _most(self, number: int) -> int:
        """Return the maximum over all ranks."""
        if self._group is None:
            return number
        numbers = torch.tensor([number])
        with self.watch():
            distributed.all_reduce(numbers, distributed.ReduceOp.MAX, group=self._group)
        return int(numbers.item())

    def in_turn(self, work: Callable[[], T], *, ahead: bool) -> T:
        """Run `work` on every rank, first on the ranks with `ahead` and then on the others; return its result.

        Raises:
            TrainingError: `work` failed on another rank with `ahead`. The error has the exit code of that rank's error,
                so that torchrun reports the same code whichever process ends first.
        """
        failure: WorldloomError | None = None
        if ahead:
            try:
                result = work()
            except WorldloomError as error:
                failure = error
        code = self._most(failure.exit_code if failure else 0)
        if failure:
            raise failure
        if code:
            other = TrainingError(
                f"rank {self.rank} stops because another process failed; fix the error that the other process reports"
            )
            other.exit_code = code
            raise other
        return result if ahead else work()

    def require_same(self, values: Mapping[str, Any]) -> None:
        """Check that JSON values are the same on all ranks.

        Raises:
            ConfigError: the values differ, for example because a machine has different data or cannot access the run
                folder.
        """
        if self._group is None:
            return
        names = list(values)
        digests = torch.tensor([derive_seed(0, json.dumps(values[name], sort_keys=True)) for name in names])
        least, most = digests.clone(), digests.clone()
        with self.watch():
            distributed.all_reduce(least, distributed.ReduceOp.MIN, group=self._group)
            distributed.all_reduce(most, distributed.ReduceOp.MAX, group=self._group)
        wrong = [name for name, low, high in zip(names, least.tolist(), most.tolist(), strict=True) if low != high]
        if wrong:
            raise ConfigError(
                f"the {self.count} processes do not agree on {', '.join(wrong)} (on rank {self.rank}: "
                f"{', '.join(f'{name} = {values[name]!r}' for name in wrong)}); use the same command and the same data "
                f"on all machines, with a shared run folder"
            )

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Convert the communication library's error about a rank that ended to a clear `TrainingError`."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not _is_communication(error):
                raise
            raise TrainingError(
                f"rank {self.rank} waited for another process, which failed (see its message) or took longer than "
                f"training.timeout_minutes ({self._timeout_minutes:g}). Checkpoints are kept: fix the cause and resume "
                f"the run. ({str(error).splitlines()[0]})"
            ) from error


def _is_communication(error: RuntimeError) -> bool:
    words = str(error).lower()
    return isinstance(error, distributed.DistError) or any(word in words for word in ("gloo", "nccl", "c10d"))
