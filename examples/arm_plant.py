"""A robot arm in its own process: MuJoCo at 500 Hz in real time, served at 20 Hz.

    python examples/arm_plant.py --address tcp://127.0.0.1:7777 [--pixels] [--log plant.json]

Velocity commands from -1 to 1 move two joints in the plane; 1 is the maximum speed of a joint. The observation is the
fingertip, both joints as cosine and sine, and their speeds. With --pixels it also has a 64 x 64 picture from above. The
true position of the arm is sent as labels. Needs `pip install 'worldloom[mujoco]'`.
"""

import argparse
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("MUJOCO_GL", "osmesa")  # software; before MuJoCo is imported

import mujoco
import numpy as np

from worldloom.core.types import ActionSpec, ObservationSpec
from worldloom.deploy.link import PlantReading
from worldloom.deploy.plant import PlantServer

ARM = """
<mujoco model="arm">
  <option timestep="0.002" integrator="implicitfast" gravity="0 0 0"/>
  <visual><global offwidth="64" offheight="64"/><quality shadowsize="0"/></visual>
  <worldbody>
    <light pos="0 0 3" dir="0 0 -1" castshadow="false"/>
    <camera name="top" pos="0 0 1.2" xyaxes="1 0 0 0 1 0" fovy="45"/>
    <geom type="plane" size="1 1 0.1" rgba="0.9 0.9 0.9 1" contype="0" conaffinity="0"/>
    <body pos="0 0 0.05">
      <joint name="shoulder" type="hinge" axis="0 0 1" damping="0.4" armature="0.02"/>
      <geom type="capsule" fromto="0 0 0 0.22 0 0" size="0.025" mass="0.5" rgba="0.1 0.3 0.7 1"/>
      <body pos="0.22 0 0">
        <joint name="elbow" type="hinge" axis="0 0 1" damping="0.3" armature="0.02" limited="true" range="-150 150"/>
        <geom type="capsule" fromto="0 0 0 0.18 0 0" size="0.02" mass="0.3" rgba="0.8 0.4 0.1 1"/>
        <site name="fingertip" pos="0.18 0 0" size="0.03" rgba="0.7 0.1 0.1 1"/>
      </body>
    </body>
  </worldbody>
  <actuator>
    <velocity joint="shoulder" kv="3" ctrlrange="-1 1" gear="1"/>
    <velocity joint="elbow" kv="3" ctrlrange="-1 1" gear="1"/>
  </actuator>
</mujoco>
"""
SPEED = 2.5  # radians a second at an action of 1
ACTION = ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0))
VECTOR = 8


class Arm:
    """The simulation; `run` steps it in real time and belongs in its own thread."""

    def __init__(self, *, pixels: bool = False) -> None:
        self._model = mujoco.MjModel.from_xml_string(ARM)
        self._data = mujoco.MjData(self._model)
        # Commands reach up to SPEED, so the actuators' range is set from the same constant.
        self._model.actuator_ctrlrange[:] = [-SPEED, SPEED]
        self._shown = mujoco.MjData(self._model)
        self._renderer: Any = None
        self._pixels = pixels
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.behind = 0.0  # maximum lag of the simulation behind the wall clock, in seconds
        self.observation = ObservationSpec(pixels=(64, 64, 3) if pixels else None, vector=VECTOR)
        self.reset(0)

    def reset(self, seed: int | None) -> None:
        """Move the arm to a random pose that depends on the seed; with a real arm, an operator does this."""
        generator = np.random.default_rng(seed)
        with self._lock:
            mujoco.mj_resetData(self._model, self._data)
            self._data.qpos[:] = generator.uniform([-np.pi, -2.4], [np.pi, 2.4])
            mujoco.mj_forward(self._model, self._data)

    def write(self, action: np.ndarray) -> None:
        """Set the commanded speeds; they apply until the next command."""
        with self._lock:
            self._data.ctrl[:] = SPEED * action

    def step(self, count: int = 1) -> None:
        """Step the physics."""
        with self._lock:
            mujoco.mj_step(self._model, self._data, count)

    def run(self) -> None:
        """Step in real time until `stop`."""
        step = self._model.opt.timestep
        start, done = time.monotonic(), 0
        while not self._stop.is_set():
            due = int((time.monotonic() - start) / step)
            self.behind = max(self.behind, (due - done - 1) * step)
            if due > done:
                self.step(due - done)
                done = due
            time.sleep(max(0.0, start + (done + 1) * step - time.monotonic()))

    def stop(self) -> None:
        """End `run`."""
        self._stop.set()

    def close(self) -> None:
        """Release the rendering context; call it in the thread that created it."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def read(self) -> PlantReading:
        """Return the current observation."""
        with self._lock:
            joints, speeds = self._data.qpos.copy(), self._data.qvel.copy()
        self._shown.qpos[:] = joints
        mujoco.mj_kinematics(self._model, self._shown)
        tip = self._shown.site("fingertip").xpos[:2].astype(np.float32)
        vector = np.concatenate([tip / 0.4, np.cos(joints), np.sin(joints), speeds / SPEED]).astype(np.float32)
        pixels = None
        if self._pixels:
            if self._renderer is None:  # created in the thread that renders, which owns the context
                self._renderer = mujoco.Renderer(self._model, 64, 64)
            mujoco.mj_forward(self._model, self._shown)
            self._renderer.update_scene(self._shown, camera="top")
            pixels = self._renderer.render().copy()
        labels = {"fingertip": tip, "joints": joints.astype(np.float32)}
        return PlantReading(pixels=pixels, vector=vector, labels=labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", default="tcp://127.0.0.1:7777")
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--pixels", action="store_true")
    parser.add_argument("--log", type=Path, help="where to write the arrival time of each action when the plant ends")
    arguments = parser.parse_args()
    arm = Arm(pixels=arguments.pixels)
    server = PlantServer(
        arm.read,
        arm.write,
        observation=arm.observation,
        action=ACTION,
        rate=arguments.rate,
        safe_action=np.zeros(ACTION.size, np.float32),  # zero speed: stand still
        address=arguments.address,
        reset=arm.reset,
        name="arm",
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: server.stop())
    physics = threading.Thread(target=arm.run, daemon=True)
    physics.start()
    print(f"arm: {server.address}", flush=True)
    log = server.serve()
    arm.stop()
    arm.close()
    physics.join(timeout=1.0)
    if arguments.log is not None:
        arguments.log.write_text(json.dumps({**log.to_json(), "physics_behind_s": arm.behind}))


if __name__ == "__main__":
    main()
