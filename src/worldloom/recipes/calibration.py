"""Margins for a policy: measured on logs, then on the plans that a method chooses, until they keep the risk."""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from worldloom.agents import PlanningAgent, Policy
from worldloom.core.errors import ConfigError, DataError
from worldloom.core.progress import SILENT, Progress
from worldloom.core.protocols import Agent
from worldloom.core.seeds import derive_seed
from worldloom.core.types import Context, Episode, Observations, Plan, Rollouts
from worldloom.data import EpisodeDataset
from worldloom.evaluation import PROTOCOLS, evaluate, wilson_interval
from worldloom.evaluation.world import Frame
from worldloom.planning import Margins, Rail, conformal_quantile
from worldloom.planning.geometry import still
from worldloom.recipes.margins import write_margins
from worldloom.recipes.methods import MethodConfig, PlanMethod
from worldloom.recipes.run import Run

_log = logging.getLogger(__name__)
_LEAST = 1e-3  # of the largest margin: below it nothing is told from nothing


def calibrate(
    run: Run,
    *,
    method: str | None = None,
    protocol: str | None = None,
    split: str | None = None,
    episodes: int = 200,
    rounds: int = 6,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Margins:
    """Calibrate the margins of the run's policy for a method, and keep them in the run folder.

    First, on held-out logs, how errors grow along a plan: for each guardrail and step the conformal quantile of what is
    really so less what was predicted. Then the method acts in episodes of the protocol's world, whose seeds no
    evaluation draws, with these margins stretched by a factor; each episode gives one score, the largest ratio of an
    error to its margin over all that it did, infinite where a limit was broken while the fallback acted. If their
    conformal quantile is at most the factor, the promise holds for episodes like these, under the plans that are chosen
    with these very margins; else the quantile is the next factor, tried on fresh episodes.

    A method whose guard is "per candidate" gets the margins of the logs alone.

    Raises:
        ConfigError: the run has no policy, or it states no risk; the method keeps none.
        DataError: too few episodes for the risk, or no factor was found in so many rounds.
    """
    name = method or run.recipe.default_method
    config, policy = run.method(name), run.policy
    if policy is None or policy.risk is None:
        raise ConfigError("there is nothing to calibrate: the run has no policy that states a risk")
    if not isinstance(config, PlanMethod) or not keeps_margins(config):
        raise ConfigError(f"the method {name!r} keeps no margins; choose one that plans with a calibrated guard")
    shape = _shape(run, policy, config.horizon, policy.risk, progress)
    about: dict[str, Any] = {"method": config.model_dump(mode="json"), "model": run.model.spec.fingerprint}
    if config.guard == "per candidate":
        margins = Margins(values=shape, risk=policy.risk, episodes=0)
        write_margins(run.margins_path(config), margins, policy, about)
        return margins
    asked = PROTOCOLS[protocol or _protocol_of(run)]
    asked = asked.customise(episodes=episodes, split=split)
    factor, history = 1.0, []
    for number in range(rounds):
        trial = Margins(values=factor * shape, risk=policy.risk, episodes=episodes)
        drawn = asked.customise(seed=derive_seed(seed, "calibration", number) % 2**31)
        witness = _Scores(run, policy, config, shape, factor)
        build = partial(config.build, run.under(policy, trial), seed=number)
        results = evaluate(drawn, {name: build}, record=0, witness=witness, progress=progress)
        scores = torch.tensor(witness.scores())
        needed = conformal_quantile(scores, policy.risk)
        history.append({
            "factor": factor,
            "needed": needed if math.isfinite(needed) else None,
            "episodes": len(scores),
            "broken under the fallback": int(scores.isinf().sum()),
            "success": results.rows[0].overall.rate,
        })  # fmt: skip
        _log.info("round %d: factor %.3g, needed %.3g", number + 1, factor, needed)
        if needed <= factor:
            write_margins(
                run.margins_path(config), trial, policy, {**about, "protocol": drawn.title, "rounds": history}
            )
            return trial
        if math.isinf(needed):
            raise DataError(_why_infinite(scores, policy.risk))
        factor = needed
    raise DataError(
        f"no margins were found in {rounds} rounds: the last factor tried was {history[-1]['factor']:.3g}, and "
        f"{factor:.3g} would have been needed. Run more rounds or episodes, or state a larger risk"
    )


def keeps_margins(method: MethodConfig) -> bool:
    """Whether a method keeps the margins of a policy."""
    return isinstance(method, PlanMethod) and method.guard in ("calibrated", "per candidate")


def _why_infinite(scores: Float[Tensor, "N"], risk: float) -> str:
    broken = int(scores.isinf().sum())
    if broken == 0:
        return (
            f"{len(scores)} episodes cannot tell a risk of {risk:g}: at least {math.ceil(round(1 / risk, 9)) - 1} are "
            f"needed. Run more"
        )
    low, high = wilson_interval(broken, len(scores))
    return (
        f"in {broken} of {len(scores)} episodes (95% interval {low:.1%} to {high:.1%}) a guardrail was broken while no "
        f"plan held and the fallback acted, which no margin mends at a risk of {risk:g}. Declare another fallback, or "
        f"state a larger risk"
    )


def _protocol_of(run: Run) -> str:
    if run.recipe.protocol is None:
        raise ConfigError("the recipe names no protocol; say in which world to calibrate (--protocol)")
    return run.recipe.protocol


def _quantities(run: Run) -> dict[str, str]:
    """Return the label of each probed quantity."""
    return {name: probe.label or name for name, probe in run.recipe.probes.items()}


class _Scores:
    """A witness that gathers, for each episode, by how much its plans erred in the worst case, in units of `shape`."""

    def __init__(
        self, run: Run, policy: Policy, config: PlanMethod, shape: Float[Tensor, "G T"], factor: float
    ) -> None:
        self._model, self._labels = run.model, _quantities(run)
        self._replan, self._block = config.replan or run.model.spec.block, run.model.spec.block
        self._rails = policy.rails(run)
        self._shape, self._factor = shape, factor
        self._done: list[float] = []
        self._now = np.zeros(0)
        self._agent: PlanningAgent | None = None
        self._before = torch.zeros(0, 0)

    def scores(self) -> list[float]:
        """Return one score for each episode that was begun."""
        return [*self._done, *self._now.tolist()]

    def begin(self, agent: Agent, size: int) -> None:
        """Begin episodes in so many environments."""
        assert isinstance(agent, PlanningAgent)
        self._done += self._now.tolist()
        self._agent, self._now = agent, np.zeros(size)

    def saw(self, frame: Frame, step: int) -> None:
        """Compare what the world gives with what the plan that led here predicted."""
        assert self._agent is not None
        plan = self._agent.plan
        here = None
        if step % self._block == 0:  # for what no quantity tells
            with torch.inference_mode():
                here = self._model.encode(frame.observations.to(self._model.device))
        if step > 0 and plan is not None:
            quantities = {
                name: torch.from_numpy(frame.numbers(label, "the policy"))
                for name, label in self._labels.items()
                if frame.info(label) is not None
            }
            self._compare(frame, (step - 1) % self._replan // self._block, plan, quantities, here)
        if here is not None:
            self._before = torch.zeros(len(self._now), here.shape[1]) if step == 0 else self._before
            self._before[frame.rows] = here.cpu()

    def _compare(
        self,
        frame: Frame,
        block: int,
        plan: Plan,
        quantities: Mapping[str, Float[Tensor, "R _"]],
        here: Float[Tensor, "R D"] | None,
    ) -> None:
        assert self._agent is not None
        refused = np.isin(np.arange(len(frame.rows)), self._agent.refused)
        for place, rail in enumerate(self._rails):
            true = rail.true(quantities)
            if true is None:
                if here is None:
                    continue
                true = self._seen(rail, frame, plan, block, here)
            kept = float(rail.margin) + self._factor * self._shape[place, block].item()
            predicted = plan.violations[rail.name][:, block].cpu().double() - kept
            error = (true.cpu().double() - predicted).numpy() / self._shape[place, block].item()
            score = np.where(refused, np.where(true.cpu().numpy() > 0, np.inf, 0.0), error)
            self._now[frame.rows] = np.maximum(self._now[frame.rows], np.nan_to_num(score, nan=np.inf))

    def _seen(self, rail: Rail, frame: Frame, plan: Plan, block: int, here: Float[Tensor, "R D"]) -> Float[Tensor, "R"]:
        """Return what a guardrail says of what was seen, where no quantity tells what really is."""
        before = self._before[frame.rows].to(here)
        rollouts = Rollouts(
            context=still(before, self._model),
            actions=plan.actions[:, None, block : block + 1],
            latents=here[:, None, None],
        )
        return rail.raw(rollouts)[:, 0, 0]


def _shape(run: Run, policy: Policy, horizon: int, risk: float, progress: Progress) -> Float[Tensor, "G T"]:
    """Return for each guardrail and step ahead the conformal quantile of its errors on held-out logs, never falling."""
    rails = policy.rails(run)
    errors = _log_errors(run, rails, horizon, progress)
    quantiles = torch.tensor([[conformal_quantile(step, risk) for step in rail.unbind(1)] for rail in errors.unbind(1)])
    if not bool(quantiles.isfinite().all()):
        raise DataError(f"{len(errors)} stretches of held-out logs are too few for a risk of {risk:g}; label more")
    shape = quantiles.clamp_min(0).cummax(dim=1).values
    return shape.clamp_min(max(_LEAST * float(shape.max()), 1e-6))


def _log_errors(run: Run, rails: Sequence[Rail], horizon: int, progress: Progress) -> Float[Tensor, "N G T"]:
    """Return what really was less what was predicted, for stretches of `horizon` blocks of held-out logs."""
    dataset = EpisodeDataset.open(run.data)
    model, block, labels = run.model, run.model.spec.block, _quantities(run)
    context, needed = model.spec.context, (run.model.spec.context - 1 + horizon) * run.model.spec.block
    held_out = run.heads().get("held_out") or range(len(dataset))
    found: list[Tensor] = []
    with progress.task("errors on logs", len(held_out), "episode") as task, torch.inference_mode():
        for number in held_out:
            task.advance(1)
            episode = dataset.episode(int(number))
            if episode.steps < needed:
                continue
            found.append(_errors_of(episode, model, rails, labels, horizon, context, block))
    if not found:
        raise DataError(f"no held-out episode is as long as a plan, {needed} steps; record longer ones")
    return torch.cat(found)


def _errors_of(
    episode: Episode,
    model: Any,
    rails: Sequence[Rail],
    labels: Mapping[str, str],
    horizon: int,
    context: int,
    block: int,
) -> Float[Tensor, "N G T"]:
    """Return the errors of stretches of one episode, each beginning where the one before ends."""
    frames = Observations.from_numpy(
        None if episode.pixels is None else episode.pixels[::block],
        None if episode.vector is None else episode.vector[::block],
    )
    latents = model.encode(frames.to(model.device))
    blocks = torch.from_numpy(episode.actions[: (len(latents) - 1) * block]).reshape(len(latents) - 1, -1)
    starts = range(context - 1, len(latents) - horizon, horizon)
    chunks = []
    for start in starts:
        first = start - context + 1
        before = Context(latents=latents[None, first : start + 1], actions=blocks[None, first:start].to(latents))
        actions = blocks[None, None, start : start + horizon].to(latents)
        rollouts = Rollouts(context=before, actions=actions, latents=model.rollout(before, actions))
        seen = Rollouts(context=before, actions=actions, latents=latents[None, None, start + 1 : start + horizon + 1])
        span = slice(start * block + 1, (start + horizon) * block + 1)
        quantities = {
            name: torch.from_numpy(episode.labels[label][span])
            for name, label in labels.items()
            if label in episode.labels
        }
        errors = []
        for rail in rails:
            true = rail.true(quantities)
            really = rail.raw(seen)[0, 0] if true is None else true.view(horizon, block).amax(dim=1)
            errors.append(really.cpu() - rail.raw(rollouts)[0, 0].cpu())
        chunks.append(torch.stack(errors))
    return torch.stack(chunks)
