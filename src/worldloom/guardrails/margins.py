"""Margins with a guarantee: bounds on the prediction errors of guardrails along the plans that a search chooses.

A search picks the candidate that looks best, and among similar candidates the one whose prediction is most
optimistic. A guarantee for each single candidate therefore does not extend to the chosen candidate: if each of k
candidates is wrongly admitted with probability a, at least one is wrongly admitted with probability up to
1 - (1 - a)^k. Instead, each calibration episode has one score: the factor on the margins above which the first plan
that broke a guardrail in the episode would have been refused. If a new episode is exchangeable with the calibration
episodes, it breaks a guardrail with at most the stated probability, whatever the search does.

Proof sketch. A round of calibration is n episodes of one method, whose margins are fixed before the round. A plan that
was chosen satisfied these margins, so only a larger factor would have refused it: each episode in which a guardrail
broke scores above the round's factor. The round is accepted if at most k episodes score above this factor, where k is
the largest number with P(Binomial(n, risk) <= k) <= 1 - confidence. If the method breaks a guardrail in more than the
share `risk` of episodes, a round accepts it with probability at most 1 - confidence. This is an exact binomial test
(Clopper and Pearson 1934), as in Learn then Test (Angelopoulos et al., arXiv 2110.01052). The test does not depend on
which blocks of a plan have which margins. The confidence applies to each round: by the union bound, r rounds accept
some method of too large a risk with probability at most r (1 - confidence).
"""

import hashlib
import itertools
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from worldloom.core.chain import canonical
from worldloom.core.config import Config
from worldloom.core.errors import ConfigError, DataError, StorageError
from worldloom.core.files import read_document, write_document
from worldloom.core.signing import Domain, SigningKey, verified
from worldloom.guardrails.newest_versions import NewestVersions, Seen
from worldloom.guardrails.rule_set import RuleSet

_KIND = "worldloom margins"
_FORMAT = 2  # format 1 had no signature, and was bound only to the rule set, the model and the method
_REMEDY = "Run 'worldloom calibrate' with this rule set, model and method"
_NEWEST = NewestVersions("margins.json", kind="worldloom newest margins", contents="margins")


@dataclass(frozen=True, kw_only=True)
class Margins:
    """Margins, added to each guardrail's predicted violation at each step of a plan, and their guarantee.

    The guarantee is for episodes that are exchangeable with the calibration episodes and use the same planner: in at
    most the fraction `risk` of them, a chosen plan breaks a guardrail that it was predicted to satisfy. `usual` is the
    prediction error that is exceeded at the end of a block with probability `risk`, in units of the margins.
    Recalibration compares new errors with it.
    """

    values: Float[Tensor, "G T"]
    risk: float
    episodes: int
    usual: float = 1.0


class _MarginsFile(Config):
    """The content of a file of margins, without its signature.

    `time`, in seconds since 1970, is later than that of all earlier margins at the same path. It is 0 in files of older
    versions of worldloom.
    """

    rules: str
    guardrails: tuple[str, ...]
    method: dict[str, Any]
    inputs: dict[str, str]
    risk: float = Field(gt=0, lt=1)
    episodes: int = Field(ge=0)
    usual: float = Field(gt=0)
    values: tuple[tuple[NonNegativeFloat, ...], ...]
    time: int = Field(default=0, ge=0, lt=2**53)
    protocol: str | None = None
    confidence: float | None = Field(default=None, gt=0, lt=1)
    rounds: tuple[dict[str, Any], ...] = ()


def write_margins(path: Path, margins: Margins, rules: RuleSet, about: Mapping[str, Any], key: SigningKey) -> None:
    """Sign margins, write them atomically, and remember that they are the newest (see `read_margins`).

    `about` contains the `method` and the `inputs` (see `read_margins`), and optionally how the margins were calibrated:
    `protocol`, `confidence` and `rounds`.
    """
    before = _NEWEST.read().get(str(path.resolve()))
    file = _MarginsFile(
        time=max(int(time.time()), 0 if before is None else before.version + 1),
        rules=rules.fingerprint,
        guardrails=tuple(rules.titles),
        risk=margins.risk,
        episodes=margins.episodes,
        usual=margins.usual,
        values=tuple(map(tuple, margins.values.tolist())),
        **about,
    )
    values = {**file.model_dump(mode="json", exclude_defaults=True), "key": key.public}
    signature = key.sign(canonical(values).encode("ascii"), Domain.MARGINS)
    write_document(path, _KIND, {**values, "signature": signature}, version=_FORMAT)
    with _NEWEST.changing() as record:
        record[str(path.resolve())] = _seen(file)


