"""The figures of a run for an evaluation's report: latents, learned distance and predictions."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.agents import CloningMethod, RandomMethod
from worldloom.core.actions import Walk
from worldloom.core.errors import CheckpointError, DataError, StorageError
from worldloom.core.seeds import torch_generator
from worldloom.core.types import Context, Episode
from worldloom.heads import LatentEpisodes, dream
from worldloom.planning import LatentL2
from worldloom.reports import DistanceMap, LatentMap, PredictedPaths, ReportData
from worldloom.training import LinearProbe
from worldloom.workflow.run import Run

_EPISODES = 60
_PATHS = 6


def report_data(run: Run) -> ReportData:
    """Return the report's data about a run; parts are left out if the dataset is unreadable or has no 2-D position."""
    baselines = [
        name for name, method in run.recipe.methods.items() if isinstance(method, RandomMethod | CloningMethod)
    ]
    metrics = run.folder.metrics()

    def without(what: str, error: Exception) -> ReportData:
        reasons = dict.fromkeys(("latents", "distance", "paths"), f"{what} of this run could not be read: {error}")
        return ReportData(metrics=metrics, baselines=baselines, absent=reasons)

    try:
        dataset, held_out = run.held_out()
        episodes = [dataset.episode(number) for number in held_out[:_EPISODES]]
    except (DataError, StorageError) as error:
        return without("the dataset", error)
    episodes = [episode for episode in episodes if episode.steps >= 2 * run.recipe.model.block]
    label = position_label(episodes)
    if label is None:
        return ReportData(metrics=metrics, baselines=baselines)
    shown = _Shown(Run(run.folder, device="cpu"), episodes, label)
    try:
        distance = shown.distance_map()
    except CheckpointError as error:
        return without(
            "the distance", error
        )  # training was interrupted before the distance was fitted; some methods do not need it
    return ReportData(
        metrics=metrics,
        baselines=baselines,
        latents=LatentMap(latents=shown.flat_latents.numpy(), positions=shown.flat_positions.numpy(), unit=shown.unit),
        distance=distance,
        paths=shown.predicted_paths(),
    )


def position_label(episodes: list[Episode]) -> str | None:
    """Return the label of positions; None if no label is two-dimensional.

    This is 'position' if that label is two-dimensional, or else the first two-dimensional label by name.
    """
    flat = [name for name, values in (episodes[0].labels.items() if episodes else ()) if values.shape[1] == 2]
    return "position" if "position" in flat else next(iter(sorted(flat)), None)


class _Shown:
    """Encoded held-out episodes, and a probe that reads positions from latents."""

    def __init__(self, run: Run, episodes: list[Episode], label: str) -> None:
        self._run, self._episodes = run, episodes
        self._model = run.model
        with torch.no_grad():
            _, self._latents, self._blocks = zip(*map(run.encode, episodes), strict=True)
        self._positions = [torch.from_numpy(episode.labels[label][:: self._model.spec.block]) for episode in episodes]
        self.flat_latents, self.flat_positions = torch.cat(self._latents), torch.cat(self._positions)
        self._probe = LinearProbe.fit(self.flat_latents, self.flat_positions)
        frame = run.model.spec.observation.pixels
        self._in_pixels = frame is not None and in_pixels(self.flat_positions.numpy(), frame)
        self.unit = "px" if self._in_pixels else ""

    def predicted_paths(self) -> PredictedPaths | None:
        """Return the positions that the probe reads from open-loop predictions, with the recorded positions.

        Returns None if the episodes are too short.
        """
        context = self._model.spec.context
        longest = min(len(latents) for latents in self._latents)
        if longest <= context:
            return None
        chosen = range(min(_PATHS, len(self._latents)))
        latents = torch.stack([self._latents[row][:longest] for row in chosen])
        blocks = torch.stack([self._blocks[row][: longest - 1] for row in chosen])
        start = Context(latents=latents[:, :context], actions=blocks[:, : context - 1])
        with torch.no_grad():
            future = self._model.rollout(start, blocks[:, None, context - 1 :])[:, 0]
        predicted = self._probe(torch.cat([latents[:, context - 1 : context], future], dim=1))
        true = torch.stack([self._positions[row][context - 1 : longest] for row in chosen])
        pictures = [self._pictures(row) for row in chosen]
        return PredictedPaths(
            true=true.double().numpy(),
            predicted=predicted.double().numpy(),
            pictures=None
            if pictures[0] is None
            else np.stack([picture for picture in pictures if picture is not None]),
            steps=self._model.spec.block,
            unit=self.unit,
        )

    def distance_map(self) -> DistanceMap:
        """Return the distances from imagined states to the last state of an episode.

        The probe reads the positions of the imagined states from their latents.
        """
        row = int(np.argmax([np.ptp(position.numpy()[:, 0]) for position in self._positions]))
        episode = LatentEpisodes.of([(self._latents[row], self._blocks[row])])
        generator = torch_generator(0, "distance-map")
        walk = Walk(slowest=1.0)
        states = self._latents[row][:1]
        for _ in range(2):  # a second set of walks, from the ends of the first, covers more of the room
            dreams = dream(self._model, episode, per_episode=128, horizon=24, walk=walk, generator=generator)
            states = torch.cat([states, dreams.latents.flatten(0, 1)])
        goal = self._latents[row][-1]
        positions = self._probe(states)
        span = self.flat_positions
        inside = ((positions >= span.amin(0)) & (positions <= span.amax(0))).all(1)
        states, positions = states[inside], positions[inside]
        with torch.no_grad():
            measures: dict[str, Tensor] = {
                "learned distance (steps)": self._run.heads.distance(states, goal),
                "latent L2 (steps)": LatentL2(self._run.heads.geometry.step_length)(states, goal)
                * self._model.spec.block,
            }
        return DistanceMap(
            positions=positions.double().numpy(),
            distances={name: values.double().numpy() for name, values in measures.items()},
            goal=self._positions[row][-1].double().numpy(),
            picture=self._pictures(row),
            unit=self.unit,
        )

    def _pictures(self, row: int) -> np.ndarray | None:
        pixels = self._episodes[row].pixels
        return pixels[0] if pixels is not None and self._in_pixels else None


def in_pixels(positions: Float[np.ndarray, "N 2"], frame: tuple[int, int, int]) -> bool:
    """Return whether positions may be in pixels: inside the picture, and spread over at least a quarter of each side.

    Otherwise they are in metres, or in a simulator's own units.
    """
    height, width, _ = frame
    low, high = positions.min(axis=0), positions.max(axis=0)
    inside = (low >= 0).all() and (high <= (width, height)).all()
    return bool(inside and ((high - low) >= (width / 4, height / 4)).all())
