"""Simulates a consortium on one machine: owners of different worlds train a shared model, then fine-tune it."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from worldloom.core.chain import Tail
from worldloom.core.config import Config
from worldloom.core.files import read_json, write_json, write_text
from worldloom.core.names import PathName
from worldloom.core.progress import SILENT, Progress
from worldloom.core.seeds import derive_seed
from worldloom.core.signing import SigningKey, make_key
from worldloom.data import EpisodeDataset, Frames, load_frames
from worldloom.federation import (
    Constitution,
    Coordinator,
    DataClass,
    Handler,
    InProcess,
    LocalTraining,
    Node,
    PartitionConfig,
    card_of,
    card_path,
    check_has_a_pilot,
    classify,
    guarded_frames,
    model_card,
    ratify,
    read_constitution,
    read_ledger,
)
from worldloom.heads import encode_episodes, measure_geometry
from worldloom.models.encoders import PatchConv, StemmedPatchConv
from worldloom.recipes import Recipe, load_recipe
from worldloom.training import RunFolder, describe_provenance
from worldloom.workflow.jobs import collect
from worldloom.workflow.run import Run

_log = logging.getLogger(__name__)
_RESERVED = {"coordinator", "keys", "rounds"}  # the coordinator's key, and folders beside those of the owners


class OwnerConfig(Config):
    """One owner: the factors and other arguments of its world, the number of logged episodes, and their data class.

    After the last round the owner fine-tunes its model for `own_steps`, by default the consortium's number. `fine_tune`
    selects all tensors or, for little data, only the sovereign ones.
    """

    factors: dict[str, Any] = Field(default_factory=dict)
    world: dict[str, Any] = Field(default_factory=dict)
    episodes: int = Field(default=500, ge=1)
    data_class: DataClass = "open"
    fine_tune: Literal["all", "sovereign"] = "all"
    own_steps: int | None = Field(default=None, ge=1)


class ConsortiumConfig(Config):
    """Owners with worlds of one recipe, and their rules; `rules` are additional fields of the `Constitution`.

    With `stems` each owner's pixels and actions pass through the owner's own small input layers before the shared
    tensors. The `pilot` trains the first base alone for `align_steps`; the other owners then train their stems against
    this base for as many steps. Without a pilot each owner would pull the shared tensors toward its own conventions.
    After the last round each owner fine-tunes for `own_steps`, while the learning rate falls to 0.
    """

    consortium: str = Field(min_length=1)
    recipe: str = "two-room"
    overrides: tuple[str, ...] = ()
    owners: dict[PathName, OwnerConfig] = Field(min_length=1)
    pilot: str | None = None
    align_steps: int = Field(default=0, ge=0)
    rounds: int = Field(default=24, ge=1)
    inner_steps: int = Field(default=25, ge=1)
    own_steps: int = Field(default=200, ge=1)
    stems: bool = True
    rules: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> "ConsortiumConfig":
        if taken := sorted(
            {"consortium", "members", "coordinators", "align_steps", "rounds", "inner_steps"} & set(self.rules)
        ):
            raise ValueError(f"rules: {', '.join(taken)} are set by keys outside 'rules'; remove them from 'rules'")
        if reserved := sorted(_RESERVED & set(self.owners)):
            raise ValueError(f"owners: {reserved[0]!r} is the name of a part of the simulation; choose another name")
        if self.pilot is not None and (self.pilot not in self.owners or not self.align_steps):
            raise ValueError(
                f"pilot: expected an owner ({', '.join(self.owners)}) and a value of align_steps above 0; got pilot "
                f"{self.pilot!r} and align_steps {self.align_steps}"
            )
        return self

    def own_steps_of(self, name: str) -> int:
        """Return the number of steps for which an owner fine-tunes the last base."""
        return self.owners[name].own_steps or self.own_steps

    @property
    def shared_steps(self) -> int:
        """The number of steps that each owner trains up to the last base."""
        return self.align_steps + self.rounds * self.inner_steps

    def recipe_of(self, name: str, seed: int, *, steps: int | None = None) -> Recipe:
        """Return an owner's recipe; it trains for `steps`, by default the number of steps up to the last base."""
        owner, collection = self.owners[name], load_recipe(self.recipe).collection
        world = {**(collection.env_kwargs if collection else {}), **owner.world}
        if owner.factors:
            world["factors"] = owner.factors
        overrides = [
            f"collection.episodes={owner.episodes}",
            f"collection.seed={derive_seed(seed, 'owner', name) % 2**31}",
            f"collection.env_kwargs={json.dumps(world)}",
            *self.overrides,
        ]
        return member_recipe(self.recipe, overrides, steps=steps or self.shared_steps, stems=self.stems, seed=seed)


