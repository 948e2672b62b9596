"""`worldloom doctor`: check this machine and report what is missing."""

import platform
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import typer

from worldloom.cli.console import answer, table
from worldloom.cli.options import Json
from worldloom.core.extras import EXTRAS


def doctor(json: Json = False) -> None:
    """Check this machine: versions, cores, memory, disk, accelerators, video, matrix speed, extras and rendering."""
    from rich.text import Text

    checks = _checks()
    answer(
        json,
        {name: {"found": found, "remedy": remedy} for name, found, remedy in checks},
        table("worldloom doctor", ["check", "found"], [[name, found] for name, found, _ in checks]),
        *(Text.assemble((name, "yellow"), f": {remedy}") for name, _, remedy in checks if remedy),
    )
    if any(remedy for _, _, remedy in checks):
        raise typer.Exit(1)


def _checks() -> list[tuple[str, str, str]]:
    """Return the name and result of each check, and a remedy if something is wrong."""
    import psutil
    import torch

    from worldloom.core.hardware import matmul_peak

    memory = psutil.virtual_memory()
    disk = shutil.disk_usage(Path.cwd())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = "  ".join(f"{name} {metadata.version(name)}" for name in ("torch", "gymnasium", "pylance", "pyarrow"))
    checks = [
        ("python", platform.python_version(), "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer"),
        ("packages", versions, ""),
        ("cores", f"{psutil.cpu_count(logical=False)} physical, PyTorch uses {torch.get_num_threads()}", ""),
        (
            "memory",
            f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f}",
            "" if memory.available > 2 * 2**30 else "close other programs: the demo needs about 2 GiB",
        ),
        (
            "disk",
            f"{disk.free / 2**30:.1f} GiB free here",
            "" if disk.free > 2**30 else "free some space: the demo writes up to 1 GiB",
        ),
        ("accelerator", ", ".join(gpus) or "none (not needed)", ""),
        ("float32 matmul", f"{matmul_peak(torch.float32) / 1e9:,.0f} GFLOP/s", ""),
        ("bfloat16 matmul", f"{matmul_peak(torch.bfloat16) / 1e9:,.0f} GFLOP/s", ""),
    ]
    try:
        import av

        av.codec.Codec("libx264", "w")
        checks.append(("video", "H.264 encoder found", ""))
    except (ImportError, ValueError) as error:
        checks.append(("video", str(error), "reinstall PyAV from a wheel: pip install --force-reinstall av"))
    return [*checks, *_extras()]


def _extras() -> list[tuple[str, str, str]]:
    rows = []
    for name, extra in EXTRAS.items():
        installed = all(find_spec(module) for module in extra.modules)
        found = extra.promise if installed else f"not installed; for {extra.promise}: pip install 'worldloom[{name}]'"
        rows.append((f"extra {name}", found, ""))
    if find_spec("mujoco") is not None:
        rows.append(_drawing())
    return rows


def _drawing() -> tuple[str, str, str]:
    """Render one frame with MuJoCo in a separate process, because faulty OpenGL may crash or hang."""
    from worldloom.envs import GL_REMEDY

    program = (
        "import os, worldloom.envs, gymnasium\n"
        "gymnasium.make('worldloom/Reacher-v0').reset(seed=0)\n"
        "print(os.environ.get('MUJOCO_GL', 'default'), flush=True)\n"
        "os._exit(0)\n"
    )
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return "drawing", "MuJoCo rendered nothing within 60 s", GL_REMEDY
    if done.returncode == 0:
        return "drawing", f"MuJoCo renders with {done.stdout.strip().splitlines()[-1]}", ""
    return "drawing", (done.stderr.strip().splitlines() or ["MuJoCo's process crashed"])[-1], GL_REMEDY
