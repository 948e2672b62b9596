"""Diagnostics of a model: figures that show whether its latents are good enough for planning, and alarms."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.core.seeds import torch_generator
from worldloom.core.types import Context, Windows
from worldloom.models import JEPA
from worldloom.training.linear_probe import LinearProbe

_FEATURES = 512  # random features of the inverse-dynamics probe

# Thresholds of alarms. On Two Rooms, variants whose latents contain the agent have an inverse-dynamics error of 0.06 to
# 0.25. A variant with a high rank, whose probe places the agent 10 px off, has 0.67 and an R2 of 0.85
# (benchmarks/RESULTS.md).
_BLIND = 0.5  # inverse-dynamics error, as a share of the action's variance
_READABLE = 0.75  # R2 of a label that changes within windows


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A problem of the latents: its name, a description, and what to change."""

    name: str
    message: str
    remedy: str


@torch.no_grad()
def diagnose(model: JEPA, fit: Windows, held_out: Windows) -> dict[str, float]:
    """Measure a model in evaluation mode. Probes are fitted on `fit`; all figures are measured on `held_out`.

    - effective_rank: see `effective_rank`; latent_dimensions: the number D.
    - dead_dimensions: share of latent dimensions with a std below a tenth of the median; latent_std_min: lowest std.
    - moving_share: share of the latents' variance that is within windows rather than between windows.
    - inverse_dynamics: squared error of a block's mean action predicted from the latents around it, as a share of that
      action's variance; 0 is perfect, 1 is as bad as predicting the mean.
    - open_loop: squared error of the last predicted latent, divided by the error of predicting no change.
    - probe/LABEL/error, probe/LABEL/r2: a linear probe of each label that varies, on the model's state (the K latents
      up to a frame); the error is in the label's unit. probe/LABEL/moving: moving_share of the label.
    - open_loop/LABEL/H: the probe's error on latents that are predicted H blocks ahead.
    """
    context = model.spec.context
    fitted, latents = model.encode(fit.observations), model.encode(held_out.observations)
    flat = latents.flatten(0, 1)
    std = flat.std(dim=0)
    figures = {
        "effective_rank": effective_rank(flat),
        "latent_dimensions": float(flat.shape[1]),
        "dead_dimensions": (std < 0.1 * std.median()).float().mean().item(),
        "latent_std_min": std.min().item(),
        "moving_share": _moving_share(latents),
        "inverse_dynamics": inverse_dynamics_error(model, fitted, fit.actions, latents, held_out.actions),
    }
    start = Context(latents=latents[:, :context], actions=held_out.actions[:, : context - 1])
    predicted = model.rollout(start, held_out.actions[:, None, context - 1 :])[:, 0]
    still = (latents[:, -1] - latents[:, context - 1]).square().mean()
    figures["open_loop"] = ((predicted[:, -1] - latents[:, -1]).square().mean() / still.clamp_min(1e-12)).item()
    seen, unseen = _states(fitted, context), _states(latents, context)
    imagined = _states(torch.cat([latents[:, :context], predicted], dim=1), context)
    for name in held_out.labels:
        labels, truth = (windows.labels[name][:, context - 1 :] for windows in (fit, held_out))
        if not _varies(labels) or not _varies(truth):
            continue
        probe = LinearProbe.fit(seen, labels)
        score = probe.score(unseen, truth)
        figures |= {
            f"probe/{name}/error": score.error,
            f"probe/{name}/r2": score.r2,
            f"probe/{name}/moving": _moving_share(truth),
        }
        steps = predicted.shape[1]
        for horizon in sorted({1, (steps + 1) // 2, steps}):
            figures[f"open_loop/{name}/{horizon}"] = probe.score(imagined[:, horizon], truth[:, horizon]).error
    return figures


def effective_rank(latents: Float[Tensor, "N D"]) -> float:
    """Return exp of the entropy of the normalised singular values (RankMe; Garrido et al., arXiv 2210.02885).

    The result is NaN if a latent is not finite.
    """
    if not bool(latents.isfinite().all()):
        return math.nan
    centred = (latents - latents.mean(dim=0)).double()
    values = torch.linalg.eigvalsh(centred.T @ centred).clamp_min(0).sqrt()
    shares = values / values.sum().clamp_min(1e-12)
    return torch.exp(-torch.special.xlogy(shares, shares).sum()).item()


def inverse_dynamics_error(
    model: JEPA,
    fit_latents: Float[Tensor, "B N D"],
    fit_actions: Float[Tensor, "B M A"],
    latents: Float[Tensor, "B2 N D"],
    actions: Float[Tensor, "B2 M A"],
) -> float:
    """Return the unexplained share of the variance of a block's mean action, predicted from the K+1 latents around it.

    The target is the mean, because the order of actions within a block has no effect on the frame after it. The
    predictor is a ridge regression on the latents, their differences and random ReLU features of both. It has a closed
    form, so the figure needs no further training.
    """
    frames = model.spec.context + 1

    def mean_action(blocks: Tensor) -> Tensor:
        normalised: Tensor = model.normalise_actions(blocks)[:, frames - 2 :]
        return normalised.reshape(-1, model.spec.block, model.spec.action.size).mean(1)

    def inputs(encoded: Tensor) -> Tensor:
        last = encoded[:, frames - 1 :].flatten(0, 1)
        changes = encoded.diff(dim=1).unfold(1, frames - 1, 1).flatten(2).flatten(0, 1)
        return torch.cat([last, changes], dim=1)

    seen, unseen = inputs(fit_latents), inputs(latents)
    mean, std = seen.mean(dim=0), seen.std(dim=0).clamp_min(1e-6)
    seen, unseen = (seen - mean) / std, (unseen - mean) / std
    weight = torch.randn(seen.shape[1], _FEATURES, generator=torch_generator(0, "inverse-dynamics")).to(seen.device)
    weight /= seen.shape[1] ** 0.5
    seen, unseen = (torch.cat([part, torch.relu(part @ weight)], dim=1) for part in (seen, unseen))
    probe = LinearProbe.fit(seen, mean_action(fit_actions), ridge=0.1)
    return 1 - probe.score(unseen, mean_action(actions)).r2


def alarms(figures: Mapping[str, float]) -> list[Alarm]:
    """Return the problems that the figures of `diagnose` show; the list is empty if the model is fit for planning."""
    found = []
    rank, dimensions = figures["effective_rank"], figures["latent_dimensions"]
    collapsed = rank < min(2.0, 0.5 * dimensions) or figures["dead_dimensions"] > 0.5
    if collapsed:
        found.append(
            Alarm(
                name="collapse",
                message=(
                    f"the latents have collapsed: effective rank {rank:.1f} of {dimensions:.0f} dimensions, "
                    f"and {figures['dead_dimensions']:.0%} of the dimensions are dead"
                ),
                remedy="raise the weights of 'variance' and 'covariance', or add 'sigreg' with weight 0.1",
            )
        )
    lost = [
        name.split("/")[1]
        for name, r2 in figures.items()
        if name.startswith("probe/") and name.endswith("/r2") and r2 < _READABLE and figures[name[:-2] + "moving"] > 0.1
    ]
    blind = figures["inverse_dynamics"] > _BLIND
    if not collapsed and (blind or lost):
        evidence = [f"{figures['moving_share']:.1%} of the latents' variance is within windows"]
        evidence += [f"the inverse-dynamics error is {figures['inverse_dynamics']:.2f} of the actions' variance"]
        evidence += [f"a probe of {name!r} has an R2 of {figures[f'probe/{name}/r2']:.2f}" for name in lost]
        found.append(
            Alarm(
                name="slow-features",
                message=(
                    f"the latents contain the background but not the moving objects: {'; '.join(evidence)}. The "
                    f"effective rank of the latents is {rank:.1f}"
                ),
                remedy=(
                    "if these figures still improve, train for more steps; otherwise raise the weight of "
                    "'inverse-dynamics' (for example to 10), or set samples=\"centred\" in 'variance', 'covariance' or "
                    "'sigreg'; if velocities matter, raise the model's context to 2 and the frames of "
                    "'inverse-dynamics' to 3"
                ),
            )
        )
    if figures["open_loop"] > 1:
        found.append(
            Alarm(
                name="prediction",
                message=f"open-loop predictions have {figures['open_loop']:.2f} times the error of assuming no change",
                remedy="train for more steps, shorten the block, or raise the model's context to 2",
            )
        )
    return found


def _states(latents: Float[Tensor, "B N D"], context: int) -> Float[Tensor, "B M KD"]:
    return latents.unfold(1, context, 1).flatten(2)


def _varies(labels: Float[Tensor, "B N L"]) -> bool:
    flat = labels.flatten(0, 1)
    return bool((flat.std(dim=0) > 1e-4 * (flat.abs().mean(dim=0) + 1e-6)).any())


def _moving_share(values: Float[Tensor, "B N L"]) -> float:
    within = (values - values.mean(dim=1, keepdim=True)).square().sum()
    total = (values - values.mean(dim=(0, 1))).square().sum()
    return (within / total.clamp_min(1e-12)).item()
