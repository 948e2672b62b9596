"""Differential privacy of an owner's delta: clipping, noise, and accounting of the privacy spent.

The protected unit is an owner: an observer of all releases can hardly tell whether an owner took part. The neighbouring
relation adds or removes an owner; a round releases the sum of clipped deltas with noise of deviation `noise * clip`.
Epsilon comes from the closed form of the Gaussian mechanism if every owner takes part in every round, and from Opacus'
Renyi accountant, an upper bound, if owners are sampled.
"""

import math
import secrets
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from worldloom.core.config import Config
from worldloom.core.errors import ConfigError, DataError
from worldloom.core.extras import require

# More than Opacus' own orders: with much noise, the best order is large.
_ORDERS = [1 + tenth / 10 for tenth in range(1, 100)] + [float(order) for order in (*range(11, 65), 96, 128, 256, 512)]
_MOST = 1e6  # larger epsilons guarantee nothing and count as infinite


class PrivacyBudgetSpent(DataError):
    """A round would exceed the privacy budget; it was not counted, and must not run."""


class PrivacyConfig(Config):
    """Clipping, noise and budget; the protected unit is an owner.

    `clip` is the largest L2 norm of a whole shared delta, `noise` the deviation of the noise on the sum of the deltas,
    in clips (0: clipping only, with an infinite epsilon). `epsilon_budget` bounds the epsilon at `delta` of all rounds.
    """

    clip: float = Field(gt=0)
    noise: float = Field(ge=0)
    delta: float = Field(default=1e-5, gt=0, lt=1)
    epsilon_budget: float | None = Field(default=None, gt=0)


def secret_generator() -> torch.Generator:
    """Return a generator seeded by the operating system: whoever knows the seed can subtract the noise."""
    return torch.Generator().manual_seed(secrets.randbits(63))


