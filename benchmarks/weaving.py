"""Owners of different worlds: success in their own world with their own model, the shared model, and pooled data.

    python benchmarks/weaving.py [--consortium examples/five_owners.yaml] [--seeds 0 1 2] [--episodes 50] [--threads 1]

For each seed, the benchmark compares four ways to train a model:

- each owner trains alone;
- all owners share everything except statistics, so that their action conventions conflict;
- all owners share a model with sovereign stems;
- one model trains on all logs in one action convention, an upper bound that needs the data in one place.

All start from the same base and train for the same number of steps. Success is measured with tree search, on the
protocol's goals in the owner's own world; a single room has no goals in another room. The results go to
benchmarks/results/weaving.json. Results of a seed are stored beside it and reused, unless `--anew` is set. `--quick`
only tries the script, and stores nothing."""

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from by_seed import Kept, as_one, command_of, parser_of, run
from worldloom import workflow
from worldloom.cli.console import print_table, progress
from worldloom.core.files import write_json
from worldloom.core.yaml_config import read_yaml
from worldloom.data import EpisodeDataset, load_frames
from worldloom.evaluation import PROTOCOLS, evaluate, wilson_interval
from worldloom.federation import LocalTraining, PartitionConfig, Records
from worldloom.workflow import ConsortiumConfig, Run, simulate
from worldloom.workflow.simulation import OwnerConfig, measure, run_folder

RESULTS = Path(__file__).parent / "results" / "weaving.json"
METHOD = "tree search"
CONVENTIONS = ("action_turn", "action_mirror")
CLASHING = {"shared": ["encoder.*", "predictor.*", "action_stem.*"],
            "sovereign": ["*.normalise.*", "normalise_actions.*", "norm.*"]}  # fmt: skip
QUICK = {"align_steps": 4, "rounds": 2, "inner_steps": 2, "own_steps": 2}


def main() -> None:
    parser = parser_of(__doc__, RESULTS, Path("runs/benchmarks/weaving"))
    parser.add_argument("--consortium", type=Path, default=Path("examples/five_owners.yaml"))
    parser.add_argument("--episodes", type=int, default=50, help="of each split")
    run(parser.parse_args(), {"episodes": 1}, report)


def report(arguments: argparse.Namespace) -> None:
    """Measure what is missing; write and print the table."""
    config = read_yaml(arguments.consortium, ConsortiumConfig)
    if arguments.quick:
        few = {
            name: owner.model_copy(update={"episodes": 12, "own_steps": None}) for name, owner in config.owners.items()
        }
        config = config.model_copy(update={**QUICK, "owners": few})
    settings = {"episodes": arguments.episodes, "consortium": config.model_dump(mode="json")}
    found = []
    for seed in arguments.seeds:
        kept, bench = Kept(arguments, seed, settings), Bench(config, seed, arguments, settings)
        found.append({way: kept.measured(way, measure) for way, measure in bench.ways.items()})
    rows = []
    for owner in [*config.owners, "all"]:
        names, cells = list(config.owners) if owner == "all" else [owner], []
        for way in found[0]:
            every = [one[way]["reached"][name] for one in found for name in names]
            reached, n = (sum(one[place] for one in every) for place in (0, 1))
            low, high = wilson_interval(reached, n)
            cells.append({"way": way, "n": n, "rate": reached / n, "low": low, "high": high})
        rows.append({"owner": owner, "cells": cells})
    woven = [way for way in found[0] if "losses" in found[0][way]]
    losses = [{"way": way, "losses": [one[way]["losses"] for one in found]} for way in woven]
    command = command_of(__file__, arguments, f"--episodes {arguments.episodes}")
    values = {"command": command, "seeds": arguments.seeds, "rows": rows, "bytes": found[0][woven[-1]]["bytes"]}
    hardware = found[0][woven[-1]]["hardware"]
    write_json(arguments.results, {**values, "base losses": losses, "hardware": hardware})
    shown = [
        [row["owner"], str(row["cells"][0]["n"])]
        + [f"{100 * one['rate']:.0f}% [{100 * one['low']:.0f}, {100 * one['high']:.0f}]" for one in row["cells"]]
        for row in rows
    ]
    print_table("success at home", ["owner", "n", *found[0]], shown)


