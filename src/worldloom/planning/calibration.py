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


def margin_shape(
    predicted: Float[Tensor, "N G T"], really: Float[Tensor, "N G T"], risk: float, *, least: float = 1e-3
) -> Float[Tensor, "G T"]:
    """Return margins that refuse all but the share `risk` of the stretches that break a guardrail, each alone.

    `predicted` and `really` are the violations along N stretches; what is not a number is left out. For each guardrail
    and step it is the conformal quantile of how far below 0 the prediction lay where the limit really was broken
    (Mondrian conformal prediction, Vovk et al. 2005); where too few stretches broke it, that of really - predicted over
    all of them. Margins never fall along a plan, and none is below `least` times the largest.

    Raises:
        DataError: there are too few stretches for so small a risk.
    """
    shape = torch.zeros(predicted.shape[1:], dtype=torch.float32)
    for guardrail, step in itertools.product(*map(range, shape.shape)):
        said, was = predicted[:, guardrail, step], really[:, guardrail, step]
        there = ~(said.isnan() | was.isnan())
        needed = conformal_quantile(-said[there & (was > 0)], risk)
        if math.isinf(needed):
            needed = conformal_quantile((was - said)[there], risk)
        if math.isinf(needed):
            raise DataError(f"{int(there.sum())} stretches of held-out logs are too few for a risk of {risk:g}")
        shape[guardrail, step] = needed
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
