"""The hardware that a measurement ran on, and the number of CPU threads that is fastest on it now."""

import ctypes
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def describe_hardware() -> dict[str, Any]:
    """Return the processor, cores, threads in use, memory and accelerator, as JSON values."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerator": gpu,
    }


_fixed = 0  # the number of threads that the user chose for this process; 0 if each job measures the fastest


def set_threads(count: int) -> None:
    """Set PyTorch's number of CPU threads for this process; with 0, each long job measures which number is fastest."""
    global _fixed
    _fixed = count
    if count:
        torch.set_num_threads(count)


def choosable_threads() -> int:
    """Return the largest number of CPU threads that a job may choose; 0 if `set_threads` fixed it, or if it is 1."""
    most: int = torch.get_num_threads()
    return 0 if _fixed or most == 1 else most


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Run a block with `count` CPU threads; 0 changes nothing."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_threads(work: Callable[[], object], *, seconds: float = 1.5) -> dict[int, float]:
    """Measure `work` with 1, 2, 4, ... CPU threads, up to PyTorch's number; return each number's mean seconds per call.

    The result is empty if there is nothing to choose; see `choosable_threads`.
    A round calls `work` once with each number of threads, so that the machine's load affects all of them. The
    measurement takes about `seconds`, or three rounds if these take longer. A number that needs more than three times
    as long as the fastest is dropped, and one that needs five times as long after its first call: beside other
    processes, a call with several threads can take a hundred times as long. The measurement ends after three rounds if
    the slowest call with one number was faster than every call with the other numbers.
    """
    most = choosable_threads()
    if not most:
        return {}
    counts = sorted({*(2**power for power in range(most.bit_length())), most})
    spent: dict[int, list[float]] = {count: [] for count in counts}

    def turn() -> None:
        for count, calls in spent.items():
            torch.set_num_threads(count)
            start = time.perf_counter()
            work()
            calls.append(time.perf_counter() - start)

    def keep_within(factor: int) -> None:
        nonlocal spent
        best = min(sum(calls) for calls in spent.values())
        spent = {count: calls for count, calls in spent.items() if sum(calls) <= factor * best}

    with use_threads(1):
        work()  # the first call allocates memory
    with use_threads(most):
        turn()  # starts the threads
        keep_within(5)
        if len(spent) > 1:
            for calls in spent.values():
                calls.clear()
        end = time.perf_counter() + seconds
        while len(spent) > 1 and (len(next(iter(spent.values()))) < 3 or time.perf_counter() < end):
            turn()
            keep_within(3)
            if len(next(iter(spent.values()))) >= 3 and _one_is_fastest(list(spent.values())):
                break
    return {count: sum(calls) / len(calls) for count, calls in spent.items()}


def _one_is_fastest(spent: list[list[float]]) -> bool:
    fastest, *others = sorted(spent, key=sum)
    return all(max(fastest) < min(calls) for calls in others)


def fastest_threads(times: dict[int, float]) -> int:
    """Return the fewest threads whose time is within 5% of the shortest in `times`; 0 if `times` is empty."""
    return min((count for count, mean in times.items() if mean <= 1.05 * min(times.values())), default=0)


def matmul_peak(dtype: torch.dtype) -> float:
    """Return the highest rate in FLOP/s of 1024 x 1024 matrix products on the CPU. This takes about 0.4 s."""
    left = torch.ones(1024, 1024, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + 0.4
    while time.perf_counter() < end:
        start = time.perf_counter()
        (left @ left)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def retain_freed_memory() -> None:
    """Make glibc keep freed blocks below 256 MiB for reuse. With another C library, do nothing.

    By default glibc returns large blocks to the kernel at once, and training then spends up to half of the time on
    page faults.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another system or another C library
        return
    mallopt(_M_MMAP_THRESHOLD, 2**28)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
