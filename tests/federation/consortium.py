"""A tiny consortium in one process: points that actions move, seen by each owner in coordinates of its own."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from worldloom.core.signing import SigningKey, make_key
from worldloom.core.types import ActionSpec, ObservationSpec
from worldloom.data import DatasetSpec, Frames
from worldloom.federation import (
    Base,
    Constitution,
    Coordinator,
    InProcess,
    LocalTraining,
    Node,
    PartitionConfig,
    Trained,
    initial_base,
)
from worldloom.models import JEPAConfig
from worldloom.models.encoders import VectorMLP
from worldloom.models.predictors import MLPPredictor
from worldloom.training import RunFolder, TrainingConfig

MODEL = JEPAConfig(
    encoder=VectorMLP(hidden=(16,)), predictor=MLPPredictor(hidden=(16,)), latent_dim=6, block=2, action_stem=2
)
OWNERS = ("north", "east", "south")


def points(*, episodes: int = 12, steps: int = 30, seed: int = 0) -> Frames:
    """Return episodes of a point that drifts by its actions, with a few numbers that stand still beside it."""
    random = np.random.default_rng(seed)
    frames = steps + 1
    actions = np.zeros((episodes, frames, 2), np.float32)
    actions[:, :steps] = np.clip(random.normal(0, 0.3, (episodes, steps, 2)).cumsum(1), -1, 1)
    place = random.uniform(-1, 1, (episodes, 1, 2)) + 0.2 * np.cumsum(actions, axis=1) - 0.2 * actions
    still = np.broadcast_to(random.normal(size=(episodes, 1, 2)), (episodes, frames, 2))
    vector = np.concatenate([place, still], axis=-1).astype(np.float32)
    return Frames(
        spec=DatasetSpec(
            observation=ObservationSpec(vector=4), action=ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0)), labels={}
        ),
        fingerprint=f"points-{seed}",
        pixels=None,
        vector=vector.reshape(-1, 4),
        actions=actions.reshape(-1, 2),
        labels={},
        starts=np.arange(episodes) * frames,
        lengths=np.full(episodes, steps),
    )


def bytes_of(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the bytes of tensors, without names and signatures."""
    return sum(tensor.nbytes for tensor in tensors.values())


@dataclass
class Consortium:
    """Keys, rules, nodes and a coordinator below a folder; opened again it is the same."""

    path: Path
    rules: dict[str, Any] = field(default_factory=dict)
    classes: Mapping[str, str] = field(default_factory=dict)
    seats: tuple[str, ...] = ()  # members who may coordinate too
    accelerator: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("coordinator", *OWNERS):
            where = self.path / "keys" / f"{name}.pem"
            where.parent.mkdir(parents=True, exist_ok=True)
            if not where.exists():
                make_key(where)
        self.keys = {name: SigningKey(self.path / "keys" / f"{name}.pem") for name in ("coordinator", *OWNERS)}
        self.constitution = Constitution.parse({
            "consortium": "points",
            "members": {name: {"key": self.keys[name].public} for name in OWNERS},
            "coordinators": [{"name": "coordinator", "key": self.keys["coordinator"].public}, *self.seats],
            "rounds": 3,
            "inner_steps": 12,
            "quorum": 2,
            "cap": 0.5,
            "timeout_seconds": 60,
            "quality": {"max_worse": 0.5},
            **self.rules,
        })  # fmt: skip
        rounds, steps = self.constitution.rounds, self.constitution.inner_steps
        self.training = TrainingConfig(
            steps=rounds * steps, batch=16, horizon=3, threads=1, validation_share=0.25, validation_windows=32,
            checkpoint_every=5, validate_every=100, log_every=100,
            accelerator=self.accelerator,
        )  # fmt: skip
        self.partition = PartitionConfig.parse(self.constitution.partition)

    def node(self, name: str) -> Node:
        """Return a member's node."""
        path = self.path / name
        made = (path / "run" / "config.json").is_file()
        run = RunFolder.open(path / "run") if made else RunFolder.create(path / "run", {}, {})
        training = LocalTraining(
            run,
            points(seed=OWNERS.index(name)),
            training=self.training,
            model=MODEL,
            partition=self.partition,
        )
        return Node(
            path,
            training,
            name=name,
            key=self.keys[name],
            constitution=self.constitution,
            data_class=self.classes.get(name, "open"),
        )

    def coordinator(
        self,
        handlers: Mapping[str, Callable[[bytes], bytes]] | None = None,
        *,
        initial: Base | None = None,
    ) -> Coordinator:
        """Return the coordinator; `handlers` take the places of nodes, `initial` that of an untrained base."""
        every = {name: self.node(name).handle for name in OWNERS} | dict(handlers or {})
        return Coordinator(
            self.path / "rounds",
            self.constitution,
            key=self.keys["coordinator"],
            transport=InProcess(every),
            initial=initial or initial_base(MODEL, points().spec, self.partition, seed=0),
        )


class Drawn(LocalTraining):
    """Trains nothing: what it makes of a base is drawn from its owner's name and the round, or `given`."""

    shared_statistics = ()
    like: Mapping[str, Tensor] = {}

    def __init__(self, quick: "Quick", name: str) -> None:
        self.partition, self._quick, self._name = quick.partition, quick, name
        self.like = initial_base(MODEL, points().spec, quick.partition, seed=0).tensors

    def train(self, name: str, base: Base, steps: int, *, at: int | None = None) -> Trained:
        number = int(name.split()[1])
        delta = self._quick.given.get(self._name) or drawn(self._name, number, base.tensors)
        zeros = {
            key: torch.zeros_like(tensor) for key, tensor in base.tensors.items()
        }  # so that the delta is not rounded
        return Trained(before=zeros, after=delta, steps=steps, frames=self._quick.frames.get(self._name, 100))

    def judge(self, base: Base) -> dict[str, float]:
        return {"total": self._quick.loss(base)}


def drawn(name: str, number: int, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(10 * number + OWNERS.index(name))
    return {key: 0.1 * torch.randn(tensor.shape, generator=source) for key, tensor in sorted(like.items())}


@dataclass
class Quick(Consortium):
    """A consortium in which nobody trains, so that a round takes a moment."""

    given: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    frames: dict[str, int] = field(default_factory=dict)
    loss: Callable[[Base], float] = lambda base: 1.0

    def node(self, name: str) -> Node:
        return Node(
            self.path / name,
            Drawn(self, name),
            name=name,
            key=self.keys[name],
            constitution=self.constitution,
            data_class=self.classes.get(name, "open"),
        )


def run_until_killed(coordinator: Coordinator) -> None:
    """Run a coordinator until a call raises KeyboardInterrupt, as if its process was killed.

    With the process, a member that is still training would end too. Here its thread ends first: threads of one process
    share the number of CPU threads, which changes the rounding of a training that begins meanwhile.
    """
    with pytest.raises(KeyboardInterrupt):
        coordinator.run()
    coordinator.close()
    for thread in threading.enumerate():
        if thread.name == "worldloom-nodes":
            thread.join()
