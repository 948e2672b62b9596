"""Margins as a file: what was calibrated, for whom, and what it promises."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from worldloom.core.errors import StorageError
from worldloom.core.files import read_json, write_json
from worldloom.guardrails.margins import Margins
from worldloom.guardrails.rule_set import RuleSet

_KIND = "worldloom margins"


def write_margins(path: Path, margins: Margins, rules: RuleSet, about: Mapping[str, Any]) -> None:
    """Write margins atomically; `about` says how they came to be."""
    write_json(
        path,
        {
            "kind": _KIND,
            "format": 1,
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

    Raises:
        StorageError: the file is damaged, or of another rule set, model or method.
    """
    values = read_json(path)
    try:
        if (values["kind"], values["format"], values["rules"]) != (_KIND, 1, rules.fingerprint):
            raise ValueError("it is of another kind or rule set")
        if values["model"] != model or _calibrated(values["method"]) != _calibrated(method):
            raise ValueError("it is of another model or method")
        margins = torch.tensor(values["values"], dtype=torch.float32)
        if margins.ndim != 2 or len(margins) != len(rules.titles) or not bool((margins >= 0).all()):
            raise ValueError(f"expected a margin of 0 or more for each step of {len(rules.titles)} guardrails")
        usual = float(values["usual"])
        if not 0 < usual < math.inf:
            raise ValueError(f"expected usual errors above 0; got {usual}")
        return Margins(values=margins, risk=float(values["risk"]), episodes=int(values["episodes"]), usual=usual)
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{path} holds no margins for this rule set ({error}); calibrate again") from None


def _calibrated(method: Mapping[str, Any]) -> dict[str, Any]:
    """Return what margins are calibrated for: all but how they stretch later."""
    return {key: value for key, value in dict(method).items() if key != "recalibrate"}