def member_recipe(name: str, overrides: Sequence[str], *, steps: int, stems: bool, seed: int) -> Recipe:
    """Return a recipe with a member's number of steps and, if `stems`, with stems before the shared tensors."""
    recipe = load_recipe(name).override([
        f"training.steps={steps}",
        f"training.seed={seed}",
        "training.checkpoint_every=50",
        "training.validate_every=1000000",
        *overrides,
    ])  # fmt: skip
    model = recipe.model
    if stems and isinstance(model.encoder, PatchConv):
        encoder = StemmedPatchConv.parse(model.encoder.model_dump(exclude={"name"}))
        model = model.model_copy(update={"encoder": encoder, "action_stem": 2})
    return recipe.model_copy(update={"model": model})


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """The result of a simulation: each owner's run, and the paths of the rounds, the model card and the report."""

    runs: Mapping[str, Run]
    rounds: Path
    card: Path
    report: Path


def simulate(
    config: ConsortiumConfig,
    path: Path | str,
    *,
    seed: int = 0,
    handlers: Mapping[str, Callable[[Handler, SigningKey], Handler]] | None = None,
    progress: Progress = SILENT,
) -> Simulated:
    """Collect each owner's logs, sign the constitution for all members, run the rounds, and fine-tune for each owner.

    Finished parts are reused, so that a killed simulation, when repeated, has the same result as an uninterrupted one.
    `handlers` maps owners to functions. Each receives the handler of the owner's node and the owner's key, and returns
    the handler that is used instead, for example to simulate an attack.

    Raises:
        ConfigError: the rules contradict each other.
        DataError, StorageError, TrainingError: see `Coordinator`.
    """
    from worldloom.reports import write_consortium_report  # takes half a second to load

    root = Path(path)
    keys = {name: _key(root / "keys" / f"{name}.pem") for name in ("coordinator", *config.owners)}
    constitution = _constitution(config, root / "constitution.yaml", keys)
    ledger = root / "rounds" / "ledger.jsonl"
    with ExitStack() as stack:
        nodes = {}
        for name, owner in config.owners.items():
            recipe = config.recipe_of(name, seed)
            dataset = collect(recipe, root / name / "data", progress=progress)
            if not card_path(dataset.path).is_file():
                secret, title = root / "keys" / f"{name}.pem", f"logs of {name}"
                classify(dataset.path, owner=name, data_class=owner.data_class, key=secret, title=title)
            opened = open_node(
                root / name, recipe, dataset, constitution, name=name, key=keys[name], seed=seed, progress=progress
            )
            nodes[name] = stack.enter_context(opened)
        handles: dict[str, Handler] = {name: node.handle for name, node in nodes.items()}
        for name, before in (handlers or {}).items():
            handles[name] = before(handles[name], keys[name])
        first = nodes[config.pilot or next(iter(nodes))].own
        if config.pilot is None:
            check_has_a_pilot(first.model, first.frames.spec, first.partition)
        initial = first.untrained(seed)
        begun = any(entry.body["kind"] == "base" for entry in Tail(ledger).new())
        if config.pilot is not None and not begun:
            initial = nodes[config.pilot].pilot(initial)
        with Coordinator(
            root / "rounds",
            constitution,
            key=keys["coordinator"],
            transport=InProcess(handles),
            initial=initial,
            progress=progress,
        ) as coordinator:
            last = coordinator.run()
        runs = {}
        for name, node in nodes.items():
            steps, frozen = config.own_steps_of(name), config.owners[name].fine_tune == "sovereign"
            node.own.fine_tune(f"own {steps}", last, steps, frozen=frozen)
            runs[name] = Run(node.own.run)
            measure(runs[name], node.own.frames, progress)
    write_text(root / "model_card.md", model_card(read_ledger(ledger, constitution)))
    homes = {name: run.path for name, run in runs.items()}
    write_consortium_report(root / "report.html", root / "rounds", constitution, runs=homes)
    return Simulated(runs=runs, rounds=root / "rounds", card=root / "model_card.md", report=root / "report.html")


