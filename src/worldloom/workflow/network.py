"""A consortium over the network: coordinator and nodes run on their owners' machines, each with its own YAML file."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from worldloom.core.config import Config
from worldloom.core.errors import ConfigError, DataError, StorageError, TrainingError, WorldloomError
from worldloom.core.names import path_name
from worldloom.core.progress import SILENT, Progress
from worldloom.core.signing import SigningKey, make_key
from worldloom.data import DatasetSpec, EpisodeDataset
from worldloom.envs import VectorWorld
from worldloom.federation import (
    Base,
    Constitution,
    Coordinator,
    Handler,
    MemberStore,
    Node,
    PartitionConfig,
    Tls,
    check_has_a_pilot,
    check_model,
    initial_base,
    make_node_keys,
    make_tls,
    read_constitution,
    succeed,
)
from worldloom.recipes import Recipe
from worldloom.workflow.run import Run
from worldloom.workflow.simulation import measure, member_recipe, open_node

_log = logging.getLogger(__name__)
_FLUSH_SECONDS = 3.0  # time to send the last answer


class CoordinatorAddress(Config):
    """The address of a coordinator, `host:port`, and the certificate of its authority."""

    address: str = Field(pattern=r"^[^\s]+:[0-9]+$")
    authority: Path


class _PartyConfig(Config):
    """The settings that coordinators and nodes have in common; paths are relative to the YAML file's folder."""

    constitution: Path
    key: Path
    home: Path
    recipe: str = "two-room"
    overrides: tuple[str, ...] = ()
    stems: bool = True
    seed: int = 0
    own_steps: int = Field(default=100, ge=0)

    def at(self, folder: Path | str) -> Any:
        """Return the same settings with paths relative to `folder`, the folder of the YAML file."""
        found = {name: Path(folder) / path for name, path in self if isinstance(path, Path)}
        return self.model_copy(update=found)

    def rules(self) -> Constitution:
        """Read the constitution, and check that all members have signed it."""
        return read_constitution(self.constitution)

    def member_recipe(self, constitution: Constitution) -> Recipe:
        """Return the recipe with the number of steps up to the last base."""
        steps = constitution.align_steps + constitution.rounds * constitution.inner_steps
        return member_recipe(self.recipe, self.overrides, steps=steps, stems=self.stems, seed=self.seed)


class NodeConfig(_PartyConfig):
    """A node: the owner's name, keys, data and recipe, and the coordinators' addresses in order of succession.

    After the last round the owner fine-tunes for `own_steps`; `fine_tune` selects all tensors or, for little data, only
    the sovereign ones. If no coordinator can be reached for `alone_after_seconds`, the node trains alone, `alone_steps`
    at a time, until a coordinator sends a message.
    """

    owner: str
    connection: Path
    coordinators: tuple[CoordinatorAddress, ...] = Field(min_length=1)
    data: Path
    timeout_seconds: float = Field(default=600.0, gt=0)
    alone_after_seconds: float | None = Field(default=None, gt=0)
    alone_steps: int = Field(default=25, ge=1)
    fine_tune: Literal["all", "sovereign"] = "all"

    def at(self, folder: Path | str) -> "NodeConfig":
        """Return the same settings with paths relative to `folder`."""
        addresses = [one.model_copy(update={"authority": Path(folder) / one.authority}) for one in self.coordinators]
        moved: NodeConfig = super().at(folder).model_copy(update={"coordinators": tuple(addresses)})
        return moved


class CoordinatorConfig(_PartyConfig):
    """A coordinator: its key, its certificate, its address, and the first base.

    `initial` is a file with the first base, for example a pilot's. Without `initial`, the first base is untrained.
    An untrained base has the shapes of the dataset `like` or, if `like` is not set, of the recipe's environment.
    """

    tls: Path
    host: str = "127.0.0.1"
    port: int = Field(default=9443, ge=1, le=65535)
    like: Path | None = None
    initial: Path | None = None


def make_keys(folder: Path | str, name: str, hosts: tuple[str, ...] = ()) -> dict[str, str]:
    """Write a party's keys: a key that signs messages, and a key for connections or, with `hosts`, a TLS certificate.

    Returns the public keys that other parties need, in the form that the constitution uses.

    Raises:
        ConfigError: the name could point into another folder.
        StorageError: a file exists already; keys are never overwritten.
    """
    folder, name = Path(folder), path_name(name, "the name")
    public = {"key": make_key(folder / f"{name}.pem")}
    if hosts:
        make_tls(folder / f"{name}-tls", hosts)
        return public
    return {**public, "connection": make_node_keys(folder, name).read_text().strip()}


