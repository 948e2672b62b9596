"""A consortium on one machine: owners with worlds of their own, who weave one model and then act by it at home."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from worldloom.core.chain import Tail
from worldloom.core.config import Config
from worldloom.core.files import read_json, write_json, write_text
from worldloom.core.progress import SILENT, Progress
from worldloom.core.seeds import derive_seed
from worldloom.core.signing import SigningKey, make_key, sign_file
from worldloom.data import EpisodeDataset, Frames, load_frames
from worldloom.federation import (
    Constitution,
    Coordinator,
    DataCard,
    Handler,
    InProcess,
    LocalTraining,
    Node,
    PartitionConfig,
    card_of,
    card_path,
    check_has_a_pilot,
    guarded_frames,
    initial_base,
    model_card,
    ratify,
    read_constitution,
)
from worldloom.heads import encode_episodes, measure_geometry
from worldloom.models import JEPAConfig
from worldloom.models.encoders import PatchConv, StemmedPatchConv
from worldloom.recipes import Recipe, load_recipe
from worldloom.training import RunFolder, describe_provenance
from worldloom.workflow.jobs import collect
from worldloom.workflow.run import Run

_log = logging.getLogger(__name__)


class OwnerConfig(Config):
    """One owner: the factors and other arguments of its world, how many episodes it logged, and of what class.

    After the last round its model settles at home, for `own_steps` or as many as the consortium says: all of it, or,
    where data are few, what is sovereign.
    """

    factors: dict[str, Any] = Field(default_factory=dict)
    world: dict[str, Any] = Field(default_factory=dict)
    episodes: int = Field(default=500, ge=1)
    data_class: Literal["open", "unique-open", "controlled", "sovereign", "private"] = "open"
    settle: Literal["all", "sovereign"] = "all"
    own_steps: int | None = Field(default=None, ge=1)


class ConsortiumConfig(Config):
    """Owners of worlds of one recipe, and the rules by which they weave; `rules` are fields of `Constitution`.

    With `stems` each owner's camera and actions pass through a small map of its own before they meet what is shared.
    The first base is what the `pilot` learned alone in `align_steps`, in which the others let their stems meet it: else
    each would pull the shared part toward its own conventions. After the last round each owner trains on for
    `own_steps`, its learning rate falling to 0: what was averaged settles at home.
    """

    consortium: str = Field(min_length=1)
    recipe: str = "two-room"
    overrides: tuple[str, ...] = ()
    owners: dict[str, OwnerConfig] = Field(min_length=1)
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
            raise ValueError(f"rules: {', '.join(taken)} follow from the owners and rounds; leave them out")
        if self.pilot is not None and (self.pilot not in self.owners or not self.align_steps):
            raise ValueError(f"pilot: expected one of {', '.join(self.owners)}, and align_steps; got {self.pilot!r}")
        return self

    def own_steps_of(self, name: str) -> int:
        """Return for how many steps an owner trains on at home after the last base."""
        return self.owners[name].own_steps or self.own_steps

    @property
    def shared_steps(self) -> int:
        """How many steps each owner trains before the last base."""
        return self.align_steps + self.rounds * self.inner_steps

    def recipe_of(self, name: str, seed: int, *, steps: int | None = None) -> Recipe:
        """Return what an owner collects and trains, by default until the last base."""
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
        return woven_recipe(self.recipe, overrides, steps=steps or self.shared_steps, stems=self.stems, seed=seed)


def woven_recipe(name: str, overrides: Sequence[str], *, steps: int, stems: bool, seed: int) -> Recipe:
    """Return a recipe as an owner trains it for so many steps in all, with stems before what is shared."""
    recipe = load_recipe(name).override([
        f"training.steps={steps}",
        f"training.seed={seed}",
        "training.checkpoint_every=50",
        "training.validate_every=1000000",
        *overrides,
    ])  # fmt: skip
    model = recipe.model
    if stems and isinstance(model.encoder, PatchConv):
        options = model.encoder.model_dump(exclude={"name"})
        encoder = StemmedPatchConv.parse(options)
        model = JEPAConfig.parse({**model.model_dump(exclude={"encoder", "action_stem"}), "action_stem": 2})
        model = model.model_copy(update={"encoder": encoder})
    return recipe.model_copy(update={"model": model})


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What a simulation leaves: the run of each owner, and where rounds, ledger, model card and report lie."""

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
    """Collect each owner's logs, let all sign the constitution, weave, and let each owner settle what came home.

    Each part that is there already is taken up, so that a simulation that was killed ends as an unbroken one.
    `handlers` put something in front of an owner's node, which may sign with the owner's key: to count, or to attack.

    Raises:
        ConfigError: the rules contradict themselves.
        DataError, StorageError, TrainingError: see `Coordinator`.
    """
    from worldloom.reports import write_weaving_report  # takes half a second to load

    root = Path(path)
    keys = {name: _key(root / "keys" / f"{name}.pem") for name in ("coordinator", *config.owners)}
    constitution = _constitution(config, root / "constitution.yaml", keys)
    partition = PartitionConfig.parse(constitution.partition)
    with ExitStack() as stack:
        training, nodes = {}, {}
        for name in config.owners:
            recipe = config.recipe_of(name, seed)
            dataset = collect(recipe, root / name / "data", progress=progress)
            card = _card(config, name, dataset, keys)
            frames = stack.enter_context(closing(load_frames(dataset, recipe.data, progress=progress)))
            run = run_folder(recipe, dataset, root / name / "run", seed)
            local = partial(
                LocalTraining, training=recipe.training, model=recipe.model, partition=partition, progress=progress
            )
            training[name] = local(run, frames)  # its owner's, for whatever it likes
            nodes[name] = Node(
                root / name,
                local(run, guarded_frames(frames, card, "base", constitution)),
                name=name,
                key=keys[name],
                constitution=constitution,
                data_class=card.data_class,
            )
        handles: dict[str, Handler] = {name: node.handle for name, node in nodes.items()}
        for name, before in (handlers or {}).items():
            handles[name] = before(handles[name], keys[name])
        first = training[config.pilot or next(iter(training))]
        if config.pilot is None:
            check_has_a_pilot(first.model, first.frames.spec, partition)
        initial = initial_base(first.model, first.frames.spec, partition, seed=seed)
        ledger = root / "rounds" / "ledger.jsonl"
        begun = any(entry.body["kind"] == "base" for entry in Tail(ledger).new())
        if config.pilot is not None and not begun:
            initial = nodes[config.pilot].pilot(initial)
        coordinator = Coordinator(
            root / "rounds",
            constitution,
            key=keys["coordinator"],
            transport=InProcess(handles),
            initial=initial,
            progress=progress,
        )
        with closing(coordinator):
            last = coordinator.run()
        runs = {}
        for name, owner in training.items():
            steps, fixed = config.own_steps_of(name), config.owners[name].settle == "sovereign"
            owner.settle(f"own {steps}", last, steps, fixed=fixed)
            runs[name] = Run(owner.run)
            measure(runs[name], owner.frames, progress)
    write_text(root / "model_card.md", model_card(ledger, constitution))
    homes = {name: run.path for name, run in runs.items()}
    write_weaving_report(root / "report.html", root / "rounds", constitution, runs=homes)
    return Simulated(runs=runs, rounds=root / "rounds", card=root / "model_card.md", report=root / "report.html")


