"""Two owners with opposite action conventions: the success of the base itself, with shared or sovereign stems.

    python benchmarks/weaving_clash.py [--seeds 0 1 2] [--episodes 50] [--threads 1] [--anew] [--quick]

Both owners have the same rooms, but an action that moves one agent right moves the other left. They train with the
same rules, once with shared stems and once with sovereign stems. They act with the last base without fine-tuning, which
would repair both. Success is measured on the protocol's goals, by tree search. The results go to
benchmarks/results/weaving_clash.json. Results of a seed are stored beside it and reused, unless `--anew` is set.
`--quick` only tries the script, and stores nothing.
"""

import argparse
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from by_seed import Kept, command_of, parser_of, run
from weaving import CLASHING, last_losses, success
from worldloom.cli.console import print_table, progress
from worldloom.core.files import write_json
from worldloom.evaluation import wilson_interval
from worldloom.workflow import ConsortiumConfig, simulate
from worldloom.workflow.simulation import OwnerConfig

RESULTS = Path(__file__).parent / "results" / "weaving_clash.json"
TURNS = {"straight": 0, "turned": 180}
WAYS: dict[str, dict[str, Any]] = {"all shared": {"partition": CLASHING}, "sovereign stems": {}}


def main() -> None:
    parser = parser_of(__doc__, RESULTS, Path("runs/benchmarks/weaving_clash"))
    parser.add_argument("--episodes", type=int, default=50, help="of each split")
    parser.add_argument("--logs", type=int, default=300, help="episodes of each owner")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--align", type=int, default=100, help="steps in which the stems align with the pilot's base")
    run(parser.parse_args(), {"episodes": 1, "logs": 12, "rounds": 2, "align": 6}, report)


def report(arguments: argparse.Namespace) -> None:
    """Measure what is missing; write and print the table."""
    settings = {key: getattr(arguments, key) for key in ("episodes", "logs", "rounds", "align")}
    kept = {seed: Kept(arguments, seed, settings) for seed in arguments.seeds}
    found = {
        way: [kept[seed].measured(way, partial(measure, way, seed, arguments)) for seed in arguments.seeds]
        for way in WAYS
    }
    rows = []
    for way, seeds in found.items():
        for owner in TURNS:
            reached, n = (sum(one["reached"][owner][place] for one in seeds) for place in (0, 1))
            low, high = wilson_interval(reached, n)
            losses = [one["losses"][owner] for one in seeds]
            rate = {"rate": reached / n, "low": low, "high": high, "n": n}
            rows.append({"way": way, "owner": owner, **rate, "losses": losses})
    values = {"command": command_of(__file__, arguments, f"--episodes {arguments.episodes}"), "settings": settings}
    hardware = found["all shared"][0]["hardware"]
    write_json(arguments.results, {**values, "seeds": arguments.seeds, "rows": rows, "hardware": hardware})
    shown = [
        [row["way"], row["owner"], f"{100 * row['rate']:.0f}% [{100 * row['low']:.0f}, {100 * row['high']:.0f}]",
         str(row["n"]), ", ".join(f"{loss:.2f}" for loss in row["losses"])]
        for row in rows
    ]  # fmt: skip
    print_table("the base as it came", ["way", "owner", "success at home", "n", "held-out loss, by seed"], shown)


def measure(way: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the number of goals that each owner reaches with the last base, and its held-out loss."""
    config = ConsortiumConfig(
        consortium="two conventions",
        overrides=("training.batch=32",),
        owners={
            name: OwnerConfig(episodes=arguments.logs, factors={"action_turn": turn}) for name, turn in TURNS.items()
        },
        pilot="straight",
        align_steps=arguments.align,
        rounds=arguments.rounds,
        inner_steps=25,
        own_steps=1,  # at a rate of almost 0
        rules={"outer": {"name": "fedavg"}, "quorum": 2, "cap": 0.5, "quality": {"max_worse": 10.0}, **WAYS[way]},
    )
    root = arguments.runs / str(seed) / way.replace(" ", "-")
    shutil.rmtree(root, ignore_errors=True)
    woven = simulate(config, root, seed=seed, progress=progress())
    reached = {
        name: success(made, config.owners[name], arguments.episodes, one_convention=False)
        for name, made in woven.runs.items()
    }
    return {"reached": reached, "losses": last_losses(woven.rounds)}


if __name__ == "__main__":
    main()
