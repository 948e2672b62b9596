"""From the owners' deltas to one: capped weights, and means that a few bad deltas cannot carry away.

Deltas are read tensor by tensor, owners in the order of their names, and summed in double precision: memory does not
grow with what an owner sends, and a recomputation gives the same bits. Means, norms and distances hold at most two
owners' tensors at a time; the median and the trimmed mean hold one tensor of every owner.
"""

import math
import statistics
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor

from worldloom.core.config import Component, component_of
from worldloom.core.errors import ConfigError, DataError
from worldloom.core.registry import Registry
from worldloom.federation.rules.partition import check_finite

Source = Callable[[str], Tensor]
"""Reads one tensor of an owner's delta by its name."""

_ROUNDING = Fraction(1, 10**9)  # a cap of 1/3 as a float is a little less than a third


@dataclass(frozen=True, kw_only=True, eq=False)
class Aggregate:
    """The one delta, in single precision, with each owner's weight in it, and what was done to whose."""

    tensors: dict[str, Tensor]
    weights: Mapping[str, float]
    notes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def capped(weights: Mapping[str, float], cap: float) -> dict[str, float]:
    """Return weights that sum to 1, none above `cap`, those below it in their given proportions.

    What is over the cap is poured over the others in proportion, until none is over it. The sums are exact, so that
    this holds for weights of any magnitude. A weight of 0 stays 0: who has no say is given none to keep a cap.

    Raises:
        ConfigError: a weight is negative or not finite, all are 0, or so few owners cannot keep the cap.
    """
    wrong = {owner: weight for owner, weight in weights.items() if not (math.isfinite(weight) and weight >= 0)}
    if wrong:
        raise ConfigError(f"expected finite weights of 0 or more; got {wrong}")
    if not 0 < cap <= 1:
        raise ConfigError(f"expected a cap above 0 and at most 1; got {cap}")
    free = {owner: Fraction(weight) for owner, weight in sorted(weights.items()) if weight > 0}
    most = Fraction(cap)
    if len(free) * most < 1 - _ROUNDING:
        raise ConfigError(
            f"{len(free)} owners of a weight above 0 cannot each have at most {cap} of the influence; expected a cap "
            f"of {1 / len(free) if free else 1:.4g} or more, or more owners"
        )
    share, found = Fraction(1), dict.fromkeys(weights, 0.0)
    while free:
        total = sum(free.values())
        over = [owner for owner, weight in free.items() if weight * share > most * total]
        if not over:
            # Rounding to a float is monotone: what is at most the cap stays so.
            found.update({owner: float(weight * share / total) for owner, weight in free.items()})
            break
        for owner in over:
            found[owner] = float(most)
            del free[owner]
        share -= most * len(over)
    return found


class Aggregator(Component):
    """A way to make one delta of many."""

    @abstractmethod
    def aggregate(
        self,
        sources: Mapping[str, Source],
        weights: Mapping[str, float],
        shapes: Mapping[str, torch.Size],
        *,
        cap: float = 1.0,
    ) -> Aggregate:
        """Aggregate the tensors of these names and shapes; owners of weight 0 are not read.

        `cap` bounds an owner's weight where some are left out and the others' weights grow.

        Raises:
            DataError: a tensor is not finite or of another shape; it and its owner are named.
            ConfigError: the weights are not those of the owners or do not sum to 1, or there are too few owners.
        """


AGGREGATORS: Registry[type[Aggregator]] = Registry("aggregator")

AggregatorField = Annotated[SerializeAsAny[Aggregator], BeforeValidator(component_of(AGGREGATORS))]


@AGGREGATORS.register("mean")
class Mean(Aggregator):
    """The weighted mean: bounds nobody's delta."""

    name: Literal["mean"] = "mean"

    def aggregate(
        self,
        sources: Mapping[str, Source],
        weights: Mapping[str, float],
        shapes: Mapping[str, torch.Size],
        *,
        cap: float = 1.0,
    ) -> Aggregate:
        """Aggregate; see `Aggregator`."""
        used = _used(sources, weights)
        return Aggregate(tensors=_mean(sources, used, shapes), weights=dict(weights))


