"""A rule set bound to a run: its guardrails and objectives for one model, and their calibrated margins."""

import hashlib
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from worldloom.core.chain import canonical
from worldloom.core.seams import Objective
from worldloom.core.user_state import own_public_key
from worldloom.guardrails.consistency import check_consistent
from worldloom.guardrails.margins import Margins, read_margins
from worldloom.guardrails.objective_configs import build_objective
from worldloom.guardrails.rails import BoundRail
from worldloom.guardrails.rule_set import RuleSet, keys_for, part_digests
from worldloom.heads import Heads


class BoundRules:
    """A rule set bound to the heads of a run; `folder` contains the calibrated margins.

    Margins are accepted only if the user's own key, or a key in `trusted` that may sign every layer, has signed them.
    With `trusted=None`, their signature is not checked; use this for experiments only.

    Raises:
        ConfigError: a rule needs a head that the run does not have, or the guardrails contradict each other. Raised
            on first use of the guardrails.
    """

    def __init__(
        self, rule_set: RuleSet, heads: Heads, folder: Path, *, trusted: Collection[str] | None = frozenset()
    ) -> None:
        self.rule_set, self._heads, self._folder, self._trusted = rule_set, heads, folder, trusted
        self._judged: dict[bytes, tuple[BoundRail, ...]] = {}

    @cached_property
    def _parts(self) -> dict[str, str]:
        """Digests of the pictures and runs that the rules name: the signed ones, where there are any."""
        return part_digests(self.rule_set.layers) | dict(self.rule_set.parts)

    @cached_property
    def _own_heads(self) -> Heads:
        """The heads, which load exactly the pictures and runs that `inputs` describes."""
        return self._heads.with_verified(self._parts) if self._parts else self._heads

    @cached_property
    def _rails(self) -> tuple[BoundRail, ...]:
        return tuple(rule.rail.bind(rule.title, rule.owner, self._own_heads) for rule in self.rule_set.stated())

    def rails(self, margins: Margins | None = None) -> tuple[BoundRail, ...]:
        """Return the guardrails, with `margins` added to their own margins, and check once that they are consistent.

        Raises:
            ConfigError: see `BoundRules`.
        """
        key = b"" if margins is None else margins.values.numpy().tobytes()
        if key not in self._judged:
            rails = self._rails
            if margins is not None:
                rails = tuple(
                    rail.with_margin(rail.margin + values) for rail, values in zip(rails, margins.values, strict=True)
                )
            check_consistent(rails, self._heads.model, self._heads.support)
            self._judged[key] = rails
        return self._judged[key]

    def objective(self, goal: Float[Tensor, "B D"], usual: Objective) -> Objective:
        """Return the objective of the rule set, where `usual` is the default one; see `build_objective`."""
        every = {title: config for layer in self.rule_set.layers for title, config in layer.objectives.items()}
        return build_objective(every, self._own_heads, goal, usual)

    def margins(self, method: Mapping[str, Any]) -> Margins | None:
        """Return the margins that were calibrated for the method with these settings, or None if there are none.

        Raises:
            StorageError: the file is damaged, is not signed with a trusted key, or was measured with other heads.
        """
        path = self.margins_path(method)
        if not path.is_file():
            return None
        return read_margins(path, self.rule_set, method=method, inputs=self.inputs(), signers=self._signers())

    def inputs(self) -> dict[str, str]:
        """Return digests of everything that margins depend on, except the rule set and the method.

        These are the model, the heads that planners and guardrails read, the pictures that guardrails and objectives
        name, and the models of other runs that they name.
        """
        return self._heads.digests() | self._parts

    def _signers(self) -> set[str] | None:
        """Return the keys that may sign the margins; None if signatures are not checked."""
        if self._trusted is None:
            return None
        able = [keys_for(layer.layer, self._trusted) for layer in self.rule_set.layers]
        own = own_public_key()
        return set.intersection(*able) | ({own} if own is not None else set())

    def margins_path(self, method: Mapping[str, Any]) -> Path:
        """Return the path of the margins for a method; each rule set, model and method has its own file."""
        text = canonical([self.rule_set.fingerprint, self._heads.model.spec.fingerprint, canonical(method)])
        return self._folder / f"{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.json"