def coordinate(config: CoordinatorConfig, *, progress: Progress = SILENT) -> Path:
    """Run the remaining rounds with the members that connect; return the folder of the rounds.

    Raises:
        ConfigError, DataError, StorageError: the constitution, the keys or the folder are invalid.
        TrainingError: too few members contributed; the contributions are saved for the next start.
    """
    from worldloom.federation.transport.flower import serve

    constitution = config.rules()
    partition = PartitionConfig.parse(constitution.partition)
    recipe = config.member_recipe(constitution)
    connections = {name: member.connection for name, member in constitution.members.items() if member.connection}
    if not connections:
        raise ConfigError(
            f"{config.constitution} has no 'connection' for any member; add the text of each member's .ssh.pub file, "
            f"and ask all members to sign again"
        )
    tls = Tls(authority=config.tls / "ca.pem", certificate=config.tls / "server.pem", secret=config.tls / "server.key")
    rounds = config.home / "rounds"
    spec = _spec(config, recipe)
    initial = initial_base(recipe.model, spec, partition, seed=config.seed)
    if config.initial is not None:
        initial = Base.load(config.initial, like=initial.tensors)
    elif not (rounds / "bases").is_dir():  # a coordinator that resumes or takes over already has a base
        check_has_a_pilot(recipe.model, spec, partition)
    largest = _largest_message(initial, constitution)
    link = config.home / "link"
    with serve(link, tls, connections, host=config.host, port=config.port, largest=largest) as transport:
        key = SigningKey(config.key)
        with Coordinator(
            rounds, constitution, key=key, transport=transport, initial=initial, progress=progress
        ) as coordinator:
            coordinator.run()
    return rounds


@contextmanager
def opened(config: NodeConfig, *, progress: Progress = SILENT) -> Iterator[Node]:
    """Open an owner's node; see `open_node`.

    Raises:
        ConfigError, DataError, StorageError: the constitution, the data or the keys are invalid.
    """
    constitution = config.rules()
    if config.owner not in constitution.members:
        known = ", ".join(constitution.members)
        raise ConfigError(f"owner: {config.owner!r} is not a member in {config.constitution}; expected one of {known}")
    key = SigningKey(config.key)
    if key.public != constitution.members[config.owner].key:
        raise DataError(
            f"{config.key} is not the key of {config.owner} in {config.constitution}; set 'key' to the file of the "
            f"key that the constitution lists"
        )
    recipe, dataset = config.member_recipe(constitution), EpisodeDataset.open(config.data)
    with open_node(
        config.home, recipe, dataset, constitution, name=config.owner, key=key, seed=config.seed, progress=progress
    ) as node:
        yield node


def pilot(config: NodeConfig, out: Path | str, *, progress: Progress = SILENT) -> str:
    """Train alone for the constitution's `align_steps`, write a base for all members, and return its fingerprint.

    This is for owners with different conventions for actions or cameras. The other owners first train their stems
    against the pilot's base, so that the averaged models share the pilot's conventions.

    Raises:
        ConfigError, DataError, StorageError: see `opened`, `Node.pilot` and `Base.save_new`.
    """
    with opened(config, progress=progress) as node:
        base = node.pilot(node.own.untrained(config.seed))
        base.save_new(out)
        return base.fingerprint


def take_part(config: NodeConfig, *, stop: threading.Event | None = None, progress: Progress = SILENT) -> Run:
    """Answer the coordinator until the last base has arrived, then fine-tune that base; return the run.

    Raises:
        ConfigError: no coordinator could be reached; each was tried for `timeout_seconds`.
        LedgerRefused: a coordinator showed an invalid ledger, or different ledgers to different members.
        TrainingError: the node was stopped before the last base arrived.
        DataError, StorageError: the owner has left the consortium; or see `opened`.
    """
    stop = stop or threading.Event()
    with opened(config, progress=progress) as node:
        last = node.constitution.rounds
        if node.has_left:
            raise DataError(f"{config.owner} has left the consortium; run 'worldloom weave return' to rejoin")
        if node.store.number != last:
            _answer(node, config, last, stop)
        run = Run(node.own.run)
        if node.has_left:  # it left during the rounds, and the coordinator was told
            return run
        if node.store.number != last:
            raise TrainingError(
                f"the last base has not been received; start {config.owner} again when the coordinator is reachable"
            )
        _fine_tune(node, config, progress)
    return run


def _answer(node: Node, config: NodeConfig, last: int, stop: threading.Event) -> None:
    """Answer until the last base has arrived, the owner has left, or no coordinator can be reached."""
    from worldloom.federation.transport.flower import join

    done = threading.Event()  # ends the connection to the current coordinator; `stop` ends the node
    heard = time.monotonic()
    after = config.alone_after_seconds

    def answer(data: bytes) -> bytes:
        nonlocal heard
        heard = time.monotonic()
        try:
            reply = node.handle(data)
        finally:
            heard = time.monotonic()
        over = node.store.number == last or node.has_left
        if over or node.fault is not None:  # the next coordinator may have the correct ledger
            threading.Timer(_FLUSH_SECONDS, (stop if over else done).set).start()
        return reply

    def cut_off() -> bool:
        return after is not None and time.monotonic() - heard > after and not stop.is_set()

    def train_alone() -> None:
        while not ended.wait(1.0):
            if stop.is_set():
                done.set()
            if node.has_left or not cut_off():
                continue
            try:
                if node.train_alone(config.alone_steps, still=cut_off):
                    _log.warning(
                        "%s cannot reach a coordinator; it trained %d steps on its own",
                        config.owner,
                        config.alone_steps,
                    )
            except WorldloomError as error:
                _log.warning("%s cannot train on its own yet: %s", config.owner, error)
                ended.wait(after)

    ended = threading.Event()
    watch = threading.Thread(target=train_alone, name="worldloom-alone", daemon=True)
    watch.start()
    try:
        _join_any(join, config, answer, stop, done, node=node)
    finally:
        ended.set()
        watch.join()


