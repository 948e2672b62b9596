"""A session: a run with rules, a memory and an audit log."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import worldloom
from worldloom.agents import AgentParts, AuditLog, MethodConfig, PlanMethod, PlannedMethod
from worldloom.core.errors import ConfigError
from worldloom.core.hardware import choosable_threads, fastest_threads, time_threads, use_threads
from worldloom.core.seams import Agent, Policy, SafePolicy
from worldloom.core.types import Goal, Observations
from worldloom.evaluation import ActingRules
from worldloom.guardrails import Margins, RuleSet
from worldloom.memory import EpisodicMemory
from worldloom.planning.solvers import CEM
from worldloom.workflow.run import Run


class Session:
    """A run with rules, a memory and an audit log, for use in a `with` statement.

    Its agents obey the rules, write to the memory and log their decisions. The layers of `rules` come after the
    recipe's own layer, which they may only tighten. `memory` is the directory of the episodic memory; a missing
    directory is created. `audit` is the directory of the audit log, which records the decisions of one agent. With
    `simulator`, a world that does not declare whether it is a simulator counts as one (see
    `worldloom.evaluation.Worlds`).

    Raises:
        ConfigError: `rules` loosen the recipe's rules.
        StorageError, CheckpointError: the memory belongs to a different model, or another process is writing it.
    """

    def __init__(
        self,
        run: Run,
        *,
        rules: RuleSet | None = None,
        memory: Path | str | None = None,
        audit: Path | str | None = None,
        simulator: bool = False,
    ) -> None:
        self.run, self.rules, self._audit, self._simulator = run, run.rules, audit, simulator
        if rules is not None:
            own = run.recipe.rules
            self.rules = run.bind(rules if own is None else RuleSet(layers=(own, *rules.layers), parts=rules.parts))
        self._owned = ExitStack()
        self.memory: EpisodicMemory | None = None
        if memory is not None:
            self.memory = self._owned.enter_context(EpisodicMemory.open_or_create(memory, spec=run.model.spec))

    def agent(self, method: str | None = None, *, seed: int = 0, compared: bool = False) -> Agent:
        """Build an agent for a method of the recipe, by default its `default_method`.

        If the session has rules, the method must support rules, unless `compared` marks the agent as a baseline.

        Raises:
            ConfigError: the recipe has no such method, the method does not support the session's rules, or see `build`.
        """
        config = self.run.recipe.method(method, guarded=self.rules is not None and not compared)
        return self.build(config, seed=seed)

    def build(self, method: MethodConfig, *, seed: int = 0, margins: Margins | None = None) -> Agent:
        """Build an agent for any method; `margins` replace the method's calibrated margins.

        Raises:
            ConfigError: the rules have a risk but no margins were calibrated, guardrails contradict each other, or
                there is an audit log and the method does not plan.
            StorageError: another agent is writing the audit log.
        """
        parts = AgentParts(heads=self.run.heads, rules=self.rules, margins=margins, memory=self.memory)
        if self._audit is not None:
            parts = replace(parts, auditor=self._audit_log(self._audit, method, parts))
        return method.build(parts, seed=seed)

    def acting(
        self,
        *,
        chosen: Collection[str] = (),
        others: Collection[str] = (),
        guarding: MethodConfig | None = None,
        margins: Margins | None = None,
    ) -> ActingRules | None:
        """Return which methods may act on a plant under the session's rules (see `ActingRules`); None without rules.

        `chosen` are the methods that the user chose, and `others` are the names of agents of other libraries.
        `guarding`, with `margins`, is the method that guards the logging policy. By default it is the recipe's default
        method or, if that method does not obey guardrails, the first method that does.
        """
        if self.rules is None:
            return None
        methods = self.run.recipe.methods

        def guard(policy: Policy) -> SafePolicy:
            able = [guarding] if guarding is not None else [methods[self.run.recipe.default_method], *methods.values()]
            method = next((each for each in able if isinstance(each, PlannedMethod) and each.guarded), None)
            if method is None:
                raise ConfigError(
                    "goals of the logging policy need a method that plans under the rule set, but the recipe has none; "
                    "add a method with guard='calibrated' to the recipe"
                )
            return method.guarded_policy(AgentParts(heads=self.run.heads, rules=self.rules, margins=margins), policy)

        names = [name for name, config in methods.items() if config.guarded and name not in others]
        return ActingRules(methods=names, chosen=[*chosen, *others], guard=guard, simulator=self._simulator)

    def _audit_log(self, folder: Path | str, method: MethodConfig, parts: AgentParts) -> AuditLog:
        """Open the audit log of an agent, and record everything that its decisions depend on."""
        if not isinstance(method, PlannedMethod):
            raise ConfigError(
                f"the method {method.name!r} does not plan, and the audit log records only plans; choose a method that "
                f"plans, or leave out the audit log"
            )
        margins = method.margins(parts)
        layers = [] if self.rules is None else self.rules.rule_set.layers
        about = {
            "worldloom": worldloom.__version__,
            "run": str(self.run.path),
            "model": self.run.model.spec.fingerprint,
            "method": method.model_dump(mode="json"),
            "layers": [layer.model_dump(mode="json") for layer in layers],
            "margins": None if margins is None else margins.values.tolist(),
            "threads": torch.get_num_threads(),
        }
        return self._owned.enter_context(AuditLog(folder, self.run.model, method.rails(parts), about=about))

    def close(self) -> None:
        """Close the audit log and the memory."""
        self._owned.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def fast_planning(run: Run, environments: int = 8) -> Iterator[None]:
    """Run a `with` block with the number of CPU threads that plans fastest for `environments` (see `time_threads`).

    To measure this, it plans between blank observations, and discards the plans.
    """
    if run.device.type != "cpu" or not choosable_threads():
        yield
        return
    observation = run.model.spec.observation
    blank = Observations.from_numpy(
        None if observation.pixels is None else np.zeros((environments, *observation.pixels), np.uint8),
        np.zeros((environments, observation.vector), np.float32) if observation.vector else None,
    )
    # One iteration, because beside other processes a plan with several threads can take seconds.
    agent = PlanMethod(solver=CEM(iterations=1)).build(AgentParts(heads=run.heads), seed=0)

    def plan() -> None:
        agent.reset(Goal(observations=blank))
        agent.act(blank)

    with use_threads(fastest_threads(time_threads(plan, seconds=0.5))):
        yield


def session_of(run: Run | Session) -> Session:
    """Return a session unchanged; for a run, return a new session, which does not need to be closed."""
    return run if isinstance(run, Session) else Session(run)