def clip_and_noise(
    delta: Mapping[str, Tensor], config: PrivacyConfig, generator: torch.Generator, *, share: float = 1.0
) -> dict[str, Tensor]:
    """Return the delta, scaled to a norm of at most `clip`, with Gaussian noise of deviation `noise clip sqrt(share)`.

    With `share` 1 a delta is protected by itself, even from the coordinator. Under secure aggregation each of n owners
    adds 1/n of the variance and only the sum is protected. Use the n that are sure to be in the sum (the threshold,
    less the owners that may collude, because they can subtract their own noise), else the noise is too small.

    The noise consists of floating-point numbers (Mironov 2012 extracts bits from them) from a generator that is not
    cryptographic: it protects against statistical inference, not against recovery of the generator's state.

    Raises:
        ConfigError: `share` is not in (0, 1].
        DataError: a value is not finite, or not a real number.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"expected a share of the noise in (0, 1]; got {share}")
    for name, value in delta.items():
        if not value.is_floating_point():
            raise DataError(f"{name} holds {value.dtype}, to which no noise can be added; declare it sovereign")
        if not bool(torch.isfinite(value).all()):
            raise DataError(f"{name} of the delta has values that are not finite; it may not be sent")
    norm = delta_norm(delta)
    # Slightly below the clip, so that rounding to the tensors' dtype does not raise the norm above it.
    factor = 1.0 if norm <= config.clip else config.clip / norm * (1 - 1e-6)
    deviation = config.noise * config.clip * math.sqrt(share)
    released = {}
    for name in sorted(delta):  # the order of draws does not depend on the order of the mapping
        exact = delta[name].detach().double() * factor
        if deviation:
            exact += torch.randn(exact.shape, generator=generator, dtype=torch.float64) * deviation
        released[name] = exact.to(delta[name].dtype)
    return released


def delta_norm(delta: Mapping[str, Tensor]) -> float:
    """Return the L2 norm of all tensors together."""
    return math.sqrt(sum(float(value.detach().double().square().sum()) for value in delta.values()))


def effective_noise(noise: float, weights: Sequence[float], *, share: float = 1.0) -> float:
    """Return the noise of a weighted sum of noised deltas, in its sensitivity: the largest weight times the clip.

    With equal weights and a share of one over their number this is `noise`; with unequal weights it is less. The
    accountant needs this value.
    """
    if not weights or min(weights) < 0 or max(weights) == 0 or not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"expected finite weights, none negative and one above 0; got {list(weights)}")
    return noise * math.sqrt(share * sum(weight**2 for weight in weights)) / max(weights)


def gaussian_epsilon(noise: float, delta: float) -> float:
    """Return the least epsilon at `delta` of one Gaussian mechanism with this noise, in sensitivities.

    This solves the exact condition of Balle and Wang 2018 (theorem 8) for epsilon. T rounds with noise s each equal one
    round with noise s / sqrt(T) (Dong, Roth and Su 2022).
    """
    from scipy.optimize import brentq
    from scipy.special import log_ndtr

    if noise <= 0:
        return math.inf
    mu = 1 / noise

    def excess(epsilon: float) -> float:
        first, second = log_ndtr(mu / 2 - epsilon / mu), epsilon + log_ndtr(-mu / 2 - epsilon / mu)
        return float(math.exp(first) - math.exp(second)) - delta

    if excess(0.0) <= 0:
        return 0.0
    # At epsilon = mu^2 / 2 + mu z, with z the quantile of delta (below 40 here), the first term alone is below delta.
    most = mu * mu / 2 + 40 * mu
    return float(brentq(excess, 0.0, most, xtol=1e-12)) if most < _MOST else math.inf


class Event(Config):
    """A number of equal rounds: their noise, and the probability that an owner takes part in each."""

    rounds: int = Field(ge=1, strict=True)
    noise: float = Field(ge=0)
    sample_rate: float = Field(gt=0, le=1)


class Accountant:
    """The privacy spent so far; every release must be counted here before it is made.

    `state` holds the rounds that were counted before, as `Accountant.state` returned them.

    Raises:
        DataError: the state is invalid.
    """

    def __init__(self, config: PrivacyConfig, state: Iterable[Mapping[str, Any]] = ()) -> None:
        self.config = config
        try:
            self._events = [Event.parse(entry) for entry in state]
        except (TypeError, ValueError, ConfigError) as error:
            raise DataError(
                f"the privacy accountant's state is invalid ({error}); restore it from the ledger"
            ) from None

    @property
    def epsilon(self) -> float:
        """Epsilon at `config.delta` of all rounds counted: an upper bound."""
        return _epsilon(self._events, self.config.delta)

    def spend(self, rounds: int = 1, sample_rate: float = 1.0, *, noise: float | None = None) -> float:
        """Count rounds, and return epsilon at `config.delta` of all so far.

        A `sample_rate` below 1 improves privacy only if each owner is drawn independently with this probability
        (Poisson sampling) and observers do not learn which owners were drawn. It needs Opacus. `noise` is by default
        that of the config; see `effective_noise`.

        Raises:
            PrivacyBudgetSpent: the budget is too small; nothing was counted.
            ConfigError: a number is out of range, or Opacus is not installed.
        """
        noise = self.config.noise if noise is None else noise
        event = Event.parse({"rounds": rounds, "noise": noise, "sample_rate": sample_rate})
        after = _epsilon([*self._events, event], self.config.delta)
        budget = self.config.epsilon_budget
        if budget is not None and after > budget:
            raise PrivacyBudgetSpent(
                f"{rounds} more round(s) would raise epsilon from {self.epsilon:.4g} to {after:.4g} at delta "
                f"{self.config.delta:g}, above the budget of {budget:g}. Stop here, add noise, or let the members "
                f"agree on another budget"
            )
        self._events.append(event)
        return after

    def state(self) -> list[dict[str, Any]]:
        """Return the rounds counted, as plain JSON."""
        return [event.model_dump() for event in self._events]


def _epsilon(events: Sequence[Event], delta: float) -> float:
    if not events:
        return 0.0
    if any(event.noise == 0 for event in events):
        return math.inf
    # Exact without sampling, and an upper bound with it: taking part less often never costs more.
    everyone = gaussian_epsilon(1 / math.sqrt(sum(event.rounds / event.noise**2 for event in events)), delta)
    if all(event.sample_rate == 1 for event in events):
        return everyone
    accountant = require("opacus.accountants", "weave").RDPAccountant()  # takes seconds to load
    accountant.history = [(event.noise, event.sample_rate, event.rounds) for event in events]
    with warnings.catch_warnings():
        # It warns if the best order is the last one; the result is still an upper bound.
        warnings.filterwarnings("ignore", message="Optimal order is the", category=UserWarning)
        return min(everyone, max(0.0, float(accountant.get_epsilon(delta, alphas=_ORDERS))))
