"""MuJoCo rendering without a display. The OpenGL backend must be chosen before `mujoco` is imported."""

import ctypes
import ctypes.util
import os
import sys
import threading
from typing import Any

import numpy as np
from jaxtyping import UInt8

from worldloom.core.errors import EnvironmentFailure
from worldloom.core.extras import missing_extra

GL_REMEDY = (
    "install one: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri (EGL) or apt-get install libosmesa6 (OSMesa); "
    "without root: conda install -c conda-forge mesalib, and put its lib folder into LD_LIBRARY_PATH"
)
_EGL_PLATFORM_DEVICE = 0x313F


def choose_gl() -> str:
    """Set MUJOCO_GL to `egl` if an EGL device works, else to `osmesa`, and return the value. An existing value is kept.

    Raises:
        EnvironmentFailure: neither EGL nor OSMesa works; the message says what to install.
    """
    chosen = os.environ.get("MUJOCO_GL")
    if chosen or not sys.platform.startswith("linux"):
        return chosen or ""
    if _egl_answers():
        chosen = "egl"
    elif ctypes.util.find_library("OSMesa"):
        chosen = "osmesa"
    else:
        raise EnvironmentFailure(f"no OpenGL that renders without a display was found; {GL_REMEDY}")
    os.environ["MUJOCO_GL"] = chosen
    return chosen


def load_mujoco(*, draws: bool = True, extra: str = "mujoco") -> Any:
    """Return the module `mujoco`, set up to render without a display. With `draws=False`, OpenGL may be missing.

    Raises:
        EnvironmentFailure: `mujoco` (a module of `extra`) is missing, or `draws` is set and no OpenGL is available.
    """
    try:
        choose_gl()
    except EnvironmentFailure:
        if draws:
            raise
        os.environ["MUJOCO_GL"] = "disabled"  # a later attempt to render reports what is missing
    try:
        import mujoco
    except ImportError as error:
        raise EnvironmentFailure(missing_extra(extra, error)) from error
    return mujoco


# An OpenGL context belongs to one thread of one process; all copies of a model in that thread share a renderer.
_RENDERERS: dict[tuple[int, int, int, int], Any] = {}


def draw(model: Any, data: Any, camera: Any, size: int) -> UInt8[np.ndarray, "H W 3"]:
    """Render `data` with `camera` as a square image of `size` pixels.

    Raises:
        EnvironmentFailure: OpenGL does not start.
    """
    key = (os.getpid(), threading.get_ident(), id(model), size)
    renderer = _RENDERERS.get(key)
    if renderer is None:
        renderer = _RENDERERS[key] = _start(model, size)
    renderer.update_scene(data, camera)
    picture: np.ndarray = renderer.render()
    return picture.copy()


def _start(model: Any, size: int) -> Any:
    mujoco = load_mujoco()
    model.vis.quality.offsamples = 0
    model.vis.quality.shadowsize = 0
    try:
        renderer = mujoco.Renderer(model, size, size)
    except Exception as error:  # each backend raises its own
        raise EnvironmentFailure(
            f"OpenGL with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')} does not start ({error}). Import worldloom "
            f"before mujoco, because mujoco selects its backend on import. If no backend is installed, {GL_REMEDY}"
        ) from error
    for flag in ("mjRND_SHADOW", "mjRND_REFLECTION", "mjRND_SKYBOX", "mjRND_HAZE"):
        renderer.scene.flags[getattr(mujoco.mjtRndFlag, flag)] = 0
    return renderer


def _egl_answers() -> bool:
    """Return whether an EGL device can be opened; an installed library is not enough."""
    name = ctypes.util.find_library("EGL")
    if name is None:
        return False
    try:
        egl = ctypes.CDLL(name)
        find = egl.eglGetProcAddress
    except (OSError, AttributeError):
        return False
    find.restype, find.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    query, display_of = find(b"eglQueryDevicesEXT"), find(b"eglGetPlatformDisplayEXT")
    if not query or not display_of:
        return False
    devices, count = (ctypes.c_void_p * 16)(), ctypes.c_int(0)
    query_type = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    display_type = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)
    if not query_type(query)(16, ctypes.addressof(devices), ctypes.addressof(count)):
        return False
    egl.eglInitialize.argtypes = [ctypes.c_void_p] * 3
    displays = (display_type(display_of)(_EGL_PLATFORM_DEVICE, device, None) for device in devices[: count.value])
    return any(display and egl.eglInitialize(display, None, None) for display in displays)
