"""A run: the results of one training, in a folder."""

from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from worldloom.agents import AgentParts
from worldloom.core.config import Shape, check_shape
from worldloom.core.errors import StorageError
from worldloom.core.files import read_json
from worldloom.core.picture_layout import PictureOptions
from worldloom.core.seams import Agent
from worldloom.core.types import Episode, Observations
from worldloom.data import EpisodeDataset, read_picture
from worldloom.evaluation import PROTOCOLS, Protocol, default_protocol
from worldloom.guardrails import BoundRules, RuleSet
from worldloom.heads import Heads
from worldloom.models import JEPA, load_model
from worldloom.recipes import Recipe
from worldloom.training import RunFolder


class _Environment(Shape):
    id: str | None = None


class _RunConfig(Shape):
    environment: _Environment
    data: str


class _Figures(Shape):
    held_out: tuple[Annotated[int, Field(ge=0)], ...] = ()
    complete: bool = False


class _Row(Shape):
    method: str
    split: str
    rate: float


class _Evaluated(Shape):
    rows: list[_Row]


class Run:
    """A run folder with the results of one training; its parts are loaded on first use.

    Margins in the folder are used only if the user's own key or a key in `trusted` signed them; see `BoundRules`.

    A run needs no closing. To act with a memory, an audit log or additional rules, open a `Session`.

    Raises:
        CheckpointError: on first use of a part that is missing, damaged, or was fitted on a different model.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        device: torch.device | str | None = None,
        trusted: Collection[str] | None = frozenset(),
    ) -> None:
        self.folder, self._trusted = folder, trusted
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(default if device is None else device)

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        device: torch.device | str | None = None,
        trusted: Collection[str] | None = frozenset(),
    ) -> "Run":
        """Open a run folder; `device` defaults to a GPU if one is available. For `trusted`, see `BoundRules`.

        Raises:
            StorageError: there is no run at the path.
        """
        return cls(RunFolder.open(path), device=device, trusted=trusted)

    @property
    def path(self) -> Path:
        """The path of the run folder."""
        return self.folder.path

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe, with its overrides."""
        return Recipe.parse(recipe_values(self.folder))

    @property
    def environment(self) -> dict[str, Any]:
        """The `environment` of the dataset's spec, which describes the source of the data; empty if unknown."""
        environment: dict[str, Any] = self._config["environment"]
        return environment

    @property
    def has_protocol(self) -> bool:
        """Whether the recipe's protocol is for the world in which the data were collected."""
        title = self.recipe.protocol
        return title is not None and PROTOCOLS[title].env_id == self.environment.get("id")

    @property
    def usual_protocol(self) -> Protocol | None:
        """The protocol for the world in which the data were collected; None if the world has none, or is unknown.

        This is the recipe's protocol if it has the same environment, else the environment's default protocol. If the
        data were collected with picture options, or with environment arguments that differ from those of the recipe or
        protocol, the returned protocol has these too, and its name ends in "-custom".
        """
        own = self.recipe.protocol if self.has_protocol else None
        if (title := own or default_protocol(self.environment.get("id"))) is None:
            return None
        protocol, collection = PROTOCOLS[title], self.recipe.collection
        arguments: dict[str, Any] = self.environment.get("kwargs") or {}
        usual = protocol.env_kwargs if own is None or collection is None else collection.env_kwargs
        pictures = self.environment.get("pictures")
        if arguments == usual and pictures is None:
            return protocol
        changed: dict[str, Any] = {"env_kwargs": arguments, "name": f"{protocol.name}-custom"}
        if pictures is not None:
            changed["pictures"] = PictureOptions.parse(pictures)
        return protocol.model_copy(update=changed)

    @property
    def picture_values(self) -> tuple[float, float] | None:
        """The values that became 0 and 255 in the dataset's pixels; None if the pictures were bytes."""
        values = (self.environment.get("pictures") or {}).get("range")
        return None if values is None else (float(values[0]), float(values[1]))

    @property
    def data(self) -> str:
        """The dataset's path at the time of training."""
        return str(self._config["data"])

    @property
    def _config(self) -> dict[str, Any]:
        config = self.folder.config
        check_shape(config, _RunConfig, self.path / "config.json")
        return config

    @cached_property
    def model(self) -> JEPA:
        """The world model."""
        return load_model(self.folder.model_directory, self.device)

    def read_picture(self, path: Path) -> Observations:
        """Read a picture file as one observation of the model's pixels, converted like the training pictures.

        Raises:
            StorageError, DataError: see `data.read_picture`.
        """
        expected = self.model.spec.observation.pixels
        assert expected is not None, "the model has no pixels"
        return read_picture(path, expected, values=self.picture_values, colours=self.model.sees_colours)

    @cached_property
    def heads(self) -> Heads:
        """The world model with the heads that were fitted on it."""
        recipe = self.recipe
        return Heads(self.path / "heads", self.model, probe_names=tuple(recipe.probes), levels=len(recipe.hierarchy))

    @property
    def figures(self) -> dict[str, Any]:
        """Numbers about the heads: held-out episodes, fitting times in seconds, step length, rank correlations."""
        path = self.path / "heads.json"
        figures: dict[str, Any] = read_json(path) if path.is_file() else {}
        check_shape(figures, _Figures, path)
        return figures

    def encode(self, episode: Episode) -> tuple[Observations, Float[Tensor, "N D"], Float[Tensor, "M A"]]:
        """Return N frames of an episode, one block apart, their latents, and the M = N - 1 action blocks in between."""
        spec = self.model.spec
        pixels, vector = (None if part is None else part[:: spec.block] for part in (episode.pixels, episode.vector))
        frames = Observations.from_numpy(pixels, vector)
        latents = self.model.encode(frames.to(self.device))
        count = len(latents) - 1
        blocks = torch.from_numpy(episode.actions[: count * spec.block].reshape(count, spec.block_size))
        return frames, latents, blocks.to(self.device)

    def held_out(self) -> tuple[EpisodeDataset, list[int]]:
        """Return the dataset and the numbers of the held-out episodes; all episodes if none were held out.

        Raises:
            DataError, StorageError: the dataset cannot be read.
        """
        dataset = EpisodeDataset.open(self.data)
        return dataset, [int(number) for number in self.figures.get("held_out") or range(len(dataset))]

    @cached_property
    def rules(self) -> BoundRules | None:
        """The recipe's own rules, bound to the heads; None if the recipe has no rules."""
        own = self.recipe.rules
        return None if own is None else self.bind(RuleSet(layers=(own,)))

    def bind(self, rules: RuleSet) -> BoundRules:
        """Bind a rule set to the heads, with its calibrated margins from the run folder."""
        return BoundRules(rules, self.heads, self.path / "margins", trusted=self._trusted)

    def agent(self, method: str | None = None, *, seed: int = 0) -> Agent:
        """Build an agent for a method, by default the recipe's default method; the agent obeys the recipe's own rules.

        Raises:
            ConfigError: the recipe has no such method, or the recipe has rules and the method does not support rules.
        """
        config = self.recipe.method(method, guarded=self.rules is not None)
        return config.build(AgentParts(heads=self.heads, rules=self.rules), seed=seed)

    def evaluations(self) -> dict[str, dict[str, Any]]:
        """Return the results of each evaluation, by the name of its folder (see `report_path`)."""
        found = {path: read_json(path) for path in sorted(self.path.glob("evaluation/*/results.json"))}
        for path, results in found.items():
            check_shape(results, _Evaluated, path)
        return {path.parent.name: results for path, results in found.items()}

    def summary(self) -> dict[str, Any]:
        """Return the numbers for a comparison of runs.

        `success` is the default method's mean success rate over the splits of one evaluation, and `evaluation` is that
        evaluation's name. The chosen evaluation is the one with the unchanged protocol of the recipe or of its
        environment or, if there is none, the newest.
        """
        recipe = recipe_values(self.folder)  # not parsed, because a component may need a module that is not imported
        metrics = self.folder.metrics()
        trained: dict[str, Any] = {}
        for line in metrics:
            trained.update(line)
        figures = self.folder.diagnostics().get("figures", {})
        summary = {
            "run": str(self.path),
            "recipe": recipe["name"],
            "steps": trained.get("step", 0),
            "prediction": _short(trained.get("loss/prediction")),
            **{name: _short(value) for name, value in figures.items()},
            "alarms": [alarm["name"] for alarm in self.folder.diagnostics().get("alarms", [])],
        }
        rates: dict[str, list[float]] = {}
        for name, results in self.evaluations().items():
            for row in results["rows"]:
                if row["method"] == recipe["default_method"]:
                    summary[f"success/{name}/{row['split']}"] = _short(row["rate"])
                    rates.setdefault(name, []).append(row["rate"])
        if not rates:
            return summary
        name = self._compared_by(list(rates))
        return {**summary, "success": _short(sum(rates[name]) / len(rates[name])), "evaluation": name}

    def _compared_by(self, evaluations: list[str]) -> str:
        """Return the name of the evaluation that `success` comes from; see `summary`."""
        env_id = self.environment.get("id")
        usual: str | None = recipe_values(self.folder).get("protocol")
        if usual is None or usual not in PROTOCOLS or PROTOCOLS[usual].env_id != env_id:
            usual = default_protocol(env_id)
        if usual is not None and (name := usual.replace("/", "-")) in evaluations:
            return name
        return max(evaluations, key=lambda name: (self.path / "evaluation" / name / "results.json").stat().st_mtime_ns)


