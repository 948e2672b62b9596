"""Draws the animation of the README: episodes of a trained run, each next to its goal.

    python benchmarks/crossing.py runs/demo/run --out docs/crossing.gif

The run comes from `make demo`. The episodes are the first ones of the protocol's cross-room split, whatever their
outcome.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import worldloom as wl
from worldloom.core.files import write_atomic
from worldloom.evaluation import PROTOCOLS, evaluate
from worldloom.reports import episodes_gif


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/crossing.gif"))
    parser.add_argument("--method", default="tree search")
    parser.add_argument("--episodes", type=int, default=4)
    arguments = parser.parse_args()
    run = wl.Run.open(arguments.run)
    protocol = PROTOCOLS["two-room@1"].customise(split="cross-room", episodes=arguments.episodes)
    agents = {arguments.method: lambda: run.agent(arguments.method)}
    results = evaluate(protocol, agents, model=run.model.spec.fingerprint, record=arguments.episodes)
    film = episodes_gif([replace(each, split="another room") for each in results.recordings])
    write_atomic(arguments.out, lambda temporary: temporary.write_bytes(film))
    rate = results.row(arguments.method, "cross-room").overall.rate
    print(f"{arguments.out}: {len(film) / 1000:.0f} kB, {rate:.0%} of {arguments.episodes} goals reached")


if __name__ == "__main__":
    main()
