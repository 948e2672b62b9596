"""Margins with a promise: by how much predictions of a guardrail err along the plans that are chosen.

A search picks the candidate that looks best, and so, among candidates that look alike, the one whose prediction errs
most in its favour. A certificate for each candidate says nothing about that one: of k candidates that are each admitted
falsely with probability a, some is with probability up to 1 - (1 - a)^k. Here each calibration episode gives one score:
the least stretch of the margins that refuses the plan that broke a guardrail in it. An episode of the same kind, under
plans that are chosen with these margins, so breaks one with the stated probability at most, whatever the search does.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.core.errors import DataError


def conformal_quantile(scores: Float[Tensor, "N"], risk: float) -> float:
    """Return what another score of the same kind exceeds with probability at most `risk` (Vovk et al. 2005).

    It is the k-th smallest of n scores with k = ceil((n + 1)(1 - risk)), and infinite where k > n: so small a risk
    cannot be told from so few.

    Raises:
        DataError: the risk is not between 0 and 1, or a score is not a number.
    """
    if not 0 < risk < 1:
        raise DataError(f"a risk lies between 0 and 1; got {risk}")
    if bool(scores.isnan().any()):
        raise DataError("a score is not a number: an episode without a chosen plan says nothing; leave it out")
    # Rounded, so that a risk such as 0.05 that no binary number is does not cost one more episode.
    place = math.ceil(round((len(scores) + 1) * (1 - risk), 9))
    return math.inf if place > len(scores) else float(scores.sort().values[max(place, 1) - 1])


def tolerance_quantile(scores: Float[Tensor, "N"], risk: float, confidence: float) -> float:
    """Return what, at this confidence over calibrations, another score exceeds with probability at most `risk`.

    The conformal quantile keeps the risk on the average over calibrations; this one in all but the share
    1 - `confidence` of them (a one-sided tolerance limit, Wilks 1941; training-conditional validity, Vovk 2012). It is
    the score that k others exceed, with the largest k for which k or fewer of n would be so few that a greater risk
    shows no more in 1 - `confidence` of cases; infinite where no score is enough.

    Raises:
        DataError: the risk or the confidence is not between 0 and 1, or a score is not a number.
    """
    if not 0 < confidence < 1:
        raise DataError(f"a confidence lies between 0 and 1; got {confidence}")
    conformal_quantile(scores, risk)  # refuses what says nothing
    above = -1
    while binomial_at_most(above + 1, len(scores), risk) <= 1 - confidence:
        above += 1
    return math.inf if above < 0 else float(scores.sort(descending=True).values[above])


def binomial_at_most(successes: int, trials: int, rate: float) -> float:
    """Return the probability of so many successes or fewer."""
    if successes >= trials:
        return 1.0
    log_odds, total = math.log(rate) - math.log1p(-rate), 0.0
    for k in range(successes + 1):
        ways = math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        total += math.exp(ways + k * log_odds + trials * math.log1p(-rate))
    return total


@dataclass(frozen=True, kw_only=True)
class Margins:
    """What is added to each guardrail's predicted violation at each step of a plan, and the promise that it carries.

    In at most the share `risk` of episodes of the same kind, under the same planner, is a guardrail really broken that
    a chosen plan was predicted to keep. `usual` is what errors seen a replan later, in units of the margins, exceed no
    oftener than that: what recalibration compares with.
    """

    values: Float[Tensor, "G T"]
    risk: float
    episodes: int
    usual: float = 1.0


def margin_shape(errors: Float[Tensor, "N G T"], risk: float, *, least: float = 1e-3) -> Float[Tensor, "G T"]:
    """Return margins that the errors of stretches of logs exceed with probability at most `risk`, each alone.

    An error is what really was less what was predicted; what is not a number is left out. It is the conformal quantile
    for each guardrail and step, which promises something for any one candidate, and nothing for the one that a search
    chooses. Margins never fall along a plan, and none is below `least` times the largest.

    Raises:
        DataError: there are too few stretches for so small a risk.
    """
    shape = torch.zeros(errors.shape[1:], dtype=torch.float32)
    for guardrail, step in itertools.product(*map(range, shape.shape)):
        found = errors[:, guardrail, step]
        found = found[~found.isnan()]
        shape[guardrail, step] = conformal_quantile(found, risk)
        if math.isinf(shape[guardrail, step]):
            raise DataError(f"{len(found)} stretches of held-out logs are too few for a risk of {risk:g}; label more")
    shape = shape.clamp_min(0).cummax(dim=1).values
    return shape.clamp_min(max(least * float(shape.max()), 1e-6))


def refusing(predicted: Float[Tensor, "N G T"], shape: Float[Tensor, "G T"]) -> Float[Tensor, "N"]:
    """Return for each plan the least stretch of margins of this shape that refuses it."""
    return (-predicted / shape).amin(dim=(1, 2)).nan_to_num(nan=math.inf)


class AdaptiveMargin:
    """A margin that follows its errors as they come, for when they drift (Angelopoulos et al., arXiv 2307.16895).

    Quantile tracking: the margin grows by `rate` x (1 - risk) at each error beyond it, and shrinks by `rate` x risk at
    each other. If errors lie between 0 and b, then after t of them the share beyond differs from the risk by at most
    (b + rate) / (rate x t), whatever the errors are.
    """

    def __init__(self, margin: float, *, risk: float, rate: float) -> None:
        if not 0 < risk < 1 or not 0 < rate < math.inf or not math.isfinite(margin):
            raise DataError(
                f"expected a finite margin, a risk between 0 and 1 and a rate above 0; got {margin}, {risk} and {rate}"
            )
        self.margin, self.risk, self.rate = margin, risk, rate
        self.seen, self.beyond = 0, 0.0

    def update(self, *errors: float) -> float:
        """Take the newest error, or those of one moment; return the share beyond the margin, with all not numbers."""
        beyond = sum(not error <= self.margin for error in errors) / len(errors)
        self.seen += 1
        self.beyond += beyond
        self.margin += self.rate * (beyond - self.risk)
        return beyond
