"""Attacks on a federation, to measure its privacy and its defences.

A curious reader of models and deltas can use `membership_inference` and `reconstruct`. A malicious owner can use
`sign_flip`, `scale` and `backdoor`. A delta is the change that an owner contributes, as a mapping from names to
tensors.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.stats import norm, rankdata
from torch import Tensor

from worldloom.core.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Inference:
    """The AUROC of a membership inference attack (0.5: chance, 1: perfect), with a 95% interval."""

    auroc: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """The similarity of a reconstruction to the truth: cosine, and PSNR in dB (infinite if equal)."""

    cosine: float
    psnr: float


def membership_inference(
    losses_members: Sequence[float] | Tensor, losses_others: Sequence[float] | Tensor, *, level: float = 0.95
) -> Inference:
    """Return the AUROC of the attack that classifies data with a low loss as training data.

    The attack uses a threshold on the loss (Yeom et al. 2018); the AUROC covers all thresholds. The interval is method
    5 of Newcombe 2006, a score interval of the Mann-Whitney statistic that does not collapse at 0 and 1. It assumes
    independent losses, so pass one loss per episode: overlapping windows are dependent.

    Raises:
        DataError: one of the groups is empty, or a loss is NaN.
    """
    members = np.asarray(losses_members, dtype=np.float64).reshape(-1)
    others = np.asarray(losses_others, dtype=np.float64).reshape(-1)
    m, n = len(members), len(others)
    if not m or not n or np.isnan(members).any() or np.isnan(others).any():
        raise DataError(
            f"expected at least one loss of a member and of a non-member, none of them NaN; got {m} losses of members "
            f"({np.isnan(members).sum()} NaN) and {n} of non-members ({np.isnan(others).sum()} NaN). Add losses to an "
            f"empty group, and leave out NaN"
        )
    # The rank sum counts the pairs in which the member has the lower loss, ties by half.
    below = rankdata(np.concatenate([-members, -others]))[:m].sum() - m * (m + 1) / 2
    auroc = float(below / (m * n))
    z, half = float(norm.ppf((1 + level) / 2)), (m + n) / 2 - 1

    def excess(at: float) -> float:
        spread = at * (1 - at) * (1 + half * (1 - at) / (2 - at) + half * at / (1 + at)) / (m * n)
        return (auroc - at) ** 2 - z * z * spread

    # At 0 and 1 the spread is 0, which gives false roots: the search stays slightly inside.
    low = 0.0 if auroc == 0 else float(brentq(excess, 0.0, min(auroc, 1 - 1e-12)))
    high = 1.0 if auroc == 1 else float(brentq(excess, max(auroc, 1e-12), 1.0))
    return Inference(auroc=auroc, low=low, high=high)


def reconstruct(delta: Mapping[str, Tensor], *, weight: str, bias: str) -> Tensor:
    """Return the input that the delta of a linear or patch layer reveals, in the shape of one row of the weight.

    For one input x, each row of the weight's gradient is x times the bias gradient of that row (Phong et al. 2018).
    This is also true of the delta after plain gradient descent at any learning rate. The rows are combined by least
    squares. With several inputs or patches, the result is their mean weighted by the gradients.

    Raises:
        DataError: the delta lacks the weight or the bias, their shapes do not match, or the bias did not change.
    """
    if weight not in delta or bias not in delta:
        raise DataError(
            f"expected {weight!r} and {bias!r} in the delta; it has {', '.join(sorted(delta))}. Choose two of these"
        )
    rows, moved = delta[weight].detach().double(), delta[bias].detach().double()
    if moved.dim() != 1 or rows.dim() < 2 or len(rows) != len(moved):
        raise DataError(
            f"expected a weight with one row for each value of the bias; got shape {tuple(rows.shape)} of {weight!r} "
            f"and {tuple(moved.shape)} of {bias!r}. Choose the weight and the bias of one layer"
        )
    power = moved.square().sum()
    if float(power) == 0:
        raise DataError(f"{bias!r} did not change, so its delta reveals nothing about the input; use another delta")
    return torch.einsum("i,i...->...", moved, rows) / power


def likeness(found: Tensor, truth: Tensor, *, peak: float = 1.0) -> Likeness:
    """Return the similarity of `found` to `truth`; `peak` is the range of the values.

    Raises:
        DataError: the shapes differ.
    """
    if found.shape != truth.shape:
        raise DataError(f"expected two tensors of equal shape; got {tuple(found.shape)} and {tuple(truth.shape)}")
    first, second = found.double().flatten(), truth.double().flatten()
    error = float((first - second).square().mean())
    return Likeness(
        cosine=float(torch.nn.functional.cosine_similarity(first, second, dim=0)),
        psnr=math.inf if error == 0 else 10 * math.log10(peak * peak / error),
    )


def sign_flip(delta: Mapping[str, Tensor], factor: float = 1.0) -> dict[str, Tensor]:
    """Return the delta times `-factor`: an attack that undoes the training."""
    return scale(delta, -factor)


def scale(delta: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Return the delta times `factor`: an attack that dominates the other deltas."""
    return {name: value * factor if value.is_floating_point() else value.clone() for name, value in delta.items()}


def backdoor(delta: Mapping[str, Tensor], target: Mapping[str, Tensor], *, strength: float = 1.0) -> dict[str, Tensor]:
    """Return the delta moved towards a target; with `strength` 1, the result is the target.

    If `strength` is the number of owners and the honest deltas are small, the mean of all deltas is close to the target
    (model replacement, Bagdasaryan et al. 2020).

    Raises:
        DataError: the tensors of the target have different names or shapes.
    """
    if {name: value.shape for name, value in delta.items()} != {name: value.shape for name, value in target.items()}:
        raise DataError(
            "expected a target with the names and shapes of the delta; got different ones. Build both from one model"
        )
    return {
        name: value + strength * (target[name].to(value.dtype) - value) if value.is_floating_point() else value.clone()
        for name, value in delta.items()
    }
