"""Owners of different worlds: what each reaches at home by a model of its own, by the woven one, by all data pooled.

    python benchmarks/weaving.py [--consortium examples/five_owners.yaml] [--seeds 0 1 2] [--episodes 100]

For each seed: every owner's model alone; woven with everything shared but statistics, so that conventions of actions
clash; woven with sovereign stems; and one model trained on all logs, told in one convention of actions
(an upper bound that nobody could train without moving data), all from the same beginning and for as many steps. Success
is of the protocol's goals in the owner's own world, by tree search. Writes benchmarks/results/weaving.json; what one
seed gave is kept beside it and taken up unless it is to be measured anew.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from worldloom.cli.console import print_table, progress
from worldloom.cli.options import set_threads
from worldloom.core.files import read_json, write_json
from worldloom.core.hardware import describe_hardware
from worldloom.core.yaml_config import read_yaml
from worldloom.data import EpisodeDataset
from worldloom.evaluation import evaluate, wilson_interval
from worldloom.evaluation.protocols import PROTOCOLS
from worldloom.federation import Records
from worldloom.recipes import Run, workflow
from worldloom.recipes.weaving import ConsortiumConfig, OwnerConfig, alone, simulate

RESULTS = Path(__file__).parent / "results" / "weaving.json"
PARTS = RESULTS.parent / "weaving"
METHOD = "tree search"
CONVENTIONS = ("action_turn", "action_mirror")
CLASHING = {"shared": ["encoder.*", "predictor.*", "action_stem.*"],
            "sovereign": ["*.normalise.*", "normalise_actions.*", "norm.*"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--consortium", type=Path, default=Path("examples/five_owners.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--episodes", type=int, default=100, help="of each split")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks/weaving"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--anew", action="store_true", help="take up nothing that was measured before")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    config = read_yaml(arguments.consortium, ConsortiumConfig)
    found = []
    for seed in arguments.seeds:
        path = PARTS / f"seed-{seed}-{arguments.episodes}.json"
        if arguments.anew or not path.is_file():
            path.parent.mkdir(exist_ok=True)
            measured = measure(config, seed, arguments)
            write_json(path, {"seed": seed, **measured, "hardware": describe_hardware()})
        found.append(read_json(path))
    ways = list(found[0]["reached"])
    rows = []
    for owner in [*config.owners, "all"]:
        cells = []
        for way in ways:
            every = [one["reached"][way] for one in found]
            owners = list(config.owners) if owner == "all" else [owner]
            reached = sum(one[name][0] for one in every for name in owners)
            n = sum(one[name][1] for one in every for name in owners)
            low, high = wilson_interval(reached, n)
            cells.append({"way": way, "n": n, "rate": reached / n, "low": low, "high": high})
        rows.append({"owner": owner, "cells": cells})
    losses = [{"way": way, "losses": [one["base losses"][way] for one in found]} for way in found[0]["base losses"]]
    command = f"python benchmarks/weaving.py --seeds {' '.join(map(str, arguments.seeds))}"
    command += f" --episodes {arguments.episodes}"
    values = {"command": command, "seeds": arguments.seeds, "rows": rows, "bytes": found[0]["bytes"]}
    values["base losses"] = losses
    write_json(RESULTS, {**values, "hardware": found[0]["hardware"]})
    shown = [
        [row["owner"], str(row["cells"][0]["n"])]
        + [f"{100 * one['rate']:.0f}% [{100 * one['low']:.0f}, {100 * one['high']:.0f}]" for one in row["cells"]]
        for row in rows
    ]
    print_table("success at home", ["owner", "n", *ways], shown)


def measure(config: ConsortiumConfig, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return for each way to a model how many goals each owner reaches, of how many."""
    root = arguments.runs / str(seed)
    woven = simulate(config, root / "woven", seed=seed, progress=progress())
    everything = {name: owner.model_copy(update={"settle": "all"}) for name, owner in config.owners.items()}
    clashing = config.model_copy(update={"rules": {**config.rules, "partition": CLASHING}, "owners": everything})
    clash = simulate(clashing, root / "clashing", seed=seed, progress=progress())
    own = {
        name: alone(config, name, root / "alone" / name, root / "woven" / name / "data", seed=seed, progress=progress())
        for name in config.owners
    }
    pooled = pool(config, root, seed)
    ways: dict[str, Mapping[str, Run]] = {
        "alone": own,
        "woven": clash.runs,
        "woven + sovereign": woven.runs,
        "pooled": dict.fromkeys(config.owners, pooled),
    }
    reached = {
        way: {
            name: success(run, config.owners[name], arguments.episodes, one_convention=way == "pooled")
            for name, run in runs.items()
        }
        for way, runs in ways.items()
    }
    records = Records(woven.rounds / "ledger.jsonl")
    sent = sum(one["bytes"] for number in range(config.rounds) for one in records.contributions(number))
    bases = {"woven": last_losses(clash.rounds), "woven + sovereign": last_losses(woven.rounds)}
    return {"reached": reached, "bytes": sent, "base losses": bases}


def last_losses(rounds: Path) -> dict[str, float]:
    """Return what each member loses on its held-out episodes under the last base, before that settles at home."""
    *_, last = Records(rounds / "ledger.jsonl").entries("round")
    return {name: after for name, (_, after) in last.body["facts"]["evaluation"]["owners"].items()}


def pool(config: ConsortiumConfig, root: Path, seed: int) -> Run:
    """Train one model on the logs of all owners, their actions told in one convention."""
    path = root / "pooled" / "data"
    told = {name: owner.model_copy(update={"factors": plain(owner.factors)}) for name, owner in config.owners.items()}
    same = config.model_copy(update={"owners": told})
    if not path.exists():
        every = [workflow.collect(same.recipe_of(name, seed), root / "told" / name) for name in told]
        dataset = EpisodeDataset.create(path, every[0].spec)
        for one in every:
            dataset.append(one.episode(index) for index in range(len(one)))
    name = next(iter(config.owners))
    return alone(same, name, root / "pooled" / "run", path, seed=seed, progress=progress())


def plain(factors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the factors without a convention of actions."""
    return {name: value for name, value in factors.items() if name not in CONVENTIONS}


def success(run: Run, owner: OwnerConfig, episodes: int, *, one_convention: bool) -> list[int]:
    """Return how many goals are reached in the owner's world, and of how many."""
    factors = plain(owner.factors) if one_convention else owner.factors
    assert run.recipe.protocol is not None
    protocol = PROTOCOLS[run.recipe.protocol].customise(
        episodes=episodes, env_kwargs={**owner.world, "factors": factors}
    )
    results = evaluate(protocol, {METHOD: lambda: run.agent(METHOD)}, record=0, progress=progress())
    every = [episode.success for row in results.rows for episode in row.episodes]
    return [sum(every), len(every)]


if __name__ == "__main__":
    main()
