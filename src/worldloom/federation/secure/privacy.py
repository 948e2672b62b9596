"""Differential privacy of an owner's delta: clipping, noise, and accounting of the privacy spent.

The protected unit is an owner: from all releases together, an observer can hardly tell whether they include an owner's
deltas. The neighbouring relation adds or removes one owner. A round releases the sum of clipped deltas with noise of
standard deviation `noise * clip`. If every owner takes part in every round, epsilon comes from the closed form of the
Gaussian mechanism. If owners are sampled, epsilon is an upper bound from Opacus' Renyi accountant.
"""

import math
import secrets
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from worldloom.core.config import Config
from worldloom.core.errors import ConfigError, DataError
from worldloom.core.extras import require

# More than Opacus' own orders: with much noise, the best order is large.
_ORDERS = [1 + tenth / 10 for tenth in range(1, 100)] + [float(order) for order in (*range(11, 65), 96, 128, 256, 512)]
_MOST = 1e6  # larger epsilons guarantee nothing and count as infinite
_LEAST = 1e-9  # with less noise, epsilon always exceeds _MOST

Clip = Annotated[float, Field(gt=0, le=1e12)]
"""The largest L2 norm of a delta."""
Noise = Annotated[float, Field(ge=0, le=1e6)]
"""The standard deviation of noise, in units of the clip."""


class PrivacyBudgetSpent(DataError):
    """A round would exceed the privacy budget; the round was not counted and must not run."""


class PrivacyConfig(Config):
    """Clipping, noise and budget; the protected unit is an owner.

    `clip` is the largest L2 norm of an owner's shared delta over all tensors. `noise` is the standard deviation of the
    noise on the sum of the deltas, in units of `clip`; with 0, deltas are only clipped and epsilon is infinite.
    `epsilon_budget` bounds the epsilon of all rounds together, at `delta`: the probability that this guarantee fails,
    which must be far below one in the number of owners.
    """

    clip: Clip
    noise: Noise
    delta: float = Field(default=1e-5, gt=0, le=1e-3)
    epsilon_budget: float | None = Field(default=None, gt=0)


def secret_generator() -> torch.Generator:
    """Return a generator with a secret seed from the operating system; knowing the seed, one can subtract the noise."""
    return torch.Generator().manual_seed(secrets.randbits(63))


def clip_and_noise(
    delta: Mapping[str, Tensor], config: PrivacyConfig, generator: torch.Generator, *, share: float = 1.0
) -> dict[str, Tensor]:
    """Return the delta clipped to an L2 norm of `clip`, plus Gaussian noise.

    The standard deviation is `noise * clip * sqrt(share)`. With `share=1` a single delta is protected, even from the
    coordinator. Under secure aggregation each of n owners adds 1/n of the variance, and only the sum is protected. n
    must count only owners that are sure to be in the sum: the threshold, minus owners that may collude, because these
    can subtract their own noise.

    The noise consists of floating-point numbers, which can leak bits (Mironov 2012), from a generator that is not
    cryptographic. It protects against statistical inference, not against recovery of the generator's state.

    Raises:
        ConfigError: `share` is not in (0, 1].
        DataError: a value is not finite, or a tensor is not floating point.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"expected a share of the noise above 0 and at most 1; got {share}. Correct the share")
    for name, value in delta.items():
        if not value.is_floating_point():
            raise DataError(f"noise cannot be added to tensor {name!r}, which is {value.dtype}; declare it sovereign")
        if not bool(torch.isfinite(value).all()):
            raise DataError(f"tensor {name!r} of the delta has values that are not finite; check the training losses")
    norm = delta_norm(delta)
    # Slightly below the clip, so that rounding to the tensors' dtype does not raise the norm above it.
    factor = 1.0 if norm <= config.clip else config.clip / norm * (1 - 1e-6)
    deviation = config.noise * config.clip * math.sqrt(share)
    released = {}
    for name in sorted(delta):  # the noise does not depend on the order of the mapping
        exact = delta[name].detach().double() * factor
        if deviation:
            exact += torch.randn(exact.shape, generator=generator, dtype=torch.float64) * deviation
        released[name] = exact.to(delta[name].dtype)
    return released


def delta_norm(delta: Mapping[str, Tensor]) -> float:
    """Return the L2 norm over all tensors of a delta."""
    return math.sqrt(sum(float(value.detach().double().square().sum()) for value in delta.values()))


def effective_noise(noise: float, weights: Sequence[float], *, share: float = 1.0) -> float:
    """Return the noise of a weighted sum of noised deltas, relative to its sensitivity (largest weight times clip).

    With n equal weights and `share=1/n` this is `noise`; with unequal weights it is less. Pass this value to
    `Accountant.spend`.

    Raises:
        ConfigError: a weight is negative or not finite, or none is above 0.
    """
    if not weights or min(weights) < 0 or max(weights) == 0 or not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(
            f"expected finite weights of 0 or more, at least one above 0; got {list(weights)}. Correct these weights"
        )
    return noise * math.sqrt(share * sum(weight**2 for weight in weights)) / max(weights)


def gaussian_epsilon(noise: float, delta: float) -> float:
    """Return the smallest epsilon at `delta` of one Gaussian mechanism; `noise` is in units of the sensitivity.

    This solves the exact condition of Balle and Wang 2018 (theorem 8) for epsilon. T rounds, each with noise s, equal
    one round with noise s / sqrt(T) (Dong, Roth and Su 2022).
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
    # At epsilon = mu^2 / 2 + mu z, with z the quantile of delta (below 40 here), the first term is already below delta.
    most = mu * mu / 2 + 40 * mu
    return float(brentq(excess, 0.0, most, xtol=1e-12)) if most < _MOST else math.inf