def leave(config: NodeConfig, into: Path | str, *, why: str = "", progress: Progress = SILENT) -> Run:
    """Leave the consortium, and export base, ledger, rules and the owner's run into one folder.

    Leaving needs no permission. Past contributions stay with the consortium. `come_back` undoes the exit.

    Raises:
        StorageError: the folder exists already.
        DataError: see `opened` and `Node.leave`.
    """
    into = Path(into)
    if into.exists():
        raise StorageError(f"{into} already exists; choose another folder for the export")
    with opened(config, progress=progress) as node:
        node.leave(why)
        if node.store.number is not None:  # otherwise there is no base to fine-tune
            _fine_tune(node, config, progress)
        node.export(into, config.constitution)
    return Run(node.own.run)


def come_back(config: NodeConfig) -> None:
    """Rejoin the consortium from the next round on.

    Raises:
        DataError: the owner has not left.
    """
    with opened(config) as node:
        node.come_back()


def take_over(config: NodeConfig, coordinator: CoordinatorConfig) -> int:
    """Make a member the coordinator, from its node's copies of base and ledger; return the next round.

    Raises:
        DataError, StorageError: see `worldloom.federation.succeed`.
    """
    constitution = coordinator.rules()
    key = SigningKey(config.key)
    store = MemberStore(config.home / "consortium", constitution, key)
    return succeed(store, coordinator.home / "rounds", constitution, SigningKey(coordinator.key))


def _fine_tune(node: Node, config: NodeConfig, progress: Progress) -> None:
    """Fine-tune the newest base, and measure the latent geometry that planning needs."""
    node.fine_tune(config.own_steps, frozen=config.fine_tune == "sovereign")
    measure(Run(node.own.run), node.own.frames, progress)


def _join_any(
    join: Any,
    config: NodeConfig,
    answer: Handler,
    stop: threading.Event,
    done: threading.Event,
    *,
    node: Node | None = None,
) -> None:
    """Join the first coordinator that can be reached; if its connection or ledger fails, join the next one.

    If no coordinator can be reached, a node with `alone_after_seconds` tries again.

    Raises:
        ConfigError: no coordinator can be reached.
        LedgerRefused: the last coordinator that could be reached showed an invalid or different ledger.
    """
    while not stop.is_set():
        causes, fault = list[str](), None
        for place in config.coordinators:
            done.clear()
            if node is not None:
                node.fault = None
            try:
                join(
                    answer,
                    home=config.home / "link",
                    server=place.address,
                    authority=place.authority,
                    secret=config.connection,
                    timeout_seconds=config.timeout_seconds,
                    stop=done,
                )
            except ConfigError as error:
                _log.warning("%s: %s", place.address, error)
                causes.append(str(error))
            if node is not None and node.fault is not None:
                fault = type(node.fault)(f"{place.address}: {node.fault}. {node.fault.place}", node.fault.evidence)
                causes.append(str(fault))
            if stop.is_set():
                return
        if config.alone_after_seconds is None and fault is not None:
            raise fault
        if config.alone_after_seconds is None:
            raise ConfigError(f"no coordinator could be joined: {'; '.join(causes)}")


def _largest_message(base: Base, constitution: Constitution) -> int:
    """Return the maximum size of a message of an honest node, in bytes.

    No codec needs more than 8 bytes per value, and neither does a masked delta.

    Raises:
        ConfigError: rounds cannot run with this base; see `check_model`.
    """
    check_model(constitution, base.tensors)
    values = sum(tensor.numel() for tensor in base.tensors.values())
    return min(constitution.largest_bytes, 8 * values + 2**11 * len(base.tensors) + 2**20)


def _spec(config: CoordinatorConfig, recipe: Recipe) -> DatasetSpec:
    if config.like is not None:
        return EpisodeDataset.open(config.like).spec
    if recipe.collection is None:
        raise ConfigError(
            f"recipe {recipe.name!r} has no environment, so the tensor shapes are unknown; set 'like' to a dataset "
            f"with the same shapes as the members' data"
        )
    with VectorWorld(recipe.collection.env_id, 1, recipe.collection.env_kwargs) as world:
        return DatasetSpec(observation=world.observation, action=world.action)
