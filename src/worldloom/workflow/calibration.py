"""Calibrates a rule set's margins: held-out logs give their shape, and plans that a method chooses give their scale."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.agents import MethodConfig, PlanMethod, PlannedMethod, PlanningAgent
from worldloom.core.errors import ConfigError, DataError
from worldloom.core.files import require_writable
from worldloom.core.progress import SILENT, Progress
from worldloom.core.seams import Agent
from worldloom.core.seeds import derive_seed
from worldloom.core.signing import SigningKey
from worldloom.core.types import Context, Episode, Rollouts
from worldloom.core.user_state import own_key, state_folder
from worldloom.envs import Frame
from worldloom.evaluation import PROTOCOLS, evaluate, wilson_interval
from worldloom.guardrails import (
    BoundRail,
    Margins,
    conformal_quantile,
    errors_seen,
    level_after,
    margin_shape,
    refusing,
    seen_violations,
    tolerance_quantile,
    write_margins,
)
from worldloom.heads import still
from worldloom.workflow.run import Run
from worldloom.workflow.session import Session, fast_planning, session_of

_log = logging.getLogger(__name__)
_LEAST = 1e-3  # the smallest score of an episode with a broken guardrail; also the smallest usual error, in margins
_GROWTH = 1.25, 1.5  # bounds on the factor's growth in a round, because plans change with the margins


def calibrate(
    run: Run | Session,
    *,
    method: str | None = None,
    protocol: str | None = None,
    split: str | None = None,
    episodes: int = 200,
    rounds: int = 8,
    confidence: float = 0.9,
    seed: int = 0,
    key: SigningKey | None = None,
    progress: Progress = SILENT,
) -> Margins:
    """Calibrate the margins of a rule set for a method, and write them into the run folder.

    The rule set comes from the session or from the recipe. The shape of the margins comes from held-out logs: for each
    guardrail and step ahead, the conformal quantile of the true violation minus the predicted violation. The scale is
    found in rounds. In each round the method acts in new episodes of the protocol, with seeds that evaluations never
    use, and with the margins multiplied by a factor.

    Each episode has a score, which is 0 if no guardrail was broken. Otherwise the score is the smallest factor with
    which the margins would have refused the first plan that broke a guardrail, or infinite if the fallback acted
    instead of a plan. If the tolerance quantile of the scores (see `tolerance_quantile`) is at most the round's factor,
    calibration ends: the risk is met at the confidence of one round, in such episodes and for plans that are chosen
    with these margins (`worldloom.guardrails.margins` has a proof sketch). Otherwise the next round's factor is the
    quantile, limited to 1.25 to 1.5 times the previous factor.

    For a method with the guard "per candidate", the margins come only from the logs. The margins are signed with `key`,
    by default the user's own key.

    Raises:
        ConfigError: there is no rule set, the rule set has no risk, or the method does not use margins.
        DataError: there are too few episodes for the risk, the fallback broke guardrails in too many of them, or no
            round found a large enough factor.
    """
    session = session_of(run)
    run, rules = session.run, session.rules
    name = method or run.recipe.default_method
    config = run.recipe.method(name)
    if rules is None or rules.rule_set.risk is None or not rules.rule_set.titles:
        raise ConfigError("calibration needs a rule set with guardrails and a risk; pass one with --rules")
    if not isinstance(config, PlannedMethod) or not uses_margins(config):
        raise ConfigError(
            f"the method {name!r} does not use margins; choose a method that plans with guard='calibrated'"
        )
    risk, path, signer = rules.rule_set.risk, rules.margins_path(config.calibrated_as), key or own_key()
    require_writable(path, state_folder())
    settings = {**config.calibrated_as, "recalibrate": config.recalibrate}
    about: dict[str, Any] = {"method": settings, "inputs": rules.inputs()}
    shape = _shape(run, rules.rails(), config.horizon, risk, progress)
    shape = level_after(shape, config.own_margins(run.model.spec))
    if config.guarding == "per candidate":
        margins = Margins(values=shape, risk=risk, episodes=0)
        write_margins(path, margins, rules.rule_set, about, signer)
        return margins
    usual = run.usual_protocol if protocol is None else PROTOCOLS[protocol]
    if usual is None:
        raise ConfigError("the world in which the data were collected has no protocol; choose one with --protocol")
    asked = usual.customise(episodes=episodes, split=split)
    factor, history = 1.0, []
    for number in range(rounds):
        trial = Margins(values=factor * shape, risk=risk, episodes=episodes)
        drawn = asked.customise(seed=derive_seed(seed, "calibration", number) % 2**31)
        witness = _Scores(run, config, shape, factor)
        build = partial(session.build, config, margins=trial, seed=number)
        acting = session.acting(guarding=config, margins=trial)
        with fast_planning(run):
            results = evaluate(drawn, {name: build}, record=0, witness=witness, rules=acting, progress=progress)
        scores = torch.tensor(witness.scores())
        needed = tolerance_quantile(scores, risk, confidence)
        history.append({
            "factor": factor,
            "needed": needed if math.isfinite(needed) else None,
            "episodes": len(scores),
            "broken": int((scores > 0).sum()),
            "broken under the fallback": int(scores.isinf().sum()),
            "success": results.rows[0].overall.rate,
        })  # fmt: skip
        _log.info("round %d: %s", number + 1, history[-1])
        if needed <= factor:
            margins = replace(trial, usual=witness.usual(risk), episodes=len(scores))  # of all splits
            about |= {"protocol": drawn.title, "confidence": confidence, "rounds": history}
            write_margins(path, margins, rules.rule_set, about, signer)
            return margins
        if math.isinf(needed):
            raise DataError(_why_infinite(scores, risk, confidence))
        factor = min(max(needed, _GROWTH[0] * factor), _GROWTH[1] * factor)
    raise DataError(
        f"calibration did not converge in {rounds} rounds: the last round multiplied the margins by "
        f"{history[-1]['factor']:.3g}, but a factor of {needed:.3g} is required. Use more rounds (--rounds) or "
        f"episodes (--episodes), or state a larger risk in the rule set"
    )


def uses_margins(method: MethodConfig) -> bool:
    """Return whether a method plans with calibrated margins."""
    return isinstance(method, PlannedMethod) and method.guarding in ("calibrated", "per candidate")


def _why_infinite(scores: Float[Tensor, "N"], risk: float, confidence: float) -> str:
    broken = int(scores.isinf().sum())
    if broken == 0:
        return (
            f"{len(scores)} episodes are too few to confirm a risk of {risk:g} at a confidence of {confidence:g}; use "
            f"at least {math.ceil(math.log(1 - confidence) / math.log1p(-risk))}"
        )
    low, high = wilson_interval(broken, len(scores))
    return (
        f"in {broken} of {len(scores)} episodes (95% interval {low:.1%} to {high:.1%}) a guardrail was broken while "
        f"the fallback acted, because no plan satisfied all guardrails. Larger margins cannot reduce this to a risk of "
        f"{risk:g}. Choose another fallback, or declare a larger risk"
    )


def _quantities(run: Run) -> dict[str, str]:
    """Return a mapping from probed quantities to their labels."""
    return {name: probe.label or name for name, probe in run.recipe.probes.items()}


class _Scores:
    """Scores each episode by the smallest factor that would have refused the first plan that broke a guardrail."""

    def __init__(self, run: Run, config: PlannedMethod, shape: Float[Tensor, "G T"], factor: float) -> None:
        self._model, self._labels = run.model, _quantities(run)
        self._block = run.model.spec.block
        self._replan = (config.replan if isinstance(config, PlanMethod) else 0) or self._block
        self._shape, self._factor = shape, factor
        self._done: list[float] = []
        self._now, self._broken = np.zeros(0), np.zeros(0, bool)
        self._errors: list[Tensor] = []
        self._before = torch.zeros(0, 0)
        self._agent: PlanningAgent | None = None

    def scores(self) -> list[float]:
        """Return one score for each episode so far."""
        return [*self._done, *self._now.tolist()]

    def usual(self, risk: float) -> float:
        """Return the prediction error, in units of the margins, that is exceeded with probability `risk`.

        The errors are measured at the end of each executed block.
        """
        found = torch.cat(self._errors) if self._errors else torch.ones(0)
        usual = conformal_quantile(found, risk)
        return max(usual, _LEAST) if math.isfinite(usual) else 1.0

    def begin(self, agent: Agent, size: int) -> None:
        """Begin episodes in `size` environments."""
        self._done += self._now.tolist()
        self._agent, self._now, self._broken = agent.parts[""], np.zeros(size), np.zeros(size, bool)

    def saw(self, frame: Frame, step: int) -> None:
        """Compare the observed states with the predictions of the plans that led to them, and update the scores."""
        assert self._agent is not None
        plan, rails = self._agent.plan, self._agent.rails
        quantities = {
            name: torch.from_numpy(frame.numbers(label, "the rule set"))
            for name, label in self._labels.items()
            if frame.info(label) is not None
        }
        told = [bound.rail.true(quantities) for bound in rails]
        known = [one.cpu().double() for one in told if one is not None]
        refused = np.isin(np.arange(len(frame.rows)), self._agent.refused)
        if step % self._block == 0:  # for guardrails without a true quantity, and for the usual errors
            with torch.inference_mode():
                here = self._model.encode(frame.observations.to(self._model.device))
                if step > 0 and plan is not None:
                    block = (step - 1) % self._replan // self._block
                    before = self._before[frame.rows].to(here)
                    seen = seen_violations(rails, plan, block, still(before, self._model), here)
                    self._errors.append(errors_seen(rails, plan, block, seen)[torch.from_numpy(~refused)].cpu())
                    known += [
                        seen[rail.name].cpu().double() for rail, one in zip(rails, told, strict=True) if one is None
                    ]
            self._before = torch.zeros(len(self._now), here.shape[1]) if step == 0 else self._before
            self._before[frame.rows] = here.cpu()
        if not known:
            return
        broken = (torch.stack(known).amax(dim=0) > 0).numpy()
        fresh = broken & ~self._broken[frame.rows]
        if step > 0 and plan is not None:  # a guardrail that is broken before the first action is not counted
            predicted = torch.stack([plan.violations[rail.name].cpu() for rail in rails], dim=1)
            score = np.where(refused, np.inf, refusing(predicted - self._factor * self._shape, self._shape).numpy())
            self._now[frame.rows[fresh]] = np.maximum(score[fresh], _LEAST)
        self._broken[frame.rows] |= broken


def _shape(run: Run, rails: Sequence[BoundRail], horizon: int, risk: float, progress: Progress) -> Float[Tensor, "G T"]:
    """Return the shape of the margins, from all windows of `horizon` blocks in held-out logs."""
    dataset, held_out = run.held_out()
    needed = (run.model.spec.context - 1 + horizon) * run.model.spec.block
    found = []
    with progress.task("errors on logs", len(held_out), "episode") as task, torch.inference_mode():
        for number in held_out:
            task.advance(1)
            episode = dataset.episode(number)
            if episode.steps >= needed:
                found.append(_errors(episode, run, rails, horizon))
    if not found:
        raise DataError(
            f"expected a held-out episode of at least {needed} steps, the length of a context and a plan together; "
            f"all are shorter. Record longer episodes"
        )
    return margin_shape(torch.cat(found), risk)


def _errors(episode: Episode, run: Run, rails: Sequence[BoundRail], horizon: int) -> Float[Tensor, "N G T"]:
    """Return the true violations minus the predicted ones, for every window of an episode.

    The difference is NaN for a guardrail that is already broken at the start of the window.
    """
    context, block = run.model.spec.context, run.model.spec.block
    _, latents, blocks = run.encode(episode)
    starts = torch.arange(context - 1, len(latents) - horizon)
    before = Context(
        latents=latents[starts[:, None] + torch.arange(1 - context, 1)],
        actions=blocks[starts[:, None] + torch.arange(1 - context, 0)],
    )
    ahead = torch.arange(horizon)
    actions = blocks[starts[:, None] + ahead][:, None]
    rollouts = Rollouts(context=before, actions=actions, latents=run.model.rollout(before, actions))
    seen = replace(rollouts, latents=latents[starts[:, None] + ahead + 1][:, None])
    steps = len(latents) * block - block + 1
    quantities = {
        name: torch.from_numpy(episode.labels[label][:steps])
        for name, label in _quantities(run).items()
        if label in episode.labels
    }
    bare = [bound.with_margin(0.0) for bound in rails]
    predicted = torch.stack([bound.violation(rollouts)[:, 0].cpu() for bound in bare], dim=1).float()
    really = []
    for bound in bare:
        told = bound.rail.true(quantities)
        if told is None:
            really.append(bound.violation(seen)[:, 0].cpu().float())
            continue
        worst = told[1:].view(-1, block).amax(dim=1).float()  # the worst value in each block
        truth = worst[starts[:, None] + ahead]
        really.append(truth.masked_fill((told[starts * block] > 0)[:, None], torch.nan))
    return torch.stack(really, dim=1) - predicted