class Event(Config):
    """A number of identical rounds: their noise, and the probability that an owner takes part in each."""

    rounds: int = Field(ge=1, le=10**9, strict=True)
    noise: Noise
    sample_rate: float = Field(gt=0, le=1)


class Accountant:
    """Counts the privacy spent; every release must be counted before it is sent.

    `state` are the rounds counted so far, as returned by `Accountant.state`.

    Raises:
        DataError: the state is invalid.
    """

    def __init__(self, config: PrivacyConfig, state: Any = ()) -> None:
        self.config = config
        try:
            if not isinstance(state, list | tuple):
                raise TypeError("expected a list")
            self._events = [Event.parse(entry) for entry in state]
        except (TypeError, ValueError, ConfigError) as error:
            raise DataError(f"the privacy accountant's state is invalid ({error}); restore it from a copy") from None

    @property
    def epsilon(self) -> float:
        """An upper bound on epsilon at `config.delta` for all counted rounds."""
        return _epsilon(self._events, self.config.delta)

    def spend(self, rounds: int = 1, sample_rate: float = 1.0, *, noise: float | None = None) -> float:
        """Count rounds, and return epsilon at `config.delta` for all rounds so far.

        A `sample_rate` below 1 improves privacy only if each owner is sampled independently with this probability
        (Poisson sampling) and observers do not learn which owners were sampled. It needs Opacus. `noise` defaults to
        the noise of the config; see `effective_noise`.

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
                f"{self.config.delta:g}, above the budget of {budget:g}. Stop here, or agree with all members on "
                f"more noise or a larger budget"
            )
        self._events.append(event)
        return after

    def state(self) -> list[dict[str, Any]]:
        """Return the counted rounds as plain JSON."""
        return [event.model_dump() for event in self._events]


def _epsilon(events: Sequence[Event], delta: float) -> float:
    if not events:
        return 0.0
    if any(event.noise < _LEAST for event in events):
        return math.inf
    # Exact without sampling. With sampling it is an upper bound, because taking part less often never costs more.
    everyone = gaussian_epsilon(1 / math.sqrt(sum(event.rounds / event.noise**2 for event in events)), delta)
    if all(event.sample_rate == 1 for event in events):
        return everyone
    accountant = require("opacus.accountants", "weave").RDPAccountant()  # takes seconds to load
    accountant.history = [(event.noise, event.sample_rate, event.rounds) for event in events]
    with warnings.catch_warnings():
        # Opacus warns if the best order is the last one; the result is still an upper bound.
        warnings.filterwarnings("ignore", message="Optimal order is the", category=UserWarning)
        return min(everyone, max(0.0, float(accountant.get_epsilon(delta, alphas=_ORDERS))))
