"""The hardware that a measurement ran on."""

import ctypes
import platform
import time
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
