"""Margins with a promise: by how much predictions of a guardrail err along the plans that are chosen.

A search picks the candidate that looks best, and so, among candidates that look alike, the one whose prediction errs
most in its favour. A certificate for each candidate says nothing about that one: of k candidates that are each admitted
falsely with probability a, some is with probability up to 1 - (1 - a)^k. Here each calibration episode gives one score,
the worst error of all the plans that the planner chose in it, so that an episode of the same kind keeps its margin with
the stated probability, whatever the search does.
"""

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

    At most the share `risk` of episodes of the same kind, under the same planner, meets an error beyond these margins
    at any time, for any of the guardrails.
    """

    values: Float[Tensor, "G T"]
    risk: float
    episodes: int


def conformal_margins(errors: Float[Tensor, "N G T"], risk: float, *, shaped_by: float = 0.5) -> Margins:
    """Return margins for G guardrails along T steps from the errors of N calibration episodes.

    An error is the true violation less the predicted one; of each episode the largest at each step ahead over all
    plans that were chosen in it, minus infinity where none was seen. The share `shaped_by` of the episodes tells how
    errors grow along a plan, and the others by how much that shape is to be stretched (Cleaveland et al., arXiv
    2304.01075): one score an episode, the largest ratio of an error to its shape. A margin is never below 0.

    Raises:
        DataError: too few episodes for the risk; the message says how many are needed.
    """
    shaping = round(shaped_by * len(errors))
    if not 0 < shaping < len(errors):
        raise DataError(f"margins need at least 2 calibration episodes; got {len(errors)}. Run more")
    usual = errors[:shaping].nan_to_num(neginf=0.0, posinf=0.0).clamp_min(0).mean(dim=0)
    shape = torch.cummax(usual, dim=1).values
    shape = shape.clamp_min(max(1e-3 * float(shape.max()), 1e-9))
    scores = (errors[shaping:] / shape).amax(dim=(1, 2)).clamp_min(0)
    stretch = conformal_quantile(scores, risk)
    if math.isinf(stretch) and not bool(scores.isinf().any()):
        needed = math.ceil(round(1 / risk, 9)) - 1
        raise DataError(
            f"{len(scores)} calibration episodes cannot tell a risk of {risk:g}: at least {needed} are needed beside "
            f"those that shape the margins, {math.ceil(needed / (1 - shaped_by))} in all"
        )
    return Margins(values=stretch * shape, risk=risk, episodes=len(errors))


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
        self.seen = self.beyond = 0

    def update(self, error: float) -> bool:
        """Take the newest error; return whether it lay beyond the margin. One that is not a number does."""
        beyond = not error <= self.margin
        self.seen += 1
        self.beyond += beyond
        self.margin += self.rate * (beyond - self.risk)
        return beyond
