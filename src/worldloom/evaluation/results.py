"""The results of an evaluation, and `results.json`.

`results.json` is one object:

- `format`: 1; `kind`: "worldloom results"; `worldloom`: the version that wrote it.
- `protocol`: every field of the protocol, with `title`, `fingerprint` and `conventions` (its lines of text).
- `model`: fingerprint of the weights; `training_seed`; `hardware`; `provenance`: passed by the caller.
- `rows`: one for each method and split, in the order of evaluation: `method`, `split`, `protocol`,
  `protocol_fingerprint`, `pairs` (a digest of all starts and goals), `n`, `successes`, `rate`, `interval` (Wilson 95%),
  `solved_at_start` (successes without a step), `floor` (the rate of random actions) and `above_floor` (`rate`,
  `interval`), `seeds` (`evaluation`, `training`), `spl`, `steps_over_shortest`, `by_distance` (`measure`, `bins`),
  `by_wall`, `latency`, `hardware`, `threads`, `model` and `episodes`.
- Each bin of `by_distance` and each group of `by_wall`: `label`, `n`, `successes`, `rate`, `interval`, and a bin's
  `mean_distance`.
- `latency`: `basis` ("plan" or "act"), `decisions`, `batch_ms` (per decision for the whole batch), and `mean_ms`,
  `p50_ms`, `p95_ms` per decision and environment.
- `violated`, if the protocol has limits: like a bin, but counts episodes that broke a limit.
- `episodes`: `index`, `seed`, `success`, `steps`, `budget`, `shortest_steps`, `start_distance`, `end_distance`,
  `wall_between`, `task` (digest of start and goal), `violations` (steps at which a limit was broken).

Figures that are computed from the episodes are written for other programs; `Results.read` computes them again from the
episodes.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import worldloom
from worldloom.core.config import Shape, check_shape
from worldloom.core.errors import ConfigError, StorageError
from worldloom.core.files import read_json, write_json
from worldloom.evaluation.intervals import above_floor, wilson_interval
from worldloom.evaluation.protocol import Protocol

FORMAT = 1
FLOOR = "random"  # the method whose success rate is the floor of the others
_KIND = "worldloom results"


@dataclass(frozen=True, kw_only=True)
class EpisodeResult:
    """One episode. `steps` counts environment steps up to success or the end.

    Distances are those that the success rule measures, or None if it measures none.
    """

    index: int
    seed: int
    success: bool
    steps: int
    budget: int
    shortest_steps: float | None = None
    start_distance: float | None = None
    end_distance: float | None = None
    wall_between: bool | None = None
    task: str = ""
    violations: int = 0

    @property
    def violated(self) -> bool:
        """Whether a limit of the protocol was broken at any step."""
        return self.violations > 0


@dataclass(frozen=True, kw_only=True)
class SuccessRate:
    """Successes among n episodes."""

    label: str
    n: int
    successes: int

    @property
    def rate(self) -> float:
        """The fraction of successes; 0 without episodes."""
        return self.successes / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval."""
        return wilson_interval(self.successes, self.n)

    @classmethod
    def of(cls, label: str, episodes: Sequence[EpisodeResult]) -> "SuccessRate":
        """Count the successes among episodes."""
        return cls(label=label, n=len(episodes), successes=sum(episode.success for episode in episodes))

    def above(self, floor: "SuccessRate | None") -> tuple[float, float, float] | None:
        """Return the rate with a floor taken off, and its interval, as `above_floor` does; None without a floor."""
        if floor is None or not self.n or not floor.n:
            return None
        return above_floor(self.successes, self.n, floor.successes, floor.n)

    def to_json(self) -> dict[str, Any]:
        """Return the counts, the rate and its interval."""
        return {**asdict(self), "rate": self.rate, "interval": list(self.interval)}


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds per decision and environment; a decision is made for a batch at once.

    `basis` is "plan" if the agent reports its planning time, else "act": the time of a call of `act`.
    """

    basis: str
    decisions: int
    batch_ms: float
    mean_ms: float
    p50_ms: float
    p95_ms: float

    @classmethod
    def of(cls, basis: str, seconds: Sequence[float], environments: Sequence[int]) -> "Latency | None":
        """Summarise decisions by the `seconds` and the number of `environments` of each; None if there are none."""
        if not seconds:
            return None
        total, each = np.array(seconds) * 1e3, np.array(seconds) * 1e3 / np.array(environments)
        return cls(
            basis=basis,
            decisions=len(seconds),
            batch_ms=float(total.mean()),
            mean_ms=float(total.sum() / np.sum(environments)),
            p50_ms=float(np.percentile(each, 50)),
            p95_ms=float(np.percentile(each, 95)),
        )


class _RowValues(Shape):
    method: str
    split: str
    episodes: tuple[EpisodeResult, ...]
    latency: Latency | None
    n: int
    successes: int


class _ResultsValues(Shape):
    protocol: dict[str, Any]
    rows: tuple[_RowValues, ...]
    hardware: dict[str, Any]
    model: str
    training_seed: int | None
    provenance: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Summary:
    """The episodes of one method on one split, and the figures computed from them."""

    method: str
    split: str
    episodes: tuple[EpisodeResult, ...]

    @property
    def overall(self) -> SuccessRate:
        """Success over all episodes."""
        return SuccessRate.of("all", self.episodes)

    @property
    def violated(self) -> SuccessRate:
        """The rate of episodes in which a limit of the protocol was broken; here `successes` counts these episodes."""
        count = sum(episode.violated for episode in self.episodes)
        return SuccessRate(label="violated", n=len(self.episodes), successes=count)

    @property
    def solved_at_start(self) -> int:
        """The number of starts that already satisfy their goal: successes without an action, equal for all methods."""
        return sum(episode.success and episode.steps == 0 for episode in self.episodes)

    @property
    def pairs(self) -> str:
        """A digest of all starts and goals in their order; equal for methods that were evaluated on the same pairs."""
        return hashlib.blake2b("".join(episode.task for episode in self.episodes).encode(), digest_size=8).hexdigest()

    @property
    def spl(self) -> float | None:
        """Success weighted by path length (Anderson et al. 2018), or None if no shortest path is known."""
        terms = []
        for episode in self.episodes:
            if episode.shortest_steps is not None:
                longest = max(episode.steps, episode.shortest_steps)
                terms.append(episode.success * (episode.shortest_steps / longest if longest else 1.0))
        return float(np.mean(terms)) if terms else None

    @property
    def steps_over_shortest(self) -> float | None:
        """The mean ratio of steps used to the fewest needed, over successes."""
        ratios = [
            episode.steps / episode.shortest_steps
            for episode in self.episodes
            if episode.success and episode.shortest_steps
        ]
        return float(np.mean(ratios)) if ratios else None

    @property
    def by_wall(self) -> list[SuccessRate]:
        """Success with and without a wall between start and goal; empty if the world does not report walls."""
        groups = [
            SuccessRate.of(label, [episode for episode in self.episodes if episode.wall_between is wall])
            for label, wall in (("wall between", True), ("no wall between", False))
        ]
        return [group for group in groups if group.n]


@dataclass(frozen=True, kw_only=True)
class Row(_Summary):
    """One method on one split."""

    latency: Latency | None = None


@dataclass(frozen=True, kw_only=True)
class DistanceBins:
    """Bins of goal distance within a split, the same for every method: the measure's name and the edges."""

    measure: str
    attribute: str
    edges: tuple[float, ...]

    @classmethod
    def of(cls, episodes: Sequence[EpisodeResult], unit: str = "") -> "DistanceBins | None":
        """Choose up to five bins with similar counts, by shortest path or else distance; None if neither is known."""
        for measure, attribute in (
            ("shortest path (steps)", "shortest_steps"),
            (f"start-goal distance{f' ({unit})' if unit else ''}", "start_distance"),
        ):
            values = [getattr(episode, attribute) for episode in episodes]
            if values and None not in values:
                return cls(measure=measure, attribute=attribute, edges=_edges(np.array(values)))
        return None

    def split(self, episodes: Sequence[EpisodeResult]) -> list[tuple[SuccessRate, float]]:
        """Return the success rate and the mean distance of each bin that is not empty."""
        values = np.array([getattr(episode, self.attribute) for episode in episodes])
        places = np.clip(np.digitize(values, self.edges) - 1, 0, len(self.edges) - 2)
        groups = []
        for place, (low, high) in enumerate(zip(self.edges[:-1], self.edges[1:], strict=True)):
            inside = [episode for episode, found in zip(episodes, places, strict=True) if found == place]
            if inside:
                rate = SuccessRate.of(f"{low:g} to {high:g}", inside)
                groups.append((rate, float(values[places == place].mean())))
        return groups


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """Frames and path of one episode, for pictures; never written to `results.json`."""

    method: str
    split: str
    seed: int
    success: bool
    steps: int
    frames: np.ndarray | None  # uint8 (T+1, H, W, C)
    goal: np.ndarray | None  # uint8 (H, W, C)
    path: np.ndarray | None  # (T+1, L), the success rule's vector, else the info 'position'
    target: np.ndarray | None  # (L,), the same vector at the goal