def _key(path: Path) -> SigningKey:
    if not path.is_file():
        make_key(path)
    return SigningKey(path)


def _constitution(config: ConsortiumConfig, path: Path, keys: Mapping[str, SigningKey]) -> Constitution:
    """Write the constitution, sign it for every member, and read it back with all checks."""
    count = len(config.owners)
    rules = {"quorum": max(1, count - 1), "cap": min(1.0, 1.5 / max(1, count - 1)), **config.rules}
    constitution = Constitution.parse({
        "consortium": config.consortium,
        "members": {name: {"key": keys[name].public} for name in config.owners},
        "coordinators": [{"name": "coordinator", "key": keys["coordinator"].public}],
        "align_steps": config.align_steps,
        "rounds": config.rounds,
        "inner_steps": config.inner_steps,
        **rules,
    })  # fmt: skip
    if not path.is_file():
        # JSON is valid YAML.
        write_text(path, json.dumps(constitution.model_dump(mode="json"), indent=2) + "\n")
        for name in config.owners:
            ratify(path, name, keys[name])
    return read_constitution(path)


@contextmanager
def open_node(
    home: Path,
    recipe: Recipe,
    dataset: EpisodeDataset,
    constitution: Constitution,
    *,
    name: str,
    key: SigningKey,
    seed: int,
    progress: Progress,
) -> Iterator[Node]:
    """Open a member's node with its run folder in `home`; data trains the shared base only if its card permits this."""
    run, partition = run_folder(recipe, dataset, home / "run", seed), PartitionConfig.parse(constitution.partition)
    with closing(load_frames(dataset, recipe.data, progress=progress)) as frames:
        card = card_of(dataset.path, {key.public: name}, fingerprint=frames.fingerprint)
        own, shaping = (
            LocalTraining(
                run, part, training=recipe.training, model=recipe.model, partition=partition, progress=progress
            )
            for part in (frames, guarded_frames(frames, card, "base", constitution))
        )
        yield Node(home, shaping, own=own, name=name, key=key, constitution=constitution, data_class=card.data_class)


def run_folder(recipe: Recipe, dataset: EpisodeDataset, path: Path, seed: int) -> RunFolder:
    """Open an owner's run folder; create it if it does not exist."""
    if (path / "config.json").is_file():
        return RunFolder.open(path)
    values = {
        "recipe": recipe.model_dump(mode="json"),
        "environment": dataset.spec.environment,
        "data": str(Path(str(dataset.path)).resolve()),
    }
    about = describe_provenance(data_fingerprint=dataset.fingerprint(), seeds={"training": seed})
    return RunFolder.create(path, values, about)


def measure(run: Run, frames: Frames, progress: Progress) -> None:
    """Measure a run's latent geometry, which tree search needs, unless it is already measured for this model."""
    known = {"model": run.model.spec.fingerprint}
    path = run.path / "measured.json"
    if path.is_file() and read_json(path) == known:
        return
    episodes, _ = frames.split(run.recipe.training.validation_share, run.recipe.training.seed)
    latents = encode_episodes(run.model, frames, episodes=episodes, progress=progress)
    geometry = measure_geometry(
        run.model, latents, run.recipe.inverse, seed=run.recipe.training.seed, progress=progress
    )
    geometry.save(run.heads.stem("geometry"), run.model)
    write_json(path, known)