def recipe_values(folder: RunFolder) -> dict[str, Any]:
    """Return the recipe of a run folder as JSON values.

    Raises:
        StorageError: the recipe is incomplete, or the folder has none because `worldloom.training.fit` wrote it.
    """
    values = folder.config.get("recipe")
    if not isinstance(values, dict):
        raise StorageError(f"{folder.path} has no recipe; choose a folder that 'worldloom train' wrote")
    if missing := [key for key in ("name", "default_method") if key not in values]:
        raise StorageError(
            f"the recipe in {folder.path / 'config.json'} has no {' and no '.join(missing)}; restore it from a copy"
        )
    return values


def find_runs(root: Path) -> Iterator[Run]:
    """Yield the runs below a folder that have a recipe, ordered by path. A damaged run raises an error when it is used.

    Raises:
        StorageError: the folder does not exist.
    """
    if not root.is_dir():
        raise StorageError(f"{root} is not a folder; pass the folder that contains your runs")
    for config in sorted(root.rglob("config.json")):
        if (config.parent / "provenance.json").is_file() and _may_be_of_a_recipe(config):
            yield Run.open(config.parent)


def _may_be_of_a_recipe(config: Path) -> bool:
    try:
        values = read_json(config)
        return not isinstance(values, dict) or "recipe" in values
    except StorageError:
        return True


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys in which two configurations differ."""
    found: list[str] = []
    for key in sorted(set(ours) | set(theirs)):
        mine, other = ours.get(key), theirs.get(key)
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            found += differences(mine, other, f"{prefix}{key}.")
        elif mine != other:
            found.append(f"{prefix}{key}")
    return found


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