class Bench:
    """The four ways to train a model for one seed, and the owners' success with each."""

    def __init__(
        self, config: ConsortiumConfig, seed: int, arguments: argparse.Namespace, settings: Mapping[str, Any]
    ) -> None:
        self._config, self._seed, self._episodes = config, seed, arguments.episodes
        # An interrupted run is resumed; a run with different settings never is.
        name = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=4).hexdigest()
        self._root: Path = arguments.runs / name / str(seed)
        if arguments.anew:
            shutil.rmtree(self._root, ignore_errors=True)
        everything = {name: owner.model_copy(update={"fine_tune": "all"}) for name, owner in config.owners.items()}
        rules = {**config.rules, "partition": CLASHING}
        clashing = config.model_copy(update={"rules": rules, "owners": everything})
        self.ways: dict[str, Callable[[], dict[str, Any]]] = {
            "alone": self._alone,
            "woven": partial(self._woven, "clashing", clashing),
            "woven + sovereign": partial(self._woven, "woven", config),
            "pooled": self._pooled,
        }

    def _alone(self) -> dict[str, Any]:
        runs = {}
        for name in self._config.owners:
            path = self._root / "alone" / name
            logs = workflow.collect(self._config.recipe_of(name, self._seed), path / "data", progress=progress())
            runs[name] = alone(self._config, name, path / "run", logs.path, self._seed)
        return {"reached": self._reached(runs)}

    def _woven(self, name: str, config: ConsortiumConfig) -> dict[str, Any]:
        woven = simulate(config, self._root / name, seed=self._seed, progress=progress())
        records = Records(woven.rounds / "ledger.jsonl")
        sent = sum(one["bytes"] for number in range(config.rounds) for one in records.of("contribution", number))
        return {"reached": self._reached(woven.runs), "bytes": sent, "losses": last_losses(woven.rounds)}

    def _pooled(self) -> dict[str, Any]:
        pooled = pool(self._config, self._root, self._seed)
        return {"reached": self._reached(dict.fromkeys(self._config.owners, pooled), one_convention=True)}

    def _reached(self, runs: Mapping[str, Run], *, one_convention: bool = False) -> dict[str, list[int]]:
        owners = self._config.owners
        return {
            name: success(run, owners[name], self._episodes, one_convention=one_convention)
            for name, run in runs.items()
        }


def last_losses(rounds: Path) -> dict[str, float]:
    """Return each member's loss on its held-out episodes under the last base, before fine-tuning."""
    *_, last = Records(rounds / "ledger.jsonl").entries("round")
    return {name: after for name, (_, after) in last.body["facts"]["evaluation"]["owners"].items()}


def pool(config: ConsortiumConfig, root: Path, seed: int) -> Run:
    """Train one model on the logs of all owners, with their actions in one convention."""
    told = {name: owner.model_copy(update={"factors": plain(owner.factors)}) for name, owner in config.owners.items()}
    same = config.model_copy(update={"owners": told})
    every = [workflow.collect(same.recipe_of(name, seed), root / "told" / name, progress=progress()) for name in told]
    path = root / "pooled" / "data"
    as_one(every, path)
    name = next(iter(config.owners))
    return alone(same, name, root / "pooled" / "run", path, seed)


def alone(config: ConsortiumConfig, name: str, path: Path, data: Path | str, seed: int) -> Run:
    """Train an owner's model on its own logs alone, from the same initial base and for as many steps."""
    steps = config.shared_steps + config.own_steps_of(name)
    recipe, dataset = config.recipe_of(name, seed, steps=steps), EpisodeDataset.open(data)
    partition = PartitionConfig.parse(config.rules.get("partition", {}))
    with closing(load_frames(dataset, recipe.data, progress=progress())) as frames:
        folder = run_folder(recipe, dataset, path, seed)
        local = LocalTraining(
            folder, frames, training=recipe.training, model=recipe.model, partition=partition, progress=progress()
        )
        local.train("alone", local.without_statistics(local.untrained(seed)), steps)
        run = Run(folder)
        measure(run, frames, progress())
    return run


def plain(factors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the factors without those of the action convention."""
    return {name: value for name, value in factors.items() if name not in CONVENTIONS}


def success(run: Run, owner: OwnerConfig, episodes: int, *, one_convention: bool) -> list[int]:
    """Return the number of goals reached in the owner's world, and of all goals."""
    factors = plain(owner.factors) if one_convention else owner.factors
    assert run.recipe.protocol is not None
    protocol = PROTOCOLS[run.recipe.protocol].customise(
        episodes=episodes,
        env_kwargs={**owner.world, "factors": factors},
        split=None if owner.factors.get("wall", True) else "same-room",
    )
    results = evaluate(protocol, {METHOD: lambda: run.agent(METHOD)}, record=0, progress=progress())
    every = [episode.success for row in results.rows for episode in row.episodes]
    return [sum(every), len(every)]


if __name__ == "__main__":
    main()
