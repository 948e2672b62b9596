"""Bytes against loss: owners with data from one world send deltas rarely, with few bits, or a gradient at each step.

    python benchmarks/weaving_bytes.py [--world rooms] [--seeds 0 1 2] [--threads 1] [--anew] [--quick]

Four owners log the same world, each with its own episode seeds: two rooms in pixels (`--world rooms`), or a robot
with sensors (`--world robot`), which uses the batch size of its recipe and many rounds. All methods
start from the base that one owner, the pilot, trained alone (DiLoCo, arXiv 2311.08105, also starts from a trained
model). They take the same steps on the same batches for each owner, with one learning-rate schedule over all steps. The
learning rate and the outer step were chosen on a different seed. The methods are:

- synchronous: one gradient per step, averaged over the owners. This equals one model trained on all logs, with the
  owners' batches joined (with statistics of the joined batch, as in data parallelism here). The bytes are computed: for
  each owner and step, a float32 gradient of the shared tensors up, and the mean down.
- H = ...: rounds of H steps with DiLoCo's outer optimiser, by `simulate`, with contributions in float32, int8, or the
  largest 5% of each tensor with error feedback.
- alone: each owner continues from the pilot's base alone, and sends nothing.

`up` counts the bytes of the contributions in the ledger. `all up` and `all down` count every byte between coordinator
and nodes, including verdicts and the ledger; the pilot's base counts once up, and once down for each owner. Two errors
are measured for predictions 8 blocks ahead in held-out episodes: the latent error, as a share of the latents' variance,
and the error of the position that a linear probe reads. Both are means over the owners' models. Intervals are Student's
over the seeds, for ratios paired by seed. The results go to benchmarks/results/weaving_bytes_rooms.json, or `_robot`.
Results of a seed are stored beside it and reused, unless `--anew` is set. `--quick` only tries the script, and stores
nothing."""

import argparse
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from by_seed import Kept, as_one, command_of, interval, parser_of, run
from worldloom import workflow
from worldloom.cli.console import print_table, progress
from worldloom.core.files import write_json
from worldloom.core.seeds import numpy_generator
from worldloom.core.types import Context, Windows
from worldloom.data import EpisodeDataset, WindowSampler, load_cache, load_frames
from worldloom.federation import Base, LocalTraining, PartitionConfig, Records, RoundStore, initial_base
from worldloom.models import JEPA
from worldloom.recipes import Recipe
from worldloom.training import LinearProbe
from worldloom.workflow import ConsortiumConfig, Run, simulate
from worldloom.workflow.simulation import OwnerConfig, run_folder

OWNERS = ("north", "east", "south", "west")
SYNCHRONOUS, ALONE = "synchronous", "alone"
HORIZON, WINDOWS = 8, 1024
INT8, SPARSE = {"name": "int8"}, {"name": "top-k", "share": 0.05}
WAYS: dict[str, dict[str, Any]] = {
    SYNCHRONOUS: {},
    ALONE: {},
    "H = 25": {"inner_steps": 25},
    "H = 50": {"inner_steps": 50},
    "H = 100": {"inner_steps": 100},
    "H = 100, int8": {"inner_steps": 100, "codec": INT8},
    "H = 100, top 5%": {"inner_steps": 100, "codec": SPARSE},
}
SETTINGS = ("episodes", "batch", "steps", "pilot")
PAIRS = (("H = 100, int8", "H = 100"), ("H = 100, top 5%", "H = 100"))


