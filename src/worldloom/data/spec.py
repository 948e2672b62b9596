"""The specification of a dataset, which is stored in the dataset."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from worldloom.core.errors import DataError
from worldloom.core.json_text import parse_json
from worldloom.core.types import ActionSpec, ObservationSpec


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """The specification of a dataset: observations, actions, label sizes, and the origin of the episodes.

    `environment` contains JSON values. In it, `collect` stores those of its arguments that determine the episodes.
    """

    observation: ObservationSpec
    action: ActionSpec
    labels: dict[str, int] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, size in self.labels.items():
            if not name or size < 1:
                raise DataError(
                    f"a label needs a name and at least one value; got {name!r} with {size} values. Correct the label"
                )

    def to_json(self) -> str:
        """Return the spec as JSON with sorted keys."""
        try:
            return json.dumps(asdict(self), sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise DataError(f"the dataset's environment must be JSON: {error}; use only JSON values") from error

    @classmethod
    def from_json(cls, text: str) -> "DatasetSpec":
        """Return the spec from the text that `to_json` wrote.

        Raises:
            DataError: the text is not a valid spec.
        """
        try:
            values = parse_json(text)
            return cls(
                observation=ObservationSpec.from_json(values["observation"]),
                action=ActionSpec.from_json(values["action"]),
                labels=values["labels"],
                environment=values["environment"],
            )
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise DataError(
                f"the dataset's spec is damaged ({type(error).__name__}: {error}); restore the dataset from a copy"
            ) from error
