"""A consortium over the network: its coordinator and its nodes, each on its owner's machine, from one YAML each."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from worldloom.core.config import Config
from worldloom.core.errors import ConfigError, DataError, StorageError, TrainingError, WorldloomError
from worldloom.core.files import write_json
from worldloom.core.progress import SILENT, Progress
from worldloom.core.signing import SigningKey, make_key, sign_file
from worldloom.data import DatasetSpec, EpisodeDataset, load_frames
from worldloom.envs import VectorWorld
from worldloom.federation import (
    Constitution,
    Coordinator,
    DataCard,
    DataClass,
    Handler,
    Keeping,
    LocalTraining,
    Node,
    PartitionConfig,
    Tls,
    card_of,
    card_path,
    check_has_a_pilot,
    guarded_frames,
    initial_base,
    make_node_keys,
    make_tls,
    read_base,
    read_constitution,
    save_base,
    succeed,
)
from worldloom.recipes import Recipe
from worldloom.workflow.run import Run
from worldloom.workflow.simulation import measure, run_folder, woven_recipe

_log = logging.getLogger(__name__)
_TO_LEAVE = 3.0  # seconds in which the last answer leaves


class Seat(Config):
    """Where a coordinator is reached, `host:port`, and the certificate of its authority."""

    address: str = Field(pattern=r"^[^\s]+:[0-9]+$")
    authority: Path


class _Party(Config):
    """What coordinator and nodes state alike; paths are those of the YAML's folder."""

    constitution: Path
    key: Path
    home: Path
    recipe: str = "two-room"
    overrides: tuple[str, ...] = ()
    stems: bool = True
    seed: int = 0
    own_steps: int = Field(default=100, ge=0)

    def at(self, folder: Path | str) -> "Any":
        """Return the same with every path as it is from here, where `folder` holds the YAML."""
        found = {name: Path(folder) / path for name, path in self if isinstance(path, Path)}
        return self.model_copy(update=found)

    def rules(self) -> Constitution:
        """Return the constitution, which all members signed."""
        return read_constitution(self.constitution)

    def woven(self, constitution: Constitution) -> Recipe:
        """Return the recipe, with the steps of all rounds."""
        steps = constitution.align_steps + constitution.rounds * constitution.inner_steps
        return woven_recipe(self.recipe, self.overrides, steps=steps, stems=self.stems, seed=self.seed)


class NodeConfig(_Party):
    """A node: the owner's name, keys, data and recipe, and where it reaches the coordinators, in order of succession.

    After the last round the model settles at home in `own_steps`: all of it, or what is sovereign where data are few.
    Cut off for longer than `alone_after_seconds`, it trains on alone, `alone_steps` at a time, until it is asked again.
    """

    owner: str
    connection: Path
    coordinators: tuple[Seat, ...] = Field(min_length=1)
    data: Path
    patience_seconds: float = Field(default=600.0, gt=0)
    alone_after_seconds: float | None = Field(default=None, gt=0)
    alone_steps: int = Field(default=25, ge=1)
    settle: Literal["all", "sovereign"] = "all"

    def at(self, folder: Path | str) -> "NodeConfig":
        """Return the same with every path as it is from here."""
        seats = [seat.model_copy(update={"authority": Path(folder) / seat.authority}) for seat in self.coordinators]
        moved: NodeConfig = super().at(folder).model_copy(update={"coordinators": tuple(seats)})
        return moved


class CoordinatorConfig(_Party):
    """A coordinator: its key, its certificate, where it listens, and the first base.

    That is `initial`, a file of a pilot, or untrained, in the shapes of the recipe's world or of the frames of a
    dataset, `like`, of which nothing else is read.
    """

    tls: Path
    host: str = "127.0.0.1"
    port: int = Field(default=9443, ge=1, le=65535)
    like: Path | None = None
    initial: Path | None = None


def classify(
    dataset: Path | str, *, owner: str, data_class: DataClass, key: Path | str, title: str = "", licence: str = ""
) -> Path:
    """Write and sign the card of a dataset, in place of one that is there; return where it lies.

    Raises:
        StorageError: there is no such dataset, or the card cannot be written.
        DataError: the key is no Ed25519 key.
    """
    opened = EpisodeDataset.open(dataset)
    path = card_path(dataset)
    card = DataCard(
        dataset=opened.fingerprint(),
        title=title or Path(dataset).name,
        owner=owner,
        data_class=data_class,
        licence=licence,
    )
    write_json(path, card.model_dump(mode="json"))  # JSON is YAML
    sign_file(path, key)
    return path


