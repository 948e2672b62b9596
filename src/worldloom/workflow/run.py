"""A run as its user sees it: what was trained, and agents made of it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import worldloom
from worldloom.agents import AuditLog, CloningPolicy, Learned, MethodConfig, PlannedMethod, ReactivePolicy
from worldloom.core.chain import canonical
from worldloom.core.errors import ConfigError, DataError, StorageError
from worldloom.core.files import read_json
from worldloom.core.registry import nearest
from worldloom.core.seams import Agent
from worldloom.data import read_picture
from worldloom.evaluation import default_protocol
from worldloom.guardrails import BoundRail, Margins, RuleLayer, RuleSet, read_margins
from worldloom.heads import CoarseModel, LatentGeometry, Probe, Support, TemporalDistance
from worldloom.memory import EpisodicMemory
from worldloom.models import JEPA, load_model
from worldloom.recipes import Recipe
from worldloom.training import RunFolder

_LOADED = ("recipe", "model", "geometry", "distance", "hierarchy", "probes", "support", "reactive", "cloning")


class Run(Learned):
    """A run folder, opened for use; its parts are loaded when they are asked for.

    Raises:
        StorageError: there is no run at the path.
        CheckpointError: a part is missing, damaged or of another model.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        device: torch.device | str | None = None,
        memory: Path | str | None = None,
        layers: Sequence[RuleLayer] = (),
        audit: Path | str | None = None,
    ) -> None:
        self.folder, self._memory_path, self._layers = folder, memory, tuple(layers)
        self._audit_path, self._audit = audit, None if audit is None else ExitStack()
        self._margins: Margins | None = None
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(default if device is None else device)

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        device: torch.device | str | None = None,
        memory: Path | str | None = None,
        rules: Sequence[RuleLayer] = (),
        audit: Path | str | None = None,
    ) -> "Run":
        """Open a run folder; `device` defaults to a GPU where there is one.

        `memory` is the directory of the episodic memory that its agents keep, made where there is none. `rules` are
        layers beneath the recipe's own. `audit` is the directory in which the decisions of its agent are written down.
        """
        return cls(RunFolder.open(path), device=device, memory=memory, layers=rules, audit=audit)

    @property
    def path(self) -> Path:
        """The folder."""
        return self.folder.path

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe, with its overrides."""
        return Recipe.parse(recipe_values(self.folder))

    @property
    def environment(self) -> dict[str, Any]:
        """Where the data came from: the `environment` of the dataset's spec, empty where nothing is known."""
        environment: dict[str, Any] = self.folder.config["environment"]
        return environment

    @property
    def data(self) -> str:
        """The dataset's path when the run was made."""
        return str(self.folder.config["data"])

    @cached_property
    def model(self) -> JEPA:
        """The world model."""
        return load_model(self.folder.model_directory, self.device)

    @cached_property
    def geometry(self) -> LatentGeometry:
        """Step length, inverse dynamics and reversibility."""
        return LatentGeometry.load(self.head("geometry"), self.model)

    @cached_property
    def distance(self) -> TemporalDistance:
        """The learned temporal distance."""
        return TemporalDistance.load(self.head("distance"), self.model)

    @cached_property
    def hierarchy(self) -> list[tuple[CoarseModel, LatentGeometry]]:
        """The coarser models with their geometry, each of the one before it."""
        levels: list[tuple[CoarseModel, LatentGeometry]] = []
        for level in range(1, len(self.recipe.hierarchy) + 1):
            coarse = CoarseModel.load(self.head(f"coarse-{level}"), levels[-1][0] if levels else self.model)
            levels.append((coarse, LatentGeometry.load(self.head(f"coarse-{level}-geometry"), coarse)))
        return levels

    @cached_property
    def probes(self) -> dict[str, Probe]:
        """The probes of named quantities."""
        return {name: Probe.load(self.head(f"probe-{name}"), self.model) for name in self.recipe.probes}

    @cached_property
    def support(self) -> Support:
        """The latents of the data."""
        return Support.load(self.head("support"), self.model)

    def examples(self, names: Sequence[str]) -> Float[Tensor, "N D"]:
        """Return the latents of pictures, by their paths.

        Raises:
            DataError: a path is no picture, or of another size.
        """
        expected = self.model.spec.observation.pixels
        if expected is None or self.model.spec.observation.vector:
            raise DataError("the model does not see by pictures alone; it cannot be shown examples as pictures")
        with torch.inference_mode():
            every = [self.model.encode(read_picture(Path(name), expected).to(self.device)) for name in names]
        return torch.cat(every)

    def peer(self, name: str) -> JEPA:
        """Return the model of another run, by its path.

        Raises:
            StorageError: there is no run.
        """
        return load_model(RunFolder.open(name).model_directory, self.device)

    @cached_property
    def rules(self) -> RuleSet | None:
        """What its agents keep: the recipe's layer, and those that the run was opened with."""
        own = () if self.recipe.rules is None else (self.recipe.rules,)
        layers = (*own, *self._layers)
        return RuleSet(layers=layers) if layers else None

    def margins(self, method: MethodConfig) -> Margins | None:
        """Return the margins that were calibrated for its rule set and a method, if any were.

        Raises:
            StorageError: the file is damaged.
        """
        if self._margins is not None:
            return self._margins
        if self.rules is None or not (path := self.margins_path(method)).is_file():
            return None
        made = method.model_dump(mode="json")
        return read_margins(path, self.rules, model=self.model.spec.fingerprint, method=made)

    def margins_path(self, method: MethodConfig) -> Path:
        """Return where the margins for its rule set and a method are kept; another rule set or method has its own."""
        assert self.rules is not None
        made = method.calibrated_as if isinstance(method, PlannedMethod) else method.name
        text = canonical([self.rules.fingerprint, self.model.spec.fingerprint, made])
        return self.path / "margins" / f"{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.json"

    def auditor(self, method: MethodConfig, guardrails: Sequence[BoundRail]) -> AuditLog | None:
        """Return the audit log of an agent that is being built, with all that makes it what it is; None without one."""
        if self._audit is None or self._audit_path is None:
            return None
        margins = self.margins(method) if self.rules is not None else None
        about = {
            "worldloom": worldloom.__version__,
            "run": str(self.path),
            "model": self.model.spec.fingerprint,
            "method": method.model_dump(mode="json"),
            "layers": [] if self.rules is None else [layer.model_dump(mode="json") for layer in self.rules.layers],
            "margins": None if margins is None else margins.values.tolist(),
            "threads": torch.get_num_threads(),
        }
        return self._audit.enter_context(AuditLog(self._audit_path, self.model, guardrails, about=about))

    def under(self, rules: RuleSet | None, margins: Margins | None) -> "Run":
        """Return the same run, whose agents keep another rule set, with these margins."""
        run = Run(self.folder, device=self.device, memory=self._memory_path)
        run.__dict__.update({name: self.__dict__[name] for name in _LOADED if name in self.__dict__})
        run.__dict__["rules"] = rules
        run._margins = margins
        return run

    @cached_property
    def reactive(self) -> ReactivePolicy:
        """The reactive policy."""
        return ReactivePolicy.load(self.head("reactive"), self.model)

    @cached_property
    def cloning(self) -> CloningPolicy:
        """The policy cloned from the same data."""
        return CloningPolicy.load(self.head("cloning"), self.device)

    @cached_property
    def memory(self) -> EpisodicMemory | None:
        """The episodic memory, open to write; None where none was named."""
        if self._memory_path is None:
            return None
        return EpisodicMemory.open_or_create(self._memory_path, spec=self.model.spec)

    def close(self) -> None:
        """Let go of the memory and the audit log; what was written is kept in any case."""
        if self._audit is not None:
            self._audit.close()
        if self.__dict__.get("memory") is not None:
            self.__dict__.pop("memory").close()

    def head(self, name: str) -> Path:
        """Return where a part learned beside the world model is kept."""
        return self.path / "heads" / name

    def agent(self, method: str | None = None, *, seed: int = 0, compared: bool = False) -> Agent:
        """Build an agent; by default the recipe's. Under a rule set it obeys it, unless it is only `compared` with.

        Raises:
            ConfigError: the recipe has no such method, or the method obeys no rule set and there is one.
        """
        name = method or self.recipe.default_method
        config = self.method(name)
        if self.rules is not None and not config.guarded and not compared:
            able = [title for title, other in self.recipe.methods.items() if other.guarded]
            raise ConfigError(
                f"the method {name!r} does not obey guardrails, and the rule set has some; "
                f"{f'choose {able[0]!r}' if able else 'the recipe has no method that does: add one of plan'}"
            )
        if self._audit is not None and not isinstance(config, PlannedMethod):
            raise ConfigError(f"the method {name!r} writes no audit log; choose one that plans")
        return config.build(self, seed=seed)

    def method(self, name: str) -> MethodConfig:
        """Return a method of the recipe.

        Raises:
            ConfigError: the recipe has no such method.
        """
        if name not in self.recipe.methods:
            raise ConfigError(f"unknown method {name!r}; {nearest(name, self.recipe.methods)}")
        return self.recipe.methods[name]

    def heads(self) -> dict[str, Any]:
        """Return the figures of the parts learned beside the world model."""
        path = self.path / "heads.json"
        figures: dict[str, Any] = read_json(path) if path.is_file() else {}
        return figures

    def evaluations(self) -> dict[str, dict[str, Any]]:
        """Return the results of each evaluation, by the name of its folder (see `report_path`)."""
        return {path.parent.name: read_json(path) for path in sorted(self.path.glob("evaluation/*/results.json"))}

    def summary(self) -> dict[str, Any]:
        """Return the figures that runs are compared by.

        `success` is the default method's, over the splits of one `evaluation`: the recipe's protocol (or that of its
        world) where it was run as it is, else the one that was written last.
        """
        recipe = recipe_values(self.folder)  # as they stand: a part of it may need a module that is not imported
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
        """Return the evaluation whose success stands for the run: its usual protocol's, else the last one."""
        usual = recipe_values(self.folder).get("protocol") or default_protocol(self.environment.get("id"))
        if usual is not None and (name := usual.replace("/", "-")) in evaluations:
            return name
        return max(evaluations, key=lambda name: (self.path / "evaluation" / name / "results.json").stat().st_mtime_ns)