@AGGREGATORS.register("clipped-mean")
class ClippedMean(Aggregator):
    """The weighted mean of deltas whose norm over all tensors is at most a limit.

    The limit is `limit`, and where there is none `multiple` times the median of the owners' norms.
    """

    name: Literal["clipped-mean"] = "clipped-mean"
    limit: float | None = Field(default=None, gt=0)
    multiple: float = Field(default=1.0, gt=0)

    def aggregate(
        self,
        sources: Mapping[str, Source],
        weights: Mapping[str, float],
        shapes: Mapping[str, torch.Size],
        *,
        cap: float = 1.0,
    ) -> Aggregate:
        """Aggregate; see `Aggregator`."""
        used = _used(sources, weights)
        norms = {owner: _norm(sources, owner, shapes) for owner in used}
        limit = self.multiple * statistics.median(norms.values()) if self.limit is None else self.limit
        factors = {owner: 1.0 if norm <= limit else limit / norm for owner, norm in norms.items()}
        tensors = _mean(sources, {owner: weight * factors[owner] for owner, weight in used.items()}, shapes)
        notes = {owner: {"norm": norms[owner], "factor": factors[owner]} for owner in used}
        return Aggregate(tensors=tensors, weights=dict(weights), notes=notes)


@AGGREGATORS.register("coordinate-median")
class CoordinateMedian(Aggregator):
    """The weighted median of each coordinate (Yin et al. 2018, arXiv 1803.01498); the middle of two that tie.

    Whoever has less than half of the weight cannot move a coordinate beyond the values of the others.
    """

    name: Literal["coordinate-median"] = "coordinate-median"

    def aggregate(
        self,
        sources: Mapping[str, Source],
        weights: Mapping[str, float],
        shapes: Mapping[str, torch.Size],
        *,
        cap: float = 1.0,
    ) -> Aggregate:
        """Aggregate; see `Aggregator`."""
        used = _used(sources, weights)
        tensors = {}
        for name in sorted(shapes):
            values, heights = _sorted(sources, used, name, shapes[name])
            reached = heights.cumsum(0)
            half = 0.5 * reached[-1:]
            low = (reached < half * (1 - 1e-12)).sum(0, keepdim=True)
            high = (reached <= half * (1 + 1e-12)).sum(0, keepdim=True)
            middle = 0.5 * (values.gather(0, low) + values.gather(0, high))
            tensors[name] = middle[0].float()
        return Aggregate(tensors=tensors, weights=dict(weights))


@AGGREGATORS.register("trimmed-mean")
class TrimmedMean(Aggregator):
    """The weighted mean of each coordinate without the share `trim` of the owners at either end (Yin et al. 2018).

    It bears as many bad owners as it trims at one end. Over the rest of a coordinate the weights are scaled to 1, so a
    cap on them holds of all coordinates together, not of each.
    """

    name: Literal["trimmed-mean"] = "trimmed-mean"
    trim: float = Field(default=0.2, ge=0, lt=0.5)

    def aggregate(
        self,
        sources: Mapping[str, Source],
        weights: Mapping[str, float],
        shapes: Mapping[str, torch.Size],
        *,
        cap: float = 1.0,
    ) -> Aggregate:
        """Aggregate; see `Aggregator`."""
        used = _used(sources, weights)
        # In decimals as they are written: 0.2 of 5 owners is one, whatever a float makes of it.
        cut = math.floor(Fraction(str(self.trim)) * len(used))
        tensors = {}
        for name in sorted(shapes):
            values, heights = (part[cut : len(used) - cut] for part in _sorted(sources, used, name, shapes[name]))
            tensors[name] = ((values * heights).sum(0) / heights.sum(0)).float()
        return Aggregate(tensors=tensors, weights=dict(weights), notes={owner: {"trimmed": cut} for owner in used})


