"""Landmarks: latents that cover the observed states, with edges from experience or prediction."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from pydantic import Field, model_validator
from torch import Tensor

from worldloom.core.config import Config, Shape, check_shape
from worldloom.core.errors import CheckpointError, ConfigError, PlanningError
from worldloom.core.types import ModelSpec
from worldloom.models import load_tensors, save_tensors

_KIND = "landmark-graph"
_NOWHERE = -1
_PLANE = 5  # landmarks that span the plane of known states around a state
EXPERIENCED, REVERSED, PREDICTED = range(3)

# Maps pairs of latents (M, D) to the number of blocks from the first to the second, and whether the edge is believed.
Check = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class LandmarkConfig(Config):
    """The configuration of a landmark graph. Lengths are latent distances in typical model steps; costs are in blocks.

    A state farther than `spacing` from every landmark becomes a landmark; a state farther than `reach` from every
    landmark is unknown. Landmarks within `link` of each other may be joined by prediction. Each failure adds `penalty`
    blocks to the cost of an edge, and `forgive` failures in a row remove the edge; a predicted edge is removed by the
    first failure. Edges whose ends are within `blame` of the ends of a failed edge fail too, because the same wall is
    likely to block all of them. Where steps can be undone, the reverse edges fail too.
    """

    spacing: float = Field(default=1.0, gt=0)
    reach: float = Field(default=2.0, gt=0)
    link: float = Field(default=2.5, ge=0)
    penalty: float = Field(default=8.0, ge=0)
    forgive: int = Field(default=3, ge=1)
    blame: float = Field(default=2.0, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> "LandmarkConfig":
        if self.reach < self.spacing:
            raise ValueError(
                f"expected reach >= spacing; got reach {self.reach} and spacing {self.spacing}. Raise 'reach' or lower "
                f"'spacing'"
            )
        return self


class _Saved(Shape):
    """The metadata that `LandmarkGraph.save` writes."""

    model: str
    memories: int = Field(ge=0)
    config: dict[str, Any]
    step_length: float = Field(gt=0)
    reversible: bool


def _fault(tensors: Mapping[str, Tensor], dim: int) -> str:
    """Return why tensors are not those of a saved graph; an empty string if they are."""
    landmarks = len(tensors.get("latents", ()))
    edges = len(tensors.get("ends", ()))
    expected = {
        "latents": (torch.float32, (landmarks, dim)),
        "visits": (torch.int64, (landmarks,)),
        "ends": (torch.int64, (edges, 2)),
        "blocks": (torch.float32, (edges,)),
        "kinds": (torch.int8, (edges,)),
        "failures": (torch.int16, (edges,)),
    }
    for name, (kind, shape) in expected.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.dtype != kind or tuple(tensor.shape) != shape:
            came = "is missing" if tensor is None else f"is {tensor.dtype} of shape {tuple(tensor.shape)}"
            return f"{name!r} {came}; expected {kind} of shape {shape}"
    ends, kinds = tensors["ends"], tensors["kinds"]
    if not tensors["latents"].isfinite().all():
        return "a landmark is not finite"
    if edges and not (int(ends.min()) >= 0 and int(ends.max()) < landmarks):
        return "an edge ends at a landmark that does not exist"
    if not (tensors["blocks"].isfinite().all() and (tensors["blocks"] >= 0).all()):
        return "an edge has a negative cost"
    if not ((kinds >= EXPERIENCED) & (kinds <= PREDICTED)).all():
        return "an edge is of an unknown kind"
    if (tensors["failures"] < 0).any() or (tensors["visits"] < 0).any():
        return "a count is negative"
    return ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Route:
    """The cheapest path from each landmark to one goal: its cost in `blocks` (infinite: no path) and the next `hop`."""

    blocks: Float64[np.ndarray, "N"]
    hop: Int64[np.ndarray, "N"]  # -1 at the goal, and where no path is known

    def knows(self, landmark: int) -> bool:
        """Return whether a path leads from the landmark to the goal; False for landmarks added after the search."""
        return landmark < len(self.blocks) and bool(np.isfinite(self.blocks[landmark]))

    def ahead(self, landmark: int, hops: int) -> int:
        """Return the landmark `hops` hops along the path, or the goal's landmark if the path is shorter."""
        for _ in range(hops):
            if self.hop[landmark] < 0:
                break
            landmark = int(self.hop[landmark])
        return landmark