def alone(
    config: ConsortiumConfig, name: str, path: Path | str, data: Path | str, *, seed: int = 0,
    progress: Progress = SILENT,
) -> Run:  # fmt: skip
    """Train an owner's model on its own logs alone, from the same beginning and for as many steps."""
    steps = config.shared_steps + config.own_steps_of(name)
    recipe = config.recipe_of(name, seed, steps=steps)
    dataset = EpisodeDataset.open(data)
    partition = PartitionConfig.parse(config.rules.get("partition", {}))
    with closing(load_frames(dataset, recipe.data, progress=progress)) as frames:
        folder = run_folder(recipe, dataset, Path(path), seed)
        local = LocalTraining(
            folder, frames, training=recipe.training, model=recipe.model, partition=partition, progress=progress
        )
        base = initial_base(recipe.model, frames.spec, partition, seed=seed)
        local.stretch("alone", local.without_statistics(base), steps)
        run = Run(folder)
        measure(run, frames, progress)
    return run


def _key(path: Path) -> SigningKey:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        make_key(path)
    return SigningKey(path)


def _constitution(config: ConsortiumConfig, path: Path, keys: Mapping[str, SigningKey]) -> Constitution:
    """Write the constitution, let every member sign it, and read it back as each of them would."""
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
        # JSON is YAML, and needs no writer of its own.
        write_text(path, json.dumps(constitution.model_dump(mode="json"), indent=2) + "\n")
        for name in config.owners:
            ratify(path, name, keys[name])
    return read_constitution(path)


def _card(config: ConsortiumConfig, name: str, dataset: EpisodeDataset, keys: Mapping[str, SigningKey]) -> DataCard:
    path = card_path(dataset.path)
    if not path.is_file():
        card = DataCard(
            dataset=dataset.fingerprint(),
            title=f"logs of {name}",
            owner=name,
            data_class=config.owners[name].data_class,
        )
        write_text(path, json.dumps(card.model_dump(mode="json"), indent=2) + "\n")
        sign_file(path, path.parents[1] / "keys" / f"{name}.pem")
    return card_of(dataset.path, {keys[name].public: name})


def run_folder(recipe: Recipe, dataset: EpisodeDataset, path: Path, seed: int) -> RunFolder:
    """Return an owner's run folder, made if it is not there."""
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
    """Measure the latent geometry of a run, which tree search plans with, where it is not yet."""
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