def make_keys(folder: Path | str, name: str, hosts: tuple[str, ...] = ()) -> dict[str, str]:
    """Write what a party needs: the key that signs its word, that of its connections, and with hosts a certificate.

    Returns what others need of it: the public keys, as they stand in the constitution.

    Raises:
        StorageError: a file is there already; a key is never written over.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    public = {"key": make_key(folder / f"{name}.pem")}
    if hosts:
        make_tls(folder / f"{name}-tls", hosts)
        return public
    keys = make_node_keys(folder, name)
    return {**public, "connection": keys.public.read_text().strip()}


def coordinate(config: CoordinatorConfig, *, progress: Progress = SILENT) -> Path:
    """Run the rounds that are left, with whoever of the members connects; return the folder of the rounds.

    Raises:
        ConfigError, DataError, StorageError: the constitution, the keys or the folder are not as they should be.
        TrainingError: too few members contributed; what came is kept, and started again it goes on.
    """
    from worldloom.federation.transport.flower import serve

    constitution = config.rules()
    partition = PartitionConfig.parse(constitution.partition)
    recipe = config.woven(constitution)
    connections = {name: member.connection for name, member in constitution.members.items() if member.connection}
    if not connections:
        raise ConfigError(f"{config.constitution} names no member's connection; give each its .ssh.pub, and sign again")
    tls = Tls(authority=config.tls / "ca.pem", certificate=config.tls / "server.pem", secret=config.tls / "server.key")
    rounds = config.home / "rounds"
    spec = _spec(config, recipe)
    initial = initial_base(recipe.model, spec, partition, seed=config.seed)
    if config.initial is not None:
        initial = read_base(config.initial, initial)
    elif not (rounds / "bases").is_dir():  # who goes on, or takes over, has one
        check_has_a_pilot(recipe.model, spec, partition)
    with serve(config.home / "link", tls, connections, host=config.host, port=config.port) as transport:
        coordinator = Coordinator(
            rounds,
            constitution,
            key=SigningKey(config.key),
            transport=transport,
            initial=initial,
            progress=progress,
        )
        with closing(coordinator):
            coordinator.run()
    return rounds


@contextmanager
def opened(config: NodeConfig, *, progress: Progress = SILENT) -> Iterator[tuple[Node, Run]]:
    """Open an owner's node: its data, read only for what their card allows, its run and its keys.

    Raises:
        ConfigError, DataError, StorageError: the constitution, the data or the keys are not as they should be.
    """
    constitution = config.rules()
    if config.owner not in constitution.members:
        known = ", ".join(constitution.members)
        raise ConfigError(f"{config.owner!r} is no member of {config.constitution}; expected one of {known}")
    key = SigningKey(config.key)
    if key.public != constitution.members[config.owner].key:
        raise DataError(f"{config.constitution} knows {config.owner} by another key; take the one that it names")
    recipe = config.woven(constitution)
    dataset = EpisodeDataset.open(config.data)
    card = card_of(dataset.path, {key.public: config.owner})
    partition = PartitionConfig.parse(constitution.partition)
    run = Run(run_folder(recipe, dataset, config.home / "run", config.seed))
    with ExitStack() as stack:
        frames = stack.enter_context(closing(load_frames(dataset, recipe.data, progress=progress)))
        own, shaping = (
            LocalTraining(
                run.folder,
                part,
                training=recipe.training,
                model=recipe.model,
                partition=partition,
                progress=progress,
            )
            for part in (frames, guarded_frames(frames, card, "base", constitution))
        )
        node = Node(
            config.home,
            shaping,
            own=own,
            name=config.owner,
            key=key,
            constitution=constitution,
            data_class=card.data_class,
        )
        yield node, run


def pilot(config: NodeConfig, out: Path | str, *, progress: Progress = SILENT) -> str:
    """Train alone for the constitution's `align_steps`, and write the base that all could begin with.

    For owners whose conventions clash: what averages is then what one of them learned, and the others' stems learn to
    meet it first. Returns the base's fingerprint.

    Raises:
        ConfigError, DataError, StorageError: see `opened`, `Node.pilot` and `save_base`.
    """
    with opened(config, progress=progress) as (node, _):
        recipe, partition = config.woven(node.constitution), PartitionConfig.parse(node.constitution.partition)
        first = initial_base(recipe.model, node.frames.spec, partition, seed=config.seed)
        return save_base(out, node.pilot(first))


def take_part(config: NodeConfig, *, stop: threading.Event | None = None, progress: Progress = SILENT) -> Run:
    """Answer the coordinator until the last base has come, and let it settle at home; return the run.

    Raises:
        ConfigError: no coordinator could be reached, one after the other, for `patience_seconds` each.
        DataError, StorageError: see `opened`.
    """
    stop = stop or threading.Event()
    with opened(config, progress=progress) as (node, run):
        last = node.constitution.rounds
        if node.has_left:
            raise DataError(f"{config.owner} has left the consortium; worldloom weave return undoes it")
        if not node.keeping.has(last):
            _answer(node, config, last, stop)
        if node.has_left:  # meanwhile, and the coordinator was told
            return run
        if not node.keeping.has(last):
            raise TrainingError(f"the last base has not come; start {config.owner} again when the coordinator is back")
        _settle(node, run, config, progress)
    return run


def _answer(node: Node, config: NodeConfig, last: int, stop: threading.Event) -> None:
    """Answer until the last base has come, the owner has left, or no coordinator can be reached."""
    from worldloom.federation.transport.flower import join

    seat = threading.Event()  # set: what is answered now is over; with `stop`, all of it
    heard = time.monotonic()
    after = config.alone_after_seconds

    def answer(data: bytes) -> bytes:
        nonlocal heard
        heard = time.monotonic()
        try:
            reply = node.handle(data)
        finally:
            heard = time.monotonic()
        over = node.keeping.has(last) or node.has_left
        if over or node.estranged:  # then to the next, who may be the one that the others follow
            threading.Timer(_TO_LEAVE, (stop if over else seat).set).start()
        return reply

    def cut_off() -> bool:
        return after is not None and time.monotonic() - heard > after and not stop.is_set()

    def go_on_alone() -> None:
        while not ended.wait(1.0):
            if stop.is_set():
                seat.set()
            if node.has_left or not cut_off():
                continue
            try:
                if node.alone(config.alone_steps, still=cut_off):
                    _log.warning("%s is cut off and trained %d steps alone", config.owner, config.alone_steps)
            except WorldloomError as error:
                _log.warning("%s cannot go on alone yet: %s", config.owner, error)
                ended.wait(after)

    ended = threading.Event()
    watch = threading.Thread(target=go_on_alone, name="worldloom-alone", daemon=True)
    watch.start()
    try:
        _join_any(join, config, answer, stop, seat)
    finally:
        ended.set()
        watch.join()


def leave(config: NodeConfig, into: Path | str, *, why: str = "", progress: Progress = SILENT) -> Run:
    """Leave the consortium, with nobody's leave: base, ledger, rules and the run of the own model, in one folder.

    What is left behind is what was contributed. `come_back` undoes it.

    Raises:
        StorageError: the folder is there already.
        DataError: no base came yet.
    """
    into = Path(into)
    if into.exists():
        raise StorageError(f"{into} is there already; choose another folder to leave with")
    with opened(config, progress=progress) as (node, run):
        node.leave(why)
        if node.keeping.known:  # else there is nothing that could settle, and it leaves with what it has
            _settle(node, run, config, progress)
        node.take_along(into, config.constitution)
    return run


def come_back(config: NodeConfig) -> None:
    """Take part again; the next round that asks counts.

    Raises:
        DataError: the owner has not left.
    """
    with opened(config) as (node, _):
        node.come_back()


def take_over(config: NodeConfig, coordinator: CoordinatorConfig) -> int:
    """Make a member the coordinator, from what its node kept; return the round that comes next.

    Raises:
        DataError, StorageError: see `worldloom.federation.succeed`.
    """
    constitution = coordinator.rules()
    key = SigningKey(config.key)
    keeping = Keeping(config.home / "consortium", constitution, key)
    return succeed(keeping, coordinator.home / "rounds", constitution, SigningKey(coordinator.key))


def _settle(node: Node, run: Run, config: NodeConfig, progress: Progress) -> None:
    """Let what was averaged settle at home, and measure what planning needs."""
    node.settle(config.own_steps, fixed=config.settle == "sovereign")
    measure(run, node.frames, progress)


def _join_any(
    join: Any, config: NodeConfig, answer: Handler, stop: threading.Event, seat: threading.Event | None = None
) -> None:
    """Be a node of the first coordinator that can be reached, and of the next where it is lost.

    Who goes on alone meanwhile never gives up; another does once none could be reached.
    """
    seat = seat or threading.Event()
    while not stop.is_set():
        causes = []
        for place in config.coordinators:
            seat.clear()
            try:
                join(
                    answer,
                    home=config.home / "link",
                    server=place.address,
                    authority=place.authority,
                    secret=config.connection,
                    patience_seconds=config.patience_seconds,
                    stop=seat,
                )
            except ConfigError as error:
                _log.warning("%s: %s", place.address, error)
                causes.append(str(error))
            else:
                causes.append(f"{place.address} is no coordinator to this node any more")
            if stop.is_set():
                return
        if config.alone_after_seconds is None:
            raise ConfigError("; ".join(causes))


def _spec(config: CoordinatorConfig, recipe: Recipe) -> DatasetSpec:
    if config.like is not None:
        return EpisodeDataset.open(config.like).spec
    if recipe.collection is None:
        raise ConfigError(
            f"recipe {recipe.name!r} names no world to take shapes from; name a dataset of the members' kind as 'like'"
        )
    with VectorWorld(recipe.collection.env_id, 1, recipe.collection.env_kwargs) as world:
        return DatasetSpec(observation=world.observation, action=world.action)