class LandmarkGraph:
    """A directed graph over latents of one model; `save` and `load` store it in files.

    Edges come from experience (one state followed another), from the reverse of experience if steps are `reversible`,
    and from prediction (`link`). A *world* is a connected component of the graph: worlds that look different, such as
    two layouts, share one graph without edges between them. `visits` counts how often each landmark was the nearest to
    an observed state.
    """

    def __init__(
        self, spec: ModelSpec, config: LandmarkConfig | None = None, *, step_length: float, reversible: bool
    ) -> None:
        if step_length <= 0:
            raise PlanningError(
                f"expected a typical model step longer than 0; got {step_length}. Check the model's geometry"
            )
        self.config = config or LandmarkConfig()
        self.spec, self.step_length, self.reversible = spec, step_length, reversible
        self._latents = torch.zeros(64, spec.latent_dim)
        self.visits = np.zeros(0, np.int64)
        self._rows: dict[tuple[int, int], int] = {}
        self._ends = np.zeros((64, 2), np.int64)
        self._blocks = np.zeros(64, np.float32)
        self._kinds = np.zeros(64, np.int8)
        self._failures = np.zeros(64, np.int16)
        self._matrix: Any = None

    def __len__(self) -> int:
        return len(self.visits)

    @property
    def latents(self) -> Float[Tensor, "N D"]:
        """The landmarks."""
        return self._latents[: len(self)]

    @property
    def edges(self) -> Int64[np.ndarray, "M 2"]:
        """The believed edges, as pairs of landmarks."""
        ends: np.ndarray = self._ends[: len(self._rows)][self._believed()]
        return ends

    def nearest(self, latents: Float[Tensor, "B D"]) -> tuple[Int64[np.ndarray, "B"], Float32[np.ndarray, "B"]]:
        """Return the nearest landmark to each latent and its distance; -1 and infinity if there are no landmarks."""
        if not len(self):
            return np.full(len(latents), _NOWHERE), np.full(len(latents), np.inf, np.float32)
        gaps, landmarks = torch.cdist(latents.detach().cpu().float(), self.latents).min(dim=1)
        return landmarks.numpy(), (gaps / self.step_length).numpy()

    def add(
        self,
        latents: Float[Tensor, "B D"],
        previous: Int64[np.ndarray, "B"] | None = None,
        *,
        blocks: float = 1.0,
    ) -> Int64[np.ndarray, "B"]:
        """Add the next state of each of B lines (continuous experience); return the landmarks that represent them.

        `previous` are the landmarks of the states `blocks` earlier, -1 at the start of a line.
        """
        latents = latents.detach().cpu().float()
        landmarks, gaps = self.nearest(latents)
        first = len(self)
        if previous is not None and (previous >= 0).any():
            # Among similar places, prefer one in the world of the line's previous landmark.
            worlds, lines = self._worlds(), torch.from_numpy(previous.clip(0))
            own = torch.cdist(latents, self.latents) / self.step_length
            own[(worlds[lines][:, None] != worlds) | torch.from_numpy(previous < 0)[:, None]] = torch.inf
            own_gaps, own_landmarks = (part.numpy() for part in own.min(dim=1))
            here = own_gaps <= self.config.spacing
            landmarks, gaps = np.where(here, own_landmarks, landmarks), np.where(here, own_gaps, gaps)
        for row in np.flatnonzero(gaps > self.config.spacing):
            landmarks[row] = self._place(latents[row], first)
        np.add.at(self.visits, landmarks, 1)
        for before, now in zip(previous if previous is not None else (), landmarks, strict=previous is not None):
            if before >= 0 and before != now:
                self._join(int(before), int(now), blocks, EXPERIENCED)
                if self.reversible:
                    self._join(int(now), int(before), blocks, REVERSED)
        return landmarks

    def learn(
        self, latents: Float[Tensor, "M D"], lines: Int64[np.ndarray, "M"], steps: Int64[np.ndarray, "M"]
    ) -> None:
        """Add recorded states of several lines (continuous experience); `steps` counts the blocks within each line."""
        order = np.lexsort((steps, lines))
        lines, steps = lines[order], steps[order]
        place = np.arange(len(lines)) - np.searchsorted(lines, lines)  # the position within its line
        previous = np.full(len(lines), _NOWHERE)
        for at in range(int(place.max(initial=-1)) + 1):
            rows = np.flatnonzero(place == at)
            gone = np.where(at > 0, steps[rows] - steps[rows - 1], 0)
            for blocks in np.unique(gone):
                some = rows[gone == blocks]
                before = previous[some - 1] if at else None
                previous[some] = self.add(latents[order[some]], before, blocks=float(blocks))

    def link(self, check: Check, landmarks: Sequence[int] | None = None, *, among: bool = False) -> int:
        """Add the edges that `check` believes between close landmarks of the same world; return their number.

        With `landmarks`, only pairs that include one of these landmarks are searched; with `among`, both landmarks of a
        pair must be among them, but may be in different worlds. Otherwise, separate worlds are never joined by
        prediction, because only experience can tell worlds that look similar apart.
        """
        if len(self) < 2:
            return 0
        chosen = torch.arange(len(self)) if landmarks is None else torch.tensor(sorted(set(landmarks)))
        worlds = self._worlds()
        if among:
            worlds[:] = -1
            worlds[chosen] = 0
        added = 0
        for some in chosen.split(1024):
            gaps = torch.cdist(self.latents[some], self.latents) / self.step_length
            rows, others = torch.where((gaps < self.config.link) & (worlds[some][:, None] == worlds))
            pairs = torch.stack([some[rows], others], dim=1)
            pairs = torch.cat([pairs, pairs.flip(1)]) if landmarks is not None else pairs
            new = [pair for pair in dict.fromkeys(map(tuple, pairs.tolist())) if pair[0] != pair[1]]
            new = [pair for pair in new if pair not in self._rows]
            if not new:
                continue
            ends = torch.tensor(new)
            blocks, believed = check(self.latents[ends[:, 0]], self.latents[ends[:, 1]])
            for (source, target), cost, sure in zip(new, blocks.tolist(), believed.tolist(), strict=True):
                if sure:
                    self._join(source, target, cost, PREDICTED)
                    added += 1
        return added

    def route(self, *goals: Float[Tensor, "D"]) -> Route | None:
        """Find the cheapest path from every landmark to one goal.

        `goals` are the latents of this goal, one for each look that it may have: a goal looks different after a change
        of its world (see `changed`). Return None if no look is near a landmark.
        """
        from scipy.sparse.csgraph import dijkstra

        if not len(self):
            return None
        gaps = (torch.cdist(torch.stack(goals).detach().cpu().float(), self.latents) / self.step_length).numpy()
        nearest = gaps.min(axis=1, keepdims=True)
        close = (gaps <= np.maximum(self.config.spacing, nearest)) & (nearest <= self.config.reach)
        ends = np.flatnonzero(close.any(axis=0))
        if not len(ends):
            return None
        blocks, hop, _ = dijkstra(self._backwards(), indices=ends, min_only=True, return_predecessors=True)
        return Route(blocks=blocks, hop=np.where(hop < 0, _NOWHERE, hop).astype(np.int64))

    def blocks_from(self, landmark: int) -> Float64[np.ndarray, "N"]:
        """Return the cost of the cheapest path from a landmark to every other one; infinite if there is no path."""
        from scipy.sparse.csgraph import dijkstra

        costs: np.ndarray = dijkstra(self._backwards().T, indices=landmark)
        return costs

    def failed(self, source: int, target: int) -> None:
        """Record that an edge was followed and did not lead to its target; see `LandmarkConfig`."""
        to_source, to_target = ((self.latents - self.latents[end]).norm(dim=1).numpy() for end in (source, target))
        radius, worlds = self.config.blame * self.step_length, self._worlds().numpy()
        world = worlds == worlds[source]
        here = np.flatnonzero(world & (to_source <= radius) & (to_source < to_target))
        there = np.flatnonzero(world & (to_target <= radius) & (to_target < to_source))
        begins, ends = self._ends[: len(self._rows)].T
        blamed = np.isin(begins, here) & np.isin(ends, there)
        if self.reversible:
            blamed |= np.isin(begins, there) & np.isin(ends, here)
        self._failures[: len(blamed)][blamed] += 1
        self._matrix = None

    def off(self, latents: Float[Tensor, "B D"]) -> Float32[np.ndarray, "B"]:
        """Return the distance of latents from the plane through their nearest landmarks, in typical model steps."""
        if len(self) <= _PLANE:
            return self.nearest(latents)[1]
        latents = latents.detach().cpu().float()
        near = self.latents[torch.cdist(latents, self.latents).topk(_PLANE, dim=1, largest=False).indices]
        span, aside = (near[:, 1:] - near[:, :1]).mT, (latents - near[:, 0])[..., None]
        rest = aside - span @ torch.linalg.lstsq(span, aside).solution
        distances: np.ndarray = (rest.norm(dim=(1, 2)) / self.step_length).numpy()
        return distances

    def changed(self, landmark: int, shift: Float[Tensor, "D"], check: Check) -> None:
        """Record that the world of a landmark now looks different: all latents of this world moved by `shift`.

        A change larger than the spacing adds a copy of that world, with the edges that `check` believes after the
        shift; for example, no edge leads through a closed door. Both copies are kept. After a smaller change, edges
        that are no longer believed are removed, and edges that are believed again are restored.
        """
        shift, worlds = shift.detach().cpu().float(), self._worlds().numpy()
        world = np.flatnonzero(worlds == worlds[landmark])
        if float(shift.norm()) > self.config.spacing * self.step_length:
            self.link(check, self.add(self.latents[world] + shift).tolist(), among=True)
            return
        inside = np.isin(self._ends[: len(self._rows)], world).all(axis=1)
        rows = np.flatnonzero(inside)
        sources, targets = (self.latents[torch.from_numpy(self._ends[rows, end])] for end in (0, 1))
        before, now = (check(sources + by, targets + by)[1].numpy() for by in (torch.zeros_like(shift), shift))
        self._failures[rows[before & ~now]] = self.config.forgive
        self._failures[rows[now & ~before]] = 0
        self._matrix = None

    def save(self, stem: Path | str, *, memories: int = 0) -> None:
        """Write the graph as `STEM.json` and its tensors; see `worldloom.models.checkpoint.save_tensors`.

        `memories` states that the graph has learned from all memories with smaller ids; `load` returns this number.
        """
        count = len(self._rows)
        tensors = {
            "latents": self.latents,
            "visits": torch.from_numpy(self.visits),
            "ends": torch.from_numpy(self._ends[:count]),
            "blocks": torch.from_numpy(self._blocks[:count]),
            "kinds": torch.from_numpy(self._kinds[:count]),
            "failures": torch.from_numpy(self._failures[:count]),
        }
        metadata = {
            "model": self.spec.fingerprint,
            "memories": memories,
            "config": self.config.model_dump(mode="json"),
            "step_length": self.step_length,
            "reversible": self.reversible,
        }
        save_tensors(stem, tensors, metadata, kind=_KIND)

    @classmethod
    def load(cls, stem: Path | str, spec: ModelSpec) -> tuple["LandmarkGraph", int]:
        """Load a graph that `save` wrote; return the graph, and the number `memories` that was saved with it.

        Raises:
            CheckpointError: the file is missing or damaged, or contains latents of another model.
        """
        tensors, metadata = load_tensors(stem, kind=_KIND)
        stated = check_shape(metadata, _Saved, stem, CheckpointError)
        if stated.model != spec.fingerprint:
            raise CheckpointError(
                f"{stem} has landmarks of model {stated.model[:12]!r}, but this model is "
                f"{spec.fingerprint[:12]!r}; rebuild the graph from memories of this model"
            )
        if why := _fault(tensors, spec.latent_dim):
            raise CheckpointError(f"{stem} is damaged: {why}. Rebuild the graph from the memories")
        try:
            config = LandmarkConfig.parse(stated.config)
        except ConfigError as error:
            raise CheckpointError(f"{stem} is damaged: {error}. Rebuild the graph from the memories") from None
        graph = cls(spec, config, step_length=stated.step_length, reversible=stated.reversible)
        graph._latents = tensors["latents"]
        graph.visits = tensors["visits"].numpy()
        graph._ends, graph._blocks = tensors["ends"].numpy(), tensors["blocks"].numpy()
        graph._kinds, graph._failures = tensors["kinds"].numpy(), tensors["failures"].numpy()
        graph._rows = {(int(source), int(target)): row for row, (source, target) in enumerate(graph._ends)}
        return graph, stated.memories

    def _place(self, latent: Float[Tensor, "D"], first: int) -> int:
        """Return a landmark for a state that landmarks before `first` do not cover: a later landmark or a new one."""
        if len(self) > first:
            gaps = (self.latents[first:] - latent).norm(dim=1) / self.step_length
            if gaps.min() <= self.config.spacing:
                return first + int(gaps.argmin())
        number = len(self)
        if number == len(self._latents):
            more = torch.zeros(max(64, number), self._latents.shape[1])
            self._latents = torch.cat([self._latents, more])
        self._latents[number] = latent
        self.visits = np.append(self.visits, 0)
        self._matrix = None
        return number

    def _join(self, source: int, target: int, blocks: float, kind: int) -> None:
        """Add an edge, or update it if the new edge is better; experience restores a failed edge."""
        row = self._rows.get((source, target))
        if row is None:
            row = len(self._rows)
            if row == len(self._blocks):
                more = max(64, row)
                self._ends, self._blocks, self._kinds, self._failures = (
                    np.concatenate([column, np.zeros((more, *column.shape[1:]), column.dtype)])
                    for column in (self._ends, self._blocks, self._kinds, self._failures)
                )
            self._rows[source, target] = row
            self._ends[row], self._blocks[row] = (source, target), blocks
            self._kinds[row], self._failures[row] = kind, 0
        elif kind == EXPERIENCED:
            if self._kinds[row] == EXPERIENCED and not self._failures[row] and self._blocks[row] <= blocks:
                return
            self._blocks[row] = min(blocks, float(self._blocks[row])) if self._kinds[row] == EXPERIENCED else blocks
            self._kinds[row], self._failures[row] = EXPERIENCED, 0
        else:
            return
        self._matrix = None

    def _worlds(self) -> Int64[Tensor, "N"]:
        """Return the world of each landmark: the number of its connected component, ignoring the direction of edges."""
        from scipy.sparse.csgraph import connected_components

        _, groups = connected_components(self._backwards(), directed=False)
        return torch.from_numpy(groups.astype(np.int64))

    def _believed(self) -> Bool[np.ndarray, "M"]:
        count = len(self._rows)
        allowed = np.where(self._kinds[:count] == PREDICTED, 1, self.config.forgive)
        believed: np.ndarray = self._failures[:count] < allowed
        return believed

    def _backwards(self) -> Any:
        """Return the costs as a sparse matrix from target to source: one search from a goal then serves all sources."""
        from scipy.sparse import csr_matrix

        if self._matrix is None or self._matrix.shape[0] != len(self):
            count, believed = len(self._rows), self._believed()
            source, target = self._ends[:count][believed].T
            costs = self._blocks[:count][believed] + self.config.penalty * self._failures[:count][believed]
            self._matrix = csr_matrix((costs.astype(np.float64), (target, source)), shape=(len(self), len(self)))
        return self._matrix
