"""Margins with a guarantee: bounds on the prediction errors of guardrails along the plans that a search chooses.

A search picks the candidate that looks best, and among similar candidates the one whose prediction is most
optimistic. A guarantee for each single candidate is therefore none for the chosen one: if each of k candidates is
wrongly admitted with probability a, at least one is with probability up to 1 - (1 - a)^k. Instead, each calibration
episode has one score: the smallest factor on the margins that refuses the plan that broke a guardrail in the episode.
With the calibrated margins, a new episode of the same kind then breaks a guardrail with at most the stated
probability, whatever the search does.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.core.errors import DataError, StorageError
from worldloom.core.files import read_document, write_document
from worldloom.guardrails.rule_set import RuleSet

_KIND = "worldloom margins"


@dataclass(frozen=True, kw_only=True)
class Margins:
    """The amount added to each guardrail's predicted violation at each step of a plan, and its guarantee.

    In at most the fraction `risk` of episodes of the same kind, under the same planner, a chosen plan breaks a
    guardrail that it was predicted to satisfy. `usual` is the quantile at the same risk of the errors seen one replan
    later, in units of the margins; recalibration compares errors with it.
    """

    values: Float[Tensor, "G T"]
    risk: float
    episodes: int
    usual: float = 1.0


def write_margins(path: Path, margins: Margins, rules: RuleSet, about: Mapping[str, Any]) -> None:
    """Write margins atomically; `about` records how they were calibrated."""
    write_document(
        path,
        _KIND,
        {
            "rules": rules.fingerprint,
            "guardrails": rules.titles,
            "risk": margins.risk,
            "episodes": margins.episodes,
            "usual": margins.usual,
            "values": margins.values.tolist(),
            **about,
        },
    )


def read_margins(path: Path, rules: RuleSet, *, model: str, method: Mapping[str, Any]) -> Margins:
    """Read the margins of this rule set, model (its fingerprint) and method; see `write_margins`.

    `method` contains the settings that margins depend on: all except `recalibrate`, which widens them later.

    Raises:
        StorageError: the file is damaged, or belongs to a different rule set, model or method.
    """
    values = read_document(path, _KIND)
    try:
        if values["rules"] != rules.fingerprint:
            raise ValueError("it belongs to a different rule set")
        calibrated = {key: value for key, value in dict(values["method"]).items() if key != "recalibrate"}
        if values["model"] != model or calibrated != dict(method):
            raise ValueError("it belongs to a different model or method")
        margins = torch.tensor(values["values"], dtype=torch.float32)
        if margins.ndim != 2 or len(margins) != len(rules.titles) or not bool((margins >= 0).all()):
            raise ValueError(f"expected a margin of 0 or more for each step of {len(rules.titles)} guardrails")
        usual = float(values["usual"])
        if not 0 < usual < math.inf:
            raise ValueError(f"expected a finite 'usual' above 0; got {usual}")
        return Margins(values=margins, risk=float(values["risk"]), episodes=int(values["episodes"]), usual=usual)
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{path} has no margins for this rule set ({error}); calibrate the rule set again") from None


def conformal_quantile(scores: Float[Tensor, "N"], risk: float) -> float:
    """Return a bound that a new score of the same kind exceeds with probability at most `risk` (Vovk et al. 2005).

    The bound is the k-th smallest of n scores with k = ceil((n + 1)(1 - risk)). It is infinite if k > n, because n
    scores are too few for this risk.

    Raises:
        DataError: the risk is not between 0 and 1, or a score is NaN.
    """
    if not 0 < risk < 1:
        raise DataError(f"expected a risk between 0 and 1; got {risk}")
    if bool(scores.isnan().any()):
        raise DataError("expected scores that are numbers; got NaN. Leave out episodes without a chosen plan")
    # Rounded, so that a risk such as 0.05, which has no exact binary form, does not need one more episode.
    place = math.ceil(round((len(scores) + 1) * (1 - risk), 9))
    return math.inf if place > len(scores) else float(scores.sort().values[max(place, 1) - 1])


def tolerance_quantile(scores: Float[Tensor, "N"], risk: float, confidence: float) -> float:
    """Return a bound that a new score exceeds with probability at most `risk`, at this confidence over calibrations.

    The conformal quantile keeps the risk on average over calibrations; this bound keeps it in all but a fraction 1 -
    `confidence` of them (a one-sided tolerance limit, Wilks 1941; training-conditional validity, Vovk 2012). It is the
    score that k others exceed. Here k is the largest number for which a binomial variable of n trials at rate `risk` is
    at most k with probability at most 1 - `confidence`. Without such a k, the bound is infinite.

    Raises:
        DataError: the risk or the confidence is not between 0 and 1, or a score is NaN.
    """
    from scipy.special import bdtr  # the binomial distribution function

    if not 0 < confidence < 1:
        raise DataError(f"expected a confidence between 0 and 1; got {confidence}")
    conformal_quantile(scores, risk)  # checks the risk and the scores
    count = len(scores)
    above = int((bdtr(np.arange(count + 1), count, risk) <= 1 - confidence).sum()) - 1
    return math.inf if above < 0 else float(scores.sort(descending=True).values[above])


def margin_shape(errors: Float[Tensor, "N G T"], risk: float, *, least: float = 1e-3) -> Float[Tensor, "G T"]:
    """Return margins that the errors on sections of logs exceed with probability at most `risk`, each considered alone.

    An error is the true violation minus the predicted one; NaN errors are left out. The margin is the conformal
    quantile for each guardrail and step. It bounds the error of any single candidate, but not of the one that a search
    chooses. Margins never decrease along a plan, and none is below `least` times the largest.

    Raises:
        DataError: there are too few sections for this risk.
    """
    shape = torch.zeros(errors.shape[1:], dtype=torch.float32)
    for guardrail, step in itertools.product(*map(range, shape.shape)):
        found = errors[:, guardrail, step]
        found = found[~found.isnan()]
        shape[guardrail, step] = conformal_quantile(found, risk)
        if math.isinf(shape[guardrail, step]):
            raise DataError(
                f"{len(found)} sections of held-out logs are too few for a risk of {risk:g}; label more logs or accept "
                f"a higher risk"
            )
    shape = shape.clamp_min(0).cummax(dim=1).values
    return shape.clamp_min(max(least * float(shape.max()), 1e-6))


def refusing(predicted: Float[Tensor, "N G T"], shape: Float[Tensor, "G T"]) -> Float[Tensor, "N"]:
    """Return, for each plan, the smallest factor on margins of this shape that refuses the plan."""
    return (-predicted / shape).amin(dim=(1, 2)).nan_to_num(nan=math.inf)


class AdaptiveMargin:
    """A margin that adapts to the errors it receives, for when they drift (Angelopoulos et al., arXiv 2307.16895).

    It tracks a quantile: an error beyond the margin increases it by `rate` x (1 - risk), any other error decreases it
    by `rate` x risk. If errors are between 0 and b, then after t errors the fraction beyond the margin differs from the
    risk by at most (b + rate) / (rate x t), whatever the errors are.
    """

    def __init__(self, margin: float, *, risk: float, rate: float) -> None:
        if not 0 < risk < 1 or not 0 < rate < math.inf or not math.isfinite(margin):
            raise DataError(
                f"expected a finite margin, a risk between 0 and 1 and a rate above 0; got {margin}, {risk} and {rate}"
            )
        self.margin, self.risk, self.rate = margin, risk, rate

    def update(self, *errors: float) -> float:
        """Update the margin with simultaneous errors; return the fraction beyond it. NaN counts as beyond."""
        beyond = sum(not error <= self.margin for error in errors) / len(errors)
        self.margin += self.rate * (beyond - self.risk)
        return beyond