def read_margins(
    path: Path, rules: RuleSet, *, method: Mapping[str, Any], inputs: Mapping[str, str], signers: Collection[str] | None
) -> Margins:
    """Read the margins of a rule set and a method; see `write_margins`.

    `method` contains the settings that margins depend on: all except `recalibrate`, because recalibration only widens
    margins later. `inputs` are digests of what margins depend on, by name; inputs that the file does not contain
    are ignored. One of the keys `signers` must have signed the file; None skips the check. The newest margins at
    each path are remembered for the user, and older ones are refused. The path determines run, rule set and method.

    Raises:
        StorageError: the file is damaged, is not signed with one of these keys, belongs to a different rule set, method
            or input, is older than one that was used before, or reports too few calibration episodes for its risk.
    """
    try:
        values = read_document(path, _KIND, version=_FORMAT, remedy=_REMEDY)
        signature = values.pop("signature", None)
        if signers is not None:
            _check_signature(values, signature, signers)
        values.pop("key", None)
        file = _MarginsFile.parse(values)
        if file.rules != rules.fingerprint or list(file.guardrails) != rules.titles:
            raise ValueError("it contains margins for a different rule set")
        if file.risk != rules.risk:
            raise ValueError(f"its risk is {file.risk:g}, but the risk of the rule set is {rules.risk}")
        if {name: value for name, value in file.method.items() if name != "recalibrate"} != dict(method):
            raise ValueError("it contains margins for a different method")
        if changed := [name for name, digest in file.inputs.items() if inputs.get(name) != digest]:
            raise ValueError(f"these inputs have changed since the margins were calibrated: {', '.join(changed)}")
        steps = {len(row) for row in file.values}
        if len(file.values) != len(rules.titles) or steps != {method["horizon"]}:
            raise ValueError(
                f"expected {len(rules.titles)} rows of {method['horizon']} margins, one for each guardrail"
            )
        if method.get("guard") != "per candidate":
            _check_episodes(file)
        if signers is not None:
            _check_newest(path, file)
    except (ConfigError, DataError, KeyError, ValueError) as error:
        raise StorageError(f"{path} is not usable: {error}. {_REMEDY}") from None
    margins = torch.tensor(file.values, dtype=torch.float32)
    return Margins(values=margins, risk=file.risk, episodes=file.episodes, usual=file.usual)


def _check_signature(values: Mapping[str, Any], signature: Any, signers: Collection[str]) -> None:
    key = values.get("key")
    if not isinstance(key, str) or not verified(
        canonical(dict(values)).encode("ascii"), signature, key, Domain.MARGINS
    ):
        raise ValueError("its signature is missing, or it was changed after it was signed")
    if key not in signers:
        raise ValueError(
            f"it is signed by {key}, which is neither your own key nor a trusted one. If you trust this key, add "
            f"--trust {key}"
        )


def _check_episodes(file: _MarginsFile) -> None:
    """Raise an error if no result of so few calibration episodes can confirm the risk."""
    if file.confidence is None:
        raise ValueError("it does not contain the confidence of its calibration")
    if not enough_episodes(file.episodes, file.risk, file.confidence):
        raise ValueError(
            f"it was calibrated on {file.episodes} episodes, too few for a risk of {file.risk:g} at a confidence of "
            f"{file.confidence:g}"
        )


def _check_newest(path: Path, file: _MarginsFile) -> None:
    """Raise an error if newer margins were used at this path before; otherwise remember these."""
    newest = _NEWEST.read().get(str(path.resolve()))
    if newest is None and file.time == 0:
        return
    if newest is not None and file.time <= newest.version:
        if file.time == newest.version and _seen(file) == newest:
            return  # the usual case: nothing to write, so the state may be read-only
        raise ValueError("newer margins of this run were used before")
    with _NEWEST.changing() as record:
        record[str(path.resolve())] = _seen(file)


