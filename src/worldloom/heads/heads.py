"""The heads of a run: everything fitted and measured on the latents of its world model."""

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.core.errors import ConfigError, DataError
from worldloom.data import read_picture
from worldloom.heads.behaviour import BehaviourPrior
from worldloom.heads.coarse import CoarseModel
from worldloom.heads.distance import TemporalDistance
from worldloom.heads.geometry import LatentGeometry
from worldloom.heads.probe import Probe
from worldloom.heads.support import Support
from worldloom.models import JEPA, load_model, stored_digest


class Heads:
    """A world model and the heads in a folder that were fitted on it. Each head is loaded on first use.

    `probe_names` are the quantities that have a probe; `levels` is the number of coarser models.

    Raises:
        CheckpointError: a head is missing, damaged, or was fitted on another model. Raised on first use.
    """

    def __init__(self, folder: Path, model: JEPA, *, probe_names: Sequence[str] = (), levels: int = 0) -> None:
        self.model = model
        self._folder, self._probe_names, self._levels = folder, probe_names, levels
        self._verified: Mapping[str, str] = {}

    def with_verified(self, parts: Mapping[str, str]) -> "Heads":
        """Return a copy that uses the pictures and runs in `parts` only if they still have these digests.

        The names are `file PATH` and `run PATH`; the digests are SHA-256 for a picture and `stored_digest` for the
        model of a run.
        """
        found = copy.copy(self)
        found._verified = dict(parts)
        return found

    def stem(self, name: str) -> Path:
        """Return the path of a head, without suffix."""
        return self._folder / name

    @cached_property
    def geometry(self) -> LatentGeometry:
        """Step length, inverse dynamics and reversibility."""
        return LatentGeometry.load(self.stem("geometry"), self.model)

    @cached_property
    def distance(self) -> TemporalDistance:
        """The learned temporal distance, in environment steps."""
        return TemporalDistance.load(self.stem("distance"), self.model)

    @cached_property
    def support(self) -> Support:
        """A sample of the data's latents."""
        return Support.load(self.stem("support"), self.model)

    @cached_property
    def behaviour_prior(self) -> BehaviourPrior:
        """The density of blocks in the logs."""
        return BehaviourPrior.load(self.stem("behaviour-prior"), self.model)

    @cached_property
    def probes(self) -> dict[str, Probe]:
        """The probes, by the names of their quantities."""
        return {name: Probe.load(self.stem(f"probe-{name}"), self.model) for name in self._probe_names}

    @cached_property
    def hierarchy(self) -> list[tuple[CoarseModel, LatentGeometry]]:
        """The coarser models with their geometry. One step of a model covers several steps of the model before it."""
        levels: list[tuple[CoarseModel, LatentGeometry]] = []
        for level in range(1, self._levels + 1):
            coarse = CoarseModel.load(self.stem(f"coarse-{level}"), levels[-1][0] if levels else self.model)
            levels.append((coarse, LatentGeometry.load(self.stem(f"coarse-{level}-geometry"), coarse)))
        return levels

    def digests(self) -> dict[str, str]:
        """Return a digest of the run's model and of each head that a planner or a guardrail may read, by name.

        Baselines are left out, and so are heads that the run does not have.

        Raises:
            CheckpointError: the file of a head is damaged.
        """
        names = ["geometry", "distance", "support", "reactive", "goal-inverse", "behaviour-prior"]
        names += [f"probe-{name}" for name in self._probe_names]
        for level in range(1, self._levels + 1):
            names += [f"coarse-{level}", f"coarse-{level}-geometry"]
        found = {name: stored_digest(self.stem(name)) for name in names}
        found["model"] = stored_digest(self._folder.parent / "model" / "model")
        return {
            "weights": self.model.spec.fingerprint,
            **{name: digest for name, digest in found.items() if digest is not None},
        }

    def examples(self, names: Sequence[str]) -> Float[Tensor, "N D"]:
        """Return the latents of picture files, given by their paths.

        Raises:
            DataError: a file is not a picture, has a different size or is not the verified one, or the model needs more
                than pixels.
        """
        expected = self.model.spec.observation.pixels
        if expected is None or self.model.spec.observation.vector:
            raise DataError(
                "the model's observation is not only pixels, so a picture cannot be encoded; use a model of pixels only"
            )
        with torch.inference_mode():
            pictures = [
                read_picture(
                    Path(name),
                    expected,
                    colours=self.model.sees_colours,
                    digest=self._verified.get(f"file {name}"),
                )
                for name in names
            ]
            return torch.cat([self.model.encode(picture.to(self.model.device)) for picture in pictures])

    def peer(self, run: str) -> JEPA:
        """Return the world model of another run with the same encoder, given by its folder.

        Raises:
            CheckpointError: the folder has no model, or the model is damaged or not the verified one.
            ConfigError: the other model has a different encoder, so its latents cannot be compared with this model's.
        """
        other = load_model(Path(run) / "model", self.model.device, digest=self._verified.get(f"run {run}"))
        if not self.model.encodes_like(other):
            raise ConfigError(
                f"the run {run} has a different encoder, so its predictions cannot be compared with this run's; name "
                f"runs whose training kept this encoder"
            )
        return other