def bytes_of(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the bytes of tensors, without names and signatures."""
    return sum(tensor.nbytes for tensor in tensors.values())


@dataclass(frozen=True, kw_only=True)
class World:
    """The owners' logs, their training, and the rules; outer steps and rates were chosen on a different seed.

    `steps` and `batch` are per owner; the pilot's steps are included.
    """

    recipe: str
    unit: str
    episodes: int
    batch: int
    steps: int
    pilot: int
    outer: Mapping[str, Any]  # see docs/log.md for the others that were tried
    rate: float | None = None  # learning rate of the synchronous method, if a different one from the recipe's is better
    partition: Mapping[str, Any] = field(default_factory=dict)


WORLDS = {
    "rooms": World(
        recipe="two-room", unit="px", episodes=200, batch=32, steps=800, pilot=200, rate=4e-3,
        outer={"name": "diloco", "learning_rate": 1.0, "momentum": 0.5},
    ),
    "robot": World(
        recipe="point-hazards-state", unit="m", episodes=4000, batch=256, steps=4000, pilot=1000, rate=4e-3,
        outer={"name": "diloco", "learning_rate": 1.0, "momentum": 0.7},
        # Owners of one world normalise with one set of statistics, the pilot's.
        partition={"shared": ("encoder.*", "predictor.*", "normalise_actions.*"), "sovereign": ("norm.*",)},
    ),
}  # fmt: skip


def main() -> None:
    folder = Path(__file__).parent / "results"
    parser = parser_of(__doc__, None, Path("runs/benchmarks/weaving_bytes"))
    parser.add_argument("--world", choices=list(WORLDS), default="rooms")
    for name in SETTINGS:
        parser.add_argument(f"--{name}", type=int, help="by default the world's own")
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    arguments = parser.parse_args()
    arguments.results = arguments.results or folder / f"weaving_bytes_{arguments.world}.json"
    for name in SETTINGS:
        if getattr(arguments, name) is None:
            setattr(arguments, name, getattr(WORLDS[arguments.world], name))
    run(arguments, {"episodes": 12, "batch": 8, "steps": 220, "pilot": 20}, report)


def report(arguments: argparse.Namespace) -> None:
    """Measure what is missing; write and print the table."""
    world = WORLDS[arguments.world]
    settings = {key: getattr(arguments, key) for key in SETTINGS}
    settings |= {"outer": dict(world.outer), "partition": dict(world.partition), "rate": world.rate}
    found = []
    for seed in arguments.seeds:
        kept, bench = Kept(arguments, seed, settings), Bench(seed, arguments)
        found.append({way: kept.measured(way, partial(bench.measure, way)) for way in arguments.only})
    rows = [row_of(way, found) for way in arguments.only]
    pairs = [
        {"what": f"{one} against {other}", **{key: paired(found, one, other, key) for key in ("error", "place")}}
        for one, other in PAIRS
        if {one, other} <= set(arguments.only)
    ]
    chosen = [f'"{way}"' for way in arguments.only]
    more = ["--only", *chosen] if arguments.only != list(WAYS) else []
    command = command_of(__file__, arguments, "--world", arguments.world, *more)
    hardware = found[0][arguments.only[0]]["hardware"]
    values = {"command": command, "seeds": arguments.seeds, "settings": settings, "owners": len(OWNERS)}
    values |= {"world": arguments.world, "unit": world.unit}
    write_json(arguments.results, {**values, "rows": rows, "pairs": pairs, "hardware": hardware})
    header = ["way", "up MB", "fewer", "all MB", "fewer", "error", world.unit, "worse error", f"worse {world.unit}"]
    print_table("bytes against loss", header, [shown(row) for row in rows])
    for pair in pairs:
        print(f"{pair['what']}: error {percent(pair['error'])}, {world.unit} {percent(pair['place'])}")


def row_of(way: str, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the bytes and errors of a method, and how much the errors exceed those of the synchronous method."""
    bytes_ = {key: float(np.mean([one[way][key] for one in found])) for key in ("up", "all up", "all down")}
    row = {"way": way, "n": len(found), **bytes_}
    row |= {key: interval([one[way][key] for one in found]) for key in ("error", "place")}
    if SYNCHRONOUS in found[0]:
        sent, there = bytes_["all up"] + bytes_["all down"], found[0][SYNCHRONOUS]
        row["fewer up"] = there["up"] / bytes_["up"] if bytes_["up"] else None
        row["fewer in all"] = (there["all up"] + there["all down"]) / sent if sent else None
        row |= {f"worse {key}": paired(found, way, SYNCHRONOUS, key) for key in ("error", "place")}
    return row


def paired(found: Sequence[Mapping[str, Any]], one: str, other: str, key: str) -> dict[str, Any]:
    """Return the relative excess of one method's figure over another's, paired by seed."""
    return interval([ways[one][key] / ways[other][key] - 1 for ways in found])


def percent(value: Mapping[str, Any]) -> str:
    """Return a share with its interval, in per cent and with its sign."""
    ends = "" if value["low"] is None else f" [{100 * value['low']:+.1f}, {100 * value['high']:+.1f}]"
    return f"{100 * value['mean']:+.1f}%{ends}"


def shown(row: Mapping[str, Any]) -> list[str]:
    """Return a row of the printed table."""
    fewer = ["-" if row.get(key) is None else f"{row[key]:.0f}x" for key in ("fewer up", "fewer in all")]
    sent = [row["up"] / 1e6, (row["all up"] + row["all down"]) / 1e6]
    worse = [percent(row[key]) if key in row else "-" for key in ("worse error", "worse place")]
    return [row["way"], f"{sent[0]:.1f}", fewer[0], f"{sent[1]:.1f}", fewer[1],
            f"{row['error']['mean']:.4f}", f"{row['place']['mean']:.3g}", *worse]  # fmt: skip


class Counted:
    """Counts the bytes of messages."""

    def __init__(self) -> None:
        self.up = self.down = 0

    def before(self, handle: Callable[[bytes], bytes], key: object) -> Callable[[bytes], bytes]:
        """Return a handler that counts its bytes."""

        def counted(data: bytes) -> bytes:
            answer = handle(data)
            self.down, self.up = self.down + len(data), self.up + len(answer)
            return answer

        return counted


class Bench:
    """The owners of one seed, their logs, and the windows that every model is measured on."""

    def __init__(self, seed: int, arguments: argparse.Namespace) -> None:
        self._seed, self._arguments = seed, arguments
        self._world = WORLDS[arguments.world]
        self._partition = PartitionConfig.parse(self._world.partition)
        self._root: Path = arguments.runs / arguments.world / str(seed)

    def measure(self, way: str) -> dict[str, Any]:
        """Return the bytes that a method sends and the errors of its models."""
        config, root = self._config(WAYS[way]), self._root / "ways" / way.replace(" ", "")
        shutil.rmtree(root, ignore_errors=True)  # only an uninterrupted run counts all bytes
        if way in (SYNCHRONOUS, ALONE):
            every = {"all": self._every} if way == SYNCHRONOUS else {name: self._logs(name) for name in OWNERS}
            overrides = []
            if way == SYNCHRONOUS:
                overrides += [f"training.batch={self._arguments.batch * len(OWNERS)}"]
                overrides += [f"training.learning_rate={self._world.rate}"] if self._world.rate else []
            runs = [self._gone_on(root / name, logs, overrides) for name, logs in every.items()]
            base = bytes_of(self._begun.tensors)
            sent = len(OWNERS) * (self._arguments.steps - self._arguments.pilot) * base if way == SYNCHRONOUS else 0
            all_sent = {"all up": base + sent, "all down": len(OWNERS) * base + sent}
            return {"up": sent, **all_sent, **self._errors([run.model for run in runs])}
        for name in OWNERS:
            (root / name).mkdir(parents=True)
            (root / name / "data").symlink_to(Path(self._logs(name).path).resolve())
        count = Counted()
        handlers = dict.fromkeys(OWNERS, count.before)
        woven = simulate(config, root, seed=self._seed, handlers=handlers, progress=progress())
        records = Records(woven.rounds / "ledger.jsonl")
        up = sum(entry.body["facts"]["bytes"] for entry in records.entries("contribution"))
        left_out = sum(len(entry.body["facts"]["left_out"]) for entry in records.entries("round"))
        sent = {
            "up": up,
            "all up": bytes_of(RoundStore(woven.rounds).base(0).tensors) + count.up,
            "all down": count.down,
            "left out": left_out,
        }
        return {**sent, **self._errors([run.model for run in woven.runs.values()])}

    def _gone_on(self, path: Path, logs: EpisodeDataset, overrides: Sequence[str]) -> Run:
        """Return a run that continues from the pilot's base on some logs, for as many steps as the others."""
        recipe = self._recipe(OWNERS[0]).override(overrides)
        with self._training(path, logs, recipe) as training:
            begun, steps = self._arguments.pilot, self._arguments.steps
            training.train("going on", self._begun, steps - begun, at=begun)
            return Run(training.run)

    @cached_property
    def _begun(self) -> Base:
        """The base that the pilot trains alone, as in `simulate`."""
        recipe, path = self._recipe(OWNERS[0]), self._root / "pilot"
        shutil.rmtree(path, ignore_errors=True)
        with self._training(path, self._logs(OWNERS[0]), recipe) as training:
            first = initial_base(recipe.model, training.frames.spec, self._partition, seed=self._seed)
            return training.pilot(first, self._arguments.pilot)

    @contextmanager
    def _training(self, path: Path, logs: EpisodeDataset, recipe: Recipe) -> Iterator[LocalTraining]:
        with closing(load_frames(logs, recipe.data, progress=progress())) as frames:
            run = run_folder(recipe, logs, path, self._seed)
            yield LocalTraining(
                run, frames, training=recipe.training, model=recipe.model, partition=self._partition,
                progress=progress(),
            )  # fmt: skip

    def _config(self, rules: Mapping[str, Any], owners: Sequence[str] = OWNERS) -> ConsortiumConfig:
        arguments = self._arguments
        inner = rules.get("inner_steps", 1)
        return ConsortiumConfig(
            consortium="shards of one world",
            recipe=self._world.recipe,
            # Parts that affect no figure here are small: the windows of a verdict, and the inverse model.
            overrides=(f"training.batch={arguments.batch}", "training.validation_windows=64", "inverse.steps=1"),
            owners={name: OwnerConfig(episodes=arguments.episodes) for name in owners},
            pilot=owners[0],
            align_steps=arguments.pilot,
            rounds=(arguments.steps - arguments.pilot) // inner,
            inner_steps=inner,
            own_steps=1,  # at a rate of almost 0, because the last base is measured
            stems=False,
            rules={
                "outer": self._world.outer,
                "partition": self._world.partition,
                **{key: value for key, value in rules.items() if key != "inner_steps"},
            },
        )

    def _recipe(self, name: str) -> Recipe:
        return self._config({}, (name,)).recipe_of(name, self._seed)

    def _logs(self, name: str) -> EpisodeDataset:
        return workflow.collect(self._recipe(name), self._root / "logs" / name, progress=progress())

    @cached_property
    def _every(self) -> EpisodeDataset:
        """The logs of all owners as one."""
        return as_one([self._logs(name) for name in OWNERS], self._root / "every")

    @cached_property
    def _windows(self) -> tuple[Windows, Windows]:
        """Windows of all owners' logs, for fitting a probe, and windows of held-out episodes."""
        return self._drawn(self._every), self._drawn(self._logs("nobody"))

    def _drawn(self, dataset: EpisodeDataset) -> Windows:
        model = self._recipe(OWNERS[0]).model
        sampler = WindowSampler(
            load_cache(dataset, progress=progress()), context=model.context, horizon=HORIZON, block=model.block
        )
        return sampler.sample(WINDOWS, numpy_generator(self._seed, "windows"))

    def _errors(self, models: Sequence[JEPA]) -> dict[str, float]:
        """Return the mean errors of models."""
        found = [errors(model, *self._windows) for model in models]
        return {key: float(np.mean([one[key] for one in found])) for key in found[0]}


@torch.inference_mode()
def errors(model: JEPA, fitted: Windows, held_out: Windows) -> dict[str, float]:
    """Return the error of the last predicted latent, as a share of the latents' variance, and of the position in it."""
    context = model.spec.context
    latents = model.encode(held_out.observations)
    start = Context(latents=latents[:, :context], actions=held_out.actions[:, : context - 1])
    predicted = model.rollout(start, held_out.actions[:, None, context - 1 :])[:, 0, -1]
    variance = latents.flatten(0, 1).var(dim=0).sum()
    probe = LinearProbe.fit(model.encode(fitted.observations), fitted.labels["position"])
    missed = probe(predicted) - held_out.labels["position"][:, -1]
    return {
        "error": ((predicted - latents[:, -1]).square().sum(-1).mean() / variance).item(),
        "place": missed.norm(dim=-1).mean().item(),
    }


if __name__ == "__main__":
    main()