@dataclass(frozen=True, kw_only=True)
class Results:
    """All rows of one evaluation; `recordings` are for pictures and are not saved."""

    protocol: Protocol
    rows: tuple[Row, ...]
    hardware: Mapping[str, Any]
    model: str = ""
    training_seed: int | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    recordings: tuple[Recording, ...] = field(default=(), compare=False, repr=False)

    @property
    def methods(self) -> list[str]:
        """The methods, in the order of evaluation."""
        return list(dict.fromkeys(row.method for row in self.rows))

    def bins(self, split: str) -> DistanceBins | None:
        """Return the bins of goal distance that all rows of a split share."""
        episodes = next((row.episodes for row in self.rows if row.split == split), ())
        return DistanceBins.of(episodes, self.protocol.success.unit)

    def row(self, method: str, split: str) -> Row:
        """Return one row.

        Raises:
            ConfigError: there is no row for this method and split.
        """
        for row in self.rows:
            if (row.method, row.split) == (method, split):
                return row
        raise ConfigError(
            f"no row for method {method!r} and split {split!r}; the rows are "
            f"{', '.join(f'{row.method!r} on {row.split!r}' for row in self.rows)}. Choose one of these"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the content of `results.json`."""
        return {
            "format": FORMAT,
            "kind": _KIND,
            "worldloom": worldloom.__version__,
            "protocol": {
                **self.protocol.model_dump(mode="json"),
                "title": self.protocol.title,
                "fingerprint": self.protocol.fingerprint,
                "conventions": self.protocol.describe(),
            },
            "model": self.model,
            "training_seed": self.training_seed,
            "hardware": dict(self.hardware),
            "provenance": dict(self.provenance),
            "rows": [self._row_json(row) for row in self.rows],
        }

    def _row_json(self, row: Row) -> dict[str, Any]:
        bins = self.bins(row.split)
        return {
            "method": row.method,
            "split": row.split,
            "protocol": self.protocol.title,
            "protocol_fingerprint": self.protocol.fingerprint,
            **_common_json(self, row),
            **({"violated": row.violated.to_json()} if self.protocol.limits else {}),
            "seeds": {"evaluation": self.protocol.seed, "training": self.training_seed},
            "spl": row.spl,
            "steps_over_shortest": row.steps_over_shortest,
            "by_distance": {
                "measure": bins.measure if bins else None,
                "bins": [
                    {**rate.to_json(), "mean_distance": mean}
                    for rate, mean in (bins.split(row.episodes) if bins else [])
                ],
            },
            "by_wall": [rate.to_json() for rate in row.by_wall],
            "latency": asdict(row.latency) if row.latency else None,
            "hardware": self.hardware.get("accelerator") or self.hardware.get("processor"),
            "threads": self.hardware.get("threads"),
            "model": self.model,
            "episodes": [asdict(episode) for episode in row.episodes],
        }

    @classmethod
    def from_json(cls, value: Any, *, where: str = "results") -> "Results":
        """Build results from the content of `results.json`.

        Raises:
            StorageError: the content has a different kind or format, or its counts do not match its episodes.
        """
        if not isinstance(value, Mapping) or value.get("kind") != _KIND or value.get("format") != FORMAT:
            found = (value.get("kind"), value.get("format")) if isinstance(value, Mapping) else type(value).__name__
            raise StorageError(f"{where}: expected kind {_KIND!r} in format {FORMAT}; got {found}. Evaluate again")
        read = check_shape(value, _ResultsValues, where)
        fields = {key: item for key, item in read.protocol.items() if key in Protocol.model_fields}
        try:
            protocol = Protocol.parse(fields)
        except ConfigError as error:
            raise StorageError(f"{where}: the protocol is damaged ({error}). Evaluate again") from error
        results = cls(
            protocol=protocol,
            rows=tuple(
                Row(method=row.method, split=row.split, episodes=row.episodes, latency=row.latency) for row in read.rows
            ),
            hardware=read.hardware,
            model=read.model,
            training_seed=read.training_seed,
            provenance=read.provenance,
        )
        for row, given in zip(results.rows, read.rows, strict=True):
            if (row.overall.n, row.overall.successes) != (given.n, given.successes):
                raise StorageError(
                    f"{where}: the row of {row.method!r} on {row.split!r} has {given.successes} successes of "
                    f"{given.n}, but its episodes have {row.overall.successes} of {row.overall.n}; the file was "
                    f"changed. Evaluate again"
                )
        return results

    def write(self, path: Path) -> None:
        """Write `results.json` atomically."""
        write_json(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read a `results.json`, which has no recordings."""
        return cls.from_json(read_json(path), where=str(path))


@dataclass(frozen=True, kw_only=True)
class PooledRow(_Summary):
    """One method on one split over several trained models; `episodes` are the episodes of all `runs`."""

    runs: tuple[Row, ...]

    @classmethod
    def of(cls, runs: Sequence[Row]) -> "PooledRow":
        """Pool rows of one method and split."""
        episodes = tuple(episode for run in runs for episode in run.episodes)
        return cls(method=runs[0].method, split=runs[0].split, episodes=episodes, runs=tuple(runs))

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest rate of a single model."""
        rates = [run.overall.rate for run in self.runs]
        return min(rates), max(rates)


@dataclass(frozen=True, kw_only=True)
class PooledResults:
    """Evaluations of several trained models under one protocol.

    The pooled interval treats all episodes as independent, which is only approximately true: models share goals, and
    the episodes of one model share its errors. So the lowest and highest rate of a single model are reported too.
    """

    protocol: Protocol
    rows: tuple[PooledRow, ...]
    training_seeds: tuple[int | None, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the pooled rows as JSON values, with an explanation of the interval."""
        return {
            "format": FORMAT,
            "kind": "worldloom pooled results",
            "protocol": self.protocol.title,
            "protocol_fingerprint": self.protocol.fingerprint,
            "training_seeds": list(self.training_seeds),
            "interval_meaning": "Wilson 95% over all episodes taken as independent; models share goals, and "
            "episodes of one model share its faults, so see also the range over models",
            "rows": [
                {
                    "method": row.method,
                    "split": row.split,
                    **_common_json(self, row),
                    "lowest": row.range[0],
                    "highest": row.range[1],
                    "rates": [run.overall.rate for run in row.runs],
                    "spl": row.spl,
                    "steps_over_shortest": row.steps_over_shortest,
                    **({"violated": row.violated.to_json()} if self.protocol.limits else {}),
                }
                for row in self.rows
            ],
        }


def floor_of(results: Results | PooledResults, split: str) -> SuccessRate | None:
    """Return the success rate of random actions on a split; None if they were not evaluated."""
    return next((row.overall for row in results.rows if (row.method, row.split) == (FLOOR, split)), None)


def _common_json(results: Results | PooledResults, row: Row | PooledRow) -> dict[str, Any]:
    floor = floor_of(results, row.split)
    above = row.overall.above(floor)
    return {
        "pairs": row.pairs,
        **{key: value for key, value in row.overall.to_json().items() if key != "label"},
        "solved_at_start": row.solved_at_start,
        "floor": None if floor is None else floor.rate,
        "above_floor": None if above is None else {"rate": above[0], "interval": list(above[1:])},
    }


def pool(results: Sequence[Results]) -> PooledResults:
    """Merge evaluations of several trained models into one row for each method and split.

    Raises:
        ConfigError: there are no evaluations, or their protocols or methods differ.
    """
    if not results:
        raise ConfigError("expected at least one evaluation to pool; got none. Pass their results")
    first = results[0]
    for other in results[1:]:
        if other.protocol.fingerprint != first.protocol.fingerprint:
            raise ConfigError(
                f"cannot pool {first.protocol.title} ({first.protocol.fingerprint}) with {other.protocol.title} "
                f"({other.protocol.fingerprint}); evaluate all models under one protocol"
            )
        if {(row.method, row.split) for row in other.rows} != {(row.method, row.split) for row in first.rows}:
            raise ConfigError(
                f"cannot pool {', '.join(f'{row.method!r} on {row.split!r}' for row in first.rows)} with "
                f"{', '.join(f'{row.method!r} on {row.split!r}' for row in other.rows)}. Evaluate the same methods on "
                f"the same splits"
            )
    return PooledResults(
        protocol=first.protocol,
        rows=tuple(PooledRow.of([result.row(row.method, row.split) for result in results]) for row in first.rows),
        training_seeds=tuple(result.training_seed for result in results),
    )


def table_rows(results: Results | PooledResults) -> list[list[str]]:
    """Return a header and one row of text for each method: success by split, path length, latency.

    If random actions were evaluated too, there is a column for the success rate with theirs taken off.
    """
    splits = list(dict.fromkeys(row.split for row in results.rows))
    methods = list(dict.fromkeys(row.method for row in results.rows))
    cells: dict[tuple[str, str], Row | PooledRow] = {(row.method, row.split): row for row in results.rows}
    logged = results.protocol.goal_source == "logged-policy"
    heads = [_split_head(next(row for row in results.rows if row.split == split), logged) for split in splits]
    limited, floors = bool(results.protocol.limits), {split: floor_of(results, split) for split in splits}
    floored = len(methods) > 1 and any(floors.values())
    rows = [
        [
            "method",
            *heads,
            *(["above the floor"] if floored else []),
            *(["limits broken"] if limited else []),
            "steps / shortest",
            "SPL",
            "ms per decision",
        ]
    ]
    for method in methods:
        mine = [cells[method, split] for split in splits if (method, split) in cells]
        rows.append(
            [
                method,
                *(_success_text(cells[method, split]) if (method, split) in cells else "-" for split in splits),
                *([" / ".join(_above_share(row, floors[row.split]) for row in mine)] if floored else []),
                *([" / ".join(_rate_text(row.violated) for row in mine)] if limited else []),
                " / ".join(_number(row.steps_over_shortest) for row in mine),
                " / ".join(_number(row.spl) for row in mine),
                " / ".join(_latency_text(row) for row in mine),
            ]
        )
    return rows


def _split_head(row: Row | PooledRow, logged: bool) -> str:
    """Return a split's name, its count and, for `logged` goals, the share that the start already satisfies."""
    solved = f", {row.solved_at_start / row.overall.n:.1%} solved at the start" if logged else ""
    return f"{row.split} (n={row.overall.n}{solved})"


def _success_text(row: Row | PooledRow) -> str:
    text = _rate_text(row.overall)
    if isinstance(row, PooledRow):
        text += f" models {100 * row.range[0]:.1f} to {100 * row.range[1]:.1f}"
    return text


def _rate_text(rate: SuccessRate) -> str:
    low, high = rate.interval
    return f"{rate.rate:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def above_text(value: tuple[float, float, float] | None) -> str:
    """Return a rate above the floor and its interval, in percent; "-" if there is none."""
    return "-" if value is None else f"{value[0]:.1%} [{100 * value[1]:.1f}, {100 * value[2]:.1f}]"


def _above_share(row: Row | PooledRow, floor: SuccessRate | None) -> str:
    """Return the rate above the floor without its interval, for which a table has no room."""
    above = row.overall.above(floor)
    return "-" if above is None else f"{above[0]:.1%}"


def _latency_text(row: Row | PooledRow) -> str:
    latencies = [row.latency] if isinstance(row, Row) else [run.latency for run in row.runs]
    known = [latency.mean_ms for latency in latencies if latency is not None]
    return _number(float(np.mean(known))) if known else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _edges(values: np.ndarray) -> tuple[float, ...]:
    """Return round numbers as the edges of up to five bins, each with at least about 15 values."""
    low, high = float(values.min()), float(values.max())
    count = int(np.clip(len(values) // 15, 1, 5))
    scale = 10.0 ** math.floor(math.log10(max(high - low, 1e-9) / 10))
    inner = {round(float(edge) / scale) for edge in np.quantile(values, np.linspace(0, 1, count + 1)[1:-1])}
    first = math.floor(low / scale)
    last = max(math.floor(high / scale) + 1, first + 1)
    places = [first, *sorted(place for place in inner if first < place < last), last]
    return tuple(round(float(place * scale), 10) for place in places)