def recipe_values(folder: RunFolder) -> dict[str, Any]:
    """Return the recipe that a folder was made with, as JSON values.

    Raises:
        StorageError: it was made by `worldloom.training.fit` alone, without a recipe.
    """
    values = folder.config.get("recipe")
    if not isinstance(values, dict):
        raise StorageError(f"{folder.path} was made without a recipe; choose a folder that worldloom train made")
    if missing := [key for key in ("name", "default_method") if key not in values]:
        raise StorageError(
            f"the recipe in {folder.path / 'config.json'} has no {' and no '.join(missing)}; restore it from a copy"
        )
    return values


def find_runs(root: Path) -> Iterator[Run]:
    """Yield the runs of recipes below a folder, in the order of their paths; a damaged one says so when it is used.

    Raises:
        StorageError: there is no such folder.
    """
    if not root.is_dir():
        raise StorageError(f"{root} is not a folder; name the one that holds your runs")
    for config in sorted(root.rglob("config.json")):
        if (config.parent / "provenance.json").is_file() and _may_be_of_a_recipe(config):
            yield Run.open(config.parent)


def _may_be_of_a_recipe(config: Path) -> bool:
    try:
        return "recipe" in read_json(config)
    except StorageError:
        return True


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the keys, with dots, under which two configurations differ."""
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