def _seen(file: _MarginsFile) -> Seen:
    content = canonical(file.model_dump(mode="json")).encode("ascii")
    return Seen(version=file.time, digest=hashlib.sha256(content).hexdigest())


def enough_episodes(episodes: int, risk: float, confidence: float) -> bool:
    """Return whether so many calibration episodes can confirm a risk: see `tolerance_quantile`."""
    from scipy.special import bdtr  # the binomial distribution function

    return bool(bdtr(0, episodes, risk) <= 1 - confidence)


def conformal_quantile(scores: Float[Tensor, "N"], risk: float) -> float:
    """Return a bound that a new exchangeable score exceeds with probability at most `risk` (Vovk et al. 2005).

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
    """Return a bound that new scores exceed at a rate of at most `risk`, with probability at least `confidence`.

    The probability is over calibrations: this is a one-sided tolerance limit (Wilks 1941; training-conditional
    validity, Vovk 2012). The conformal quantile, in contrast, keeps the risk only on average over calibrations.

    The bound is the score that k other scores exceed, where k is the largest number for which a binomial variable of n
    trials at rate `risk` is at most k with probability at most 1 - `confidence`. If no k satisfies this, the bound is
    infinite.

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
    """Return margins; an error on a window of logs exceeds its margin with probability at most `risk`.

    An error is the true violation minus the predicted one; NaN errors are left out. For each guardrail and step, the
    margin is the conformal quantile of the errors. The margin bounds the error of a single candidate, but not the error
    of the candidate that a search chooses among many. Margins never decrease along a plan, and no margin is below
    `least` times the largest margin.

    Raises:
        DataError: there are too few windows for this risk.
    """
    shape = torch.zeros(errors.shape[1:], dtype=torch.float32)
    for guardrail, step in itertools.product(*map(range, shape.shape)):
        found = errors[:, guardrail, step]
        found = found[~found.isnan()]
        shape[guardrail, step] = conformal_quantile(found, risk)
        if math.isinf(shape[guardrail, step]):
            raise DataError(
                f"{len(found)} windows of held-out logs are too few for a risk of {risk:g}; label more logs or accept "
                f"a higher risk"
            )
    shape = shape.clamp_min(0).cummax(dim=1).values
    return shape.clamp_min(max(least * float(shape.max()), 1e-6))


def level_after(shape: Float[Tensor, "G T"], blocks: int) -> Float[Tensor, "G T"]:
    """Return margins that stay level after the first `blocks` steps.

    Errors grow along a plan, but an agent that plans again after `blocks` steps never acts on the later ones. The
    guarantee does not need their full margins (see the module): it comes from episodes in which agents acted with
    exactly these margins.
    """
    return torch.cat([shape[:, :blocks], shape[:, blocks - 1 : blocks].expand(-1, shape.shape[1] - blocks)], dim=1)


def refusing(predicted: Float[Tensor, "N G T"], shape: Float[Tensor, "G T"]) -> Float[Tensor, "N"]:
    """Return, for each plan, the factor on margins of this shape above which the plan is refused.

    `predicted` are the predicted violations without margins.
    """
    return (-predicted / shape).amin(dim=(1, 2)).nan_to_num(nan=math.inf)


class AdaptiveMargin:
    """A margin that adapts to errors whose distribution drifts (Angelopoulos et al., arXiv 2307.16895).

    The margin tracks a quantile: an error beyond the margin increases the margin by `rate` x (1 - risk); any other
    error decreases the margin by `rate` x risk. If errors are between 0 and b, then after t errors the fraction beyond
    the margin differs from the risk by at most (b + rate) / (rate x t), whatever the errors are.
    """

    def __init__(self, margin: float, *, risk: float, rate: float) -> None:
        if not 0 < risk < 1 or not 0 < rate < math.inf or not math.isfinite(margin):
            raise DataError(
                f"expected a finite margin, a risk between 0 and 1 and a finite rate above 0; got margin {margin}, "
                f"risk {risk} and rate {rate}"
            )
        self.margin, self.risk, self.rate = margin, risk, rate

    def update(self, *errors: float) -> float:
        """Update the margin with simultaneous errors.

        Returns the fraction of the errors that are NaN or above the margin before the update.
        """
        beyond = sum(not error <= self.margin for error in errors) / len(errors)
        self.margin += self.rate * (beyond - self.risk)
        return beyond
