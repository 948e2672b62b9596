"""A point in a process of its own: `python line_plant.py ADDRESS RATE`; it moves by a tenth of the action."""

import signal
import sys

import numpy as np

from worldloom.core.types import ActionSpec, ObservationSpec
from worldloom.deploy.link import PlantReading
from worldloom.deploy.plant import PlantServer

ACTION = ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0))
OBSERVATION = ObservationSpec(vector=2)


class Line:
    def __init__(self) -> None:
        self.place = np.zeros(2, np.float32)
        self.command = np.zeros(2, np.float32)
        self.written: list[list[float]] = []

    def read(self) -> PlantReading:
        self.place = (self.place + np.float32(0.1) * self.command).astype(np.float32)
        return PlantReading(vector=self.place.copy(), labels={"position": self.place.copy()})

    def write(self, action: np.ndarray) -> None:
        self.command = action.astype(np.float32)
        self.written.append([round(float(value), 4) for value in action])

    def reset(self, seed: int | None) -> None:
        self.place = np.random.default_rng(seed).normal(size=2).astype(np.float32)


def serve(line: Line, address: str, rate: float) -> PlantServer:
    safe = np.zeros(2, np.float32)
    return PlantServer(
        line.read,
        line.write,
        observation=OBSERVATION,
        action=ACTION,
        rate=rate,
        safe_action=safe,
        address=address,
        reset=line.reset,
        name="line",
        silence=1.0,
    )


if __name__ == "__main__":
    server = serve(Line(), sys.argv[1], float(sys.argv[2]))
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    print(server.address, flush=True)
    server.serve()