@AGGREGATORS.register("krum")
class Krum(Aggregator):
    """The weighted mean of the deltas nearest to their neighbours (multi-Krum, Blanchard et al. 2017).

    A delta's score is the sum of its squared distances to the n - bad - 2 nearest; the `kept` of lowest score are
    averaged, by default n - bad. With `kept` of 1 it is Krum. Needs n >= 2 bad + 3 owners.
    """

    name: Literal["krum"] = "krum"
    bad: int = Field(default=1, ge=0)
    kept: int | None = Field(default=None, ge=1)

    def aggregate(
        self,
        sources: Mapping[str, Source],
        weights: Mapping[str, float],
        shapes: Mapping[str, torch.Size],
        *,
        cap: float = 1.0,
    ) -> Aggregate:
        """Aggregate; see `Aggregator`."""
        used = _used(sources, weights)
        owners = list(used)
        if len(owners) < 2 * self.bad + 3:
            raise ConfigError(
                f"krum bears {self.bad} bad owners among {2 * self.bad + 3} or more; got {len(owners)}: lower bad, "
                f"raise the quorum, or take another aggregator"
            )
        distances = _distances(sources, owners, shapes)
        near = len(owners) - self.bad - 2
        scores = {
            owner: math.fsum(sorted(distances[owner, other] for other in owners if other != owner)[:near])
            for owner in owners
        }
        count = min(self.kept or len(owners) - self.bad, len(owners) - self.bad)
        chosen = set(sorted(owners, key=lambda owner: (scores[owner], owner))[:count])
        final = capped({owner: used[owner] if owner in chosen else 0.0 for owner in owners}, cap)
        notes = {owner: {"score": scores[owner], "dropped": owner not in chosen} for owner in owners}
        tensors = _mean(sources, {owner: weight for owner, weight in final.items() if weight > 0}, shapes)
        return Aggregate(tensors=tensors, weights={**dict.fromkeys(weights, 0.0), **final}, notes=notes)


def _used(sources: Mapping[str, Source], weights: Mapping[str, float]) -> dict[str, float]:
    """Return the weights above 0 in the order of the owners' names."""
    total = math.fsum(weights.values())
    if set(sources) != set(weights) or not abs(total - 1) < 1e-6 or min(weights.values()) < 0:
        raise ConfigError(
            f"expected a weight of 0 or more for each of {sorted(sources)}, in sum 1; got {dict(weights)}: "
            f"make them with `capped`"
        )
    return {owner: weight for owner, weight in sorted(weights.items()) if weight > 0}


def _read(sources: Mapping[str, Source], owner: str, name: str, shape: torch.Size) -> Tensor:
    tensor = sources[owner](name).detach().cpu().double()
    if tuple(tensor.shape) != tuple(shape):
        raise DataError(f"tensor {name!r} of {owner!r} has shape {tuple(tensor.shape)}; expected {tuple(shape)}")
    check_finite(name, tensor, f" of {owner!r}")
    return tensor


def _mean(
    sources: Mapping[str, Source], weights: Mapping[str, float], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Return the sum of each owner's tensor times its weight."""
    tensors = {}
    for name in sorted(shapes):
        total = torch.zeros(shapes[name], dtype=torch.float64)
        for owner, weight in weights.items():
            # Two steps, not one fused: a fused one rounds otherwise on some machines.
            total += _read(sources, owner, name, shapes[name]).mul_(weight)
        tensors[name] = total.float()
    return tensors


def _norm(sources: Mapping[str, Source], owner: str, shapes: Mapping[str, torch.Size]) -> float:
    return math.sqrt(math.fsum(_square(_read(sources, owner, name, shapes[name])) for name in sorted(shapes)))


def _distances(
    sources: Mapping[str, Source], owners: list[str], shapes: Mapping[str, torch.Size]
) -> dict[tuple[str, str], float]:
    """Return the squared distance of each two owners' deltas."""
    found = {(one, other): 0.0 for one in owners for other in owners}
    for name in sorted(shapes):
        for i, one in enumerate(owners):
            tensor = _read(sources, one, name, shapes[name])
            for other in owners[i + 1 :]:
                found[one, other] += _square(tensor - _read(sources, other, name, shapes[name]))
                found[other, one] = found[one, other]
    return found


def _square(tensor: Tensor) -> float:
    # One thread's order of summing, whatever the machine: torch splits a long sum by its number of threads.
    flat = tensor.reshape(-1).square()
    while len(flat) > 1:
        if len(flat) % 2:
            flat = torch.cat([flat, flat.new_zeros(1)])
        flat = flat[::2] + flat[1::2]
    return float(flat[0]) if len(flat) else 0.0


def _sorted(
    sources: Mapping[str, Source], weights: Mapping[str, float], name: str, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """Return the owners' values (N, *shape) of one tensor in rising order at each place, and their weights so."""
    values = torch.stack([_read(sources, owner, name, shape) for owner in weights])
    values, order = values.sort(dim=0, stable=True)
    return values, torch.tensor(list(weights.values()), dtype=torch.float64)[order]
