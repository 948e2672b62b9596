"""Aggregation of the owners' deltas: capped weights, and means that are robust against a few bad deltas.

Deltas are read one tensor at a time, with the owners in the order of their names, and summed in double precision, so
that memory stays bounded and a recomputation is bit-identical. Means, norms and distances need at most two owners'
tensors in memory; the median and the trimmed mean need one tensor of every owner.
"""

import math
import statistics
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from worldloom.core.config import Component
from worldloom.core.errors import ConfigError, DataError
from worldloom.core.registry import Registry
from worldloom.federation.rounds.base import check_values

Source = Callable[[str], Tensor]
"""A function that reads one tensor of an owner's delta by name."""

_ROUNDING = Fraction(1, 10**9)  # a cap of 1/3 as a float is a little less than a third


@dataclass(frozen=True, kw_only=True, eq=False)
class Aggregate:
    """The aggregated delta in single precision, each owner's weight in it, and notes such as clipping factors."""

    tensors: dict[str, Tensor]
    weights: Mapping[str, float]
    notes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def capped(weights: Mapping[str, float], cap: float) -> dict[str, float]:
    """Return weights that sum to 1 and do not exceed `cap`; weights below the cap keep their proportions.

    The excess over the cap is distributed among the other weights in proportion, until no weight exceeds the cap. Sums
    are exact, so weights may have any magnitude. A weight of 0 stays 0.

    Raises:
        ConfigError: a weight is negative or not finite, all weights are 0, or there are too few owners for the cap.
    """
    wrong = {owner: weight for owner, weight in weights.items() if not (math.isfinite(weight) and weight >= 0)}
    if wrong:
        raise ConfigError(f"expected finite weights of 0 or more; got {wrong}. Correct these weights")
    if not 0 < cap <= 1:
        raise ConfigError(f"expected a cap above 0 and at most 1; got {cap}. Correct the cap")
    free = {owner: Fraction(weight) for owner, weight in sorted(weights.items()) if weight > 0}
    most = Fraction(cap)
    if len(free) * most < 1 - _ROUNDING:
        raise ConfigError(
            f"{len(free)} weights above 0, at most {cap} each, cannot sum to 1. Raise the cap to at least "
            f"{1 / len(free) if free else 1:.4g}, or add owners"
        )
    share, found = Fraction(1), dict.fromkeys(weights, 0.0)
    while free:
        total = sum(free.values())
        over = [owner for owner, weight in free.items() if weight * share > most * total]
        if not over:
            # Rounding to a float is monotone, so a weight cannot rise above the cap.
            found.update({owner: float(weight * share / total) for owner, weight in free.items()})
            break
        for owner in over:
            found[owner] = float(most)
            del free[owner]
        share -= most * len(over)
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Deltas:
    """The owners' deltas of a round, read one tensor at a time, and the owners' weights.

    The deltas of owners with weight 0 are never read. `cap` bounds the weights of the remaining owners when an
    aggregator drops some owners.

    Raises:
        ConfigError: `sources` and `weights` have different owners, or the weights do not sum to 1.
    """

    sources: Mapping[str, Source]
    weights: Mapping[str, float]
    shapes: Mapping[str, torch.Size]
    cap: float = 1.0

    def __post_init__(self) -> None:
        total = math.fsum(self.weights.values())
        if set(self.sources) != set(self.weights) or not abs(total - 1) < 1e-6 or min(self.weights.values()) < 0:
            raise ConfigError(
                f"expected weights of 0 or more for {sorted(self.sources)} that sum to 1; got "
                f"{dict(self.weights)}. Compute them with `capped`"
            )

    @property
    def used(self) -> dict[str, float]:
        """The weights above 0, in the order of the owners' names."""
        return {owner: weight for owner, weight in sorted(self.weights.items()) if weight > 0}

    @property
    def names(self) -> list[str]:
        """The names of the tensors, in order."""
        return sorted(self.shapes)

    def read(self, owner: str, name: str) -> Tensor:
        """Read one tensor in double precision.

        Raises:
            DataError: the tensor is not finite or has a wrong shape; the message names the tensor and its owner.
        """
        tensor, shape = self.sources[owner](name).detach().cpu().double(), self.shapes[name]
        if tuple(tensor.shape) != tuple(shape):
            raise DataError(
                f"tensor {name!r} of {owner!r} has shape {tuple(tensor.shape)}, not {tuple(shape)}; leave {owner!r} out"
            )
        check_values(name, tensor, f" of {owner!r}")
        return tensor

    def mean(self, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """Return the weighted sum of the owners' deltas, in single precision."""
        tensors = {}
        for name in self.names:
            total = torch.zeros(self.shapes[name], dtype=torch.float64)
            for owner, weight in weights.items():
                # Multiply first, then add: a fused operation rounds differently on some machines.
                total += self.read(owner, name).mul_(weight)
            tensors[name] = total.float()
        return tensors

    def norm(self, owner: str) -> float:
        """Return the L2 norm of an owner's delta over all tensors."""
        return math.sqrt(math.fsum(_square(self.read(owner, name)) for name in self.names))

    def distances(self) -> dict[tuple[str, str], float]:
        """Return the squared L2 distance between the deltas of each pair of owners."""
        owners = list(self.used)
        found = {(one, other): 0.0 for one in owners for other in owners}
        for name in self.names:
            for i, one in enumerate(owners):
                tensor = self.read(one, name)
                for other in owners[i + 1 :]:
                    found[one, other] += _square(tensor - self.read(other, name))
                    found[other, one] = found[one, other]
        return found

    def ranked(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the owners' values (N, *shape) of a tensor, sorted per coordinate, and the weights in this order."""
        values, order = torch.stack([self.read(owner, name) for owner in self.used]).sort(dim=0, stable=True)
        return values, torch.tensor(list(self.used.values()), dtype=torch.float64)[order]


class Aggregator(Component):
    """A method that combines many deltas into one."""

    @abstractmethod
    def aggregate(self, deltas: Deltas) -> Aggregate:
        """Aggregate the deltas.

        Raises:
            DataError: a tensor is not finite or has a wrong shape; the message names the tensor and its owner.
            ConfigError: there are too few owners.
        """

    def fault(self, quorum: int, members: int, cap: float) -> str:
        """Return why a round of `quorum` to `members` owners cannot be aggregated; an empty string if it can."""
        return ""


AGGREGATORS: Registry[type[Aggregator]] = Registry("aggregator")


@AGGREGATORS.register("mean")
class Mean(Aggregator):
    """The weighted mean, without any bound on a single delta."""

    name: Literal["mean"] = "mean"

    def aggregate(self, deltas: Deltas) -> Aggregate:
        """Aggregate; see `Aggregator`."""
        return Aggregate(tensors=deltas.mean(deltas.used), weights=dict(deltas.weights))


@AGGREGATORS.register("clipped-mean")
class ClippedMean(Aggregator):
    """The weighted mean of deltas, each clipped to a largest L2 norm over all its tensors.

    The largest norm is `limit`. By default it is `multiple` times the median of the owners' norms.
    """

    name: Literal["clipped-mean"] = "clipped-mean"
    limit: float | None = Field(default=None, gt=0)
    multiple: float = Field(default=1.0, gt=0)

    def aggregate(self, deltas: Deltas) -> Aggregate:
        """Aggregate; see `Aggregator`."""
        used = deltas.used
        norms = {owner: deltas.norm(owner) for owner in used}
        limit = self.multiple * statistics.median(norms.values()) if self.limit is None else self.limit
        factors = {owner: 1.0 if norm <= limit else limit / norm for owner, norm in norms.items()}
        tensors = deltas.mean({owner: weight * factors[owner] for owner, weight in used.items()})
        notes = {owner: {"norm": norms[owner], "factor": factors[owner]} for owner in used}
        return Aggregate(tensors=tensors, weights=dict(deltas.weights), notes=notes)


@AGGREGATORS.register("coordinate-median")
class CoordinateMedian(Aggregator):
    """The weighted median of each coordinate (Yin et al. 2018, arXiv 1803.01498).

    If the cumulative weight is exactly half at a value, the median is the mean of that value and the next one. An owner
    with less than half of the weight cannot move a coordinate out of the range of the other owners' values.
    """

    name: Literal["coordinate-median"] = "coordinate-median"

    def aggregate(self, deltas: Deltas) -> Aggregate:
        """Aggregate; see `Aggregator`."""
        tensors = {}
        for name in deltas.names:
            values, heights = deltas.ranked(name)
            reached = heights.cumsum(0)
            half = 0.5 * reached[-1:]
            low = (reached < half * (1 - 1e-12)).sum(0, keepdim=True)
            high = (reached <= half * (1 + 1e-12)).sum(0, keepdim=True)
            median = 0.5 * (values.gather(0, low) + values.gather(0, high))
            tensors[name] = median[0].float()
        return Aggregate(tensors=tensors, weights=dict(deltas.weights))


@AGGREGATORS.register("trimmed-mean")
class TrimmedMean(Aggregator):
    """The weighted mean of each coordinate, without the lowest and highest values (Yin et al. 2018).

    At each end, the values of a share `trim` of the owners are dropped. The mean tolerates as many bad owners as are
    dropped at one end. The remaining weights are scaled to sum to 1 in each coordinate, so an owner's weight in one
    coordinate may exceed the cap.
    """

    name: Literal["trimmed-mean"] = "trimmed-mean"
    trim: float = Field(default=0.2, ge=0, lt=0.5)

    def fault(self, quorum: int, members: int, cap: float) -> str:
        """Return why this does not work; see `Aggregator`."""
        if not self.trim or self._cut(members):
            return ""
        return (
            f"trimmed-mean with trim={self.trim} drops no value of {members} owners, so it is a plain mean. Raise "
            f"'trim' to at least {1 / members:.4g}, add members, or choose another aggregator"
        )

    def _cut(self, owners: int) -> int:
        """Return how many values are dropped at each end."""
        # Computed in exact decimals: 0.2 of 5 owners is 1, although the float 0.2 is not exactly 1/5.
        return math.floor(Fraction(str(self.trim)) * owners)

    def aggregate(self, deltas: Deltas) -> Aggregate:
        """Aggregate; see `Aggregator`."""
        used = deltas.used
        cut = self._cut(len(used))
        tensors = {}
        for name in deltas.names:
            values, heights = (part[cut : len(used) - cut] for part in deltas.ranked(name))
            tensors[name] = ((values * heights).sum(0) / heights.sum(0)).float()
        return Aggregate(
            tensors=tensors, weights=dict(deltas.weights), notes={owner: {"trimmed": cut} for owner in used}
        )


@AGGREGATORS.register("krum")
class Krum(Aggregator):
    """The weighted mean of the deltas nearest to their neighbours (multi-Krum, Blanchard et al. 2017).

    With n owners, a delta's score is the sum of its squared distances to the n - bad - 2 nearest deltas. The `kept`
    deltas with the lowest scores are averaged, by default n - bad deltas. `kept=1` is Krum. At least 2 bad + 3 owners
    are needed.
    """

    name: Literal["krum"] = "krum"
    bad: int = Field(default=1, ge=0)
    kept: int | None = Field(default=None, ge=1)

    def fault(self, quorum: int, members: int, cap: float) -> str:
        """Return why this does not work; see `Aggregator`."""
        if why := self._too_few(members, f"there are {members} members"):
            return f"{why}. Lower 'bad', add members, or choose another aggregator"
        if why := self._too_few(quorum, f"a round may have only the quorum of {quorum}"):
            return f"{why}. Lower 'bad', raise the quorum, or choose another aggregator"
        if self.kept is not None and self.kept > members - self.bad:
            return (
                f"krum with bad={self.bad} keeps at most {members - self.bad} of {members} deltas, not "
                f"kept={self.kept}. Lower 'kept'"
            )
        if (count := self._count(quorum)) * cap < 1 - _ROUNDING:
            return (
                f"krum keeps {count} deltas of a quorum of {quorum}, and {count} weights of at most {cap} each (the "
                f"cap) cannot sum to 1. Raise the cap to at least {1 / count:.4g}, or raise 'kept'"
            )
        return ""

    def _too_few(self, owners: int, found: str) -> str:
        least = 2 * self.bad + 3
        return "" if owners >= least else f"krum with bad={self.bad} needs at least {least} owners, but {found}"

    def _count(self, owners: int) -> int:
        """Return how many deltas are kept."""
        return min(self.kept or owners - self.bad, owners - self.bad)

    def aggregate(self, deltas: Deltas) -> Aggregate:
        """Aggregate; see `Aggregator`."""
        used = deltas.used
        owners = list(used)
        if why := self._too_few(len(owners), f"only {len(owners)} contributed"):
            raise ConfigError(f"{why}. Lower 'bad', raise the quorum, or choose another aggregator")
        distances = deltas.distances()
        near = len(owners) - self.bad - 2
        scores = {
            owner: math.fsum(sorted(distances[owner, other] for other in owners if other != owner)[:near])
            for owner in owners
        }
        chosen = set(sorted(owners, key=lambda owner: (scores[owner], owner))[: self._count(len(owners))])
        final = capped({owner: used[owner] if owner in chosen else 0.0 for owner in owners}, deltas.cap)
        notes = {owner: {"score": scores[owner], "dropped": owner not in chosen} for owner in owners}
        tensors = deltas.mean({owner: weight for owner, weight in final.items() if weight > 0})
        return Aggregate(tensors=tensors, weights={**dict.fromkeys(deltas.weights, 0.0), **final}, notes=notes)


def _square(tensor: Tensor) -> float:
    # Pairwise sums in a fixed order, because torch splits a long sum by its number of threads.
    flat = tensor.reshape(-1).square()
    while len(flat) > 1:
        if len(flat) % 2:
            flat = torch.cat([flat, flat.new_zeros(1)])
        flat = flat[::2] + flat[1::2]
    return float(flat[0]) if len(flat) else 0.0
