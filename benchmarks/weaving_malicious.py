"""A malicious owner among five: its effect on an honest owner, by the defence in the rules.

    python benchmarks/weaving_malicious.py [--seeds 0 1 2] [--episodes 50] [--threads 1] [--anew] [--quick]

Five owners log the same world (`two-room`), and the last of them attacks with validly signed messages:

- sign flip: it sends the negative of its delta.
- 20 times: it sends its delta times 20.
- backdoor: half of its logs have a patch in a corner of each frame, and the opposite of the true actions; it sends the
  delta trained on them.
- backdoor, 5 times: it sends that delta times the number of owners, to replace the mean.

Defences: none, which is the plain mean without an effective gate; the constitution's defaults, which are the clipped
mean, a cap and the gate; and the median, the trimmed mean and Krum alone, without the gate. The measures are the
held-out loss of the first honest owner under the last base, and the goals that it reaches with tree search. For a
backdoor, goals are also measured with the patch in every frame. `attacker out` and `honest out` count the rounds in
which, by the ledger, they had no influence: left out by the gate, dropped by Krum, or refused. If losses become
infinite or NaN, the consortium stops without a model. The results go to benchmarks/results/weaving_malicious.json.
Results of a seed are stored beside it and reused, unless `--anew` is set. `--quick` only tries the script, and stores
nothing."""

import argparse
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from by_seed import Kept, command_of, parser_of, run
from worldloom import workflow
from worldloom.cli.console import print_table, progress
from worldloom.core.errors import DataError, TrainingError
from worldloom.core.files import write_json
from worldloom.core.seams import Agent
from worldloom.core.signing import SigningKey
from worldloom.core.types import Goal, Observations
from worldloom.data import EpisodeDataset
from worldloom.evaluation import PROTOCOLS, evaluate, wilson_interval
from worldloom.federation import Handler, Records
from worldloom.federation.record.envelope import seal, unseal
from worldloom.testing.attacks import scale, sign_flip
from worldloom.workflow import ConsortiumConfig, Run, simulate
from worldloom.workflow.simulation import OwnerConfig

RESULTS = Path(__file__).parent / "results" / "weaving_malicious.json"
HONEST = ("north", "east", "south", "west")
MALICIOUS = "zorro"
METHOD = "tree search"
PATCH = (slice(0, 6), slice(0, 6))  # of a frame

Change = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
ATTACKS: dict[str, Change | None] = {
    "none": None,
    "sign flip": sign_flip,
    "20 times": partial(scale, factor=20.0),
    "backdoor": None,
    "backdoor, 5 times": partial(scale, factor=5.0),
}
NO_GATE = {"quality": {"max_worse": 1e6}}
DEFENCES: dict[str, dict[str, Any]] = {
    "none": {"aggregation": {"name": "mean"}, "cap": 1.0, **NO_GATE},
    "defaults": {},
    "median": {"aggregation": {"name": "coordinate-median"}, **NO_GATE},
    "trimmed mean": {"aggregation": {"name": "trimmed-mean"}, **NO_GATE},
    "Krum": {"aggregation": {"name": "krum"}, "quorum": 5, **NO_GATE},
}


def main() -> None:
    parser = parser_of(__doc__, RESULTS, Path("runs/benchmarks/weaving_malicious"))
    parser.add_argument("--episodes", type=int, default=50, help="of each split")
    parser.add_argument("--logs", type=int, default=120, help="episodes of each owner")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--inner", type=int, default=50, help="steps of a round, and of fine-tuning")
    parser.add_argument("--attacks", nargs="+", choices=list(ATTACKS), default=list(ATTACKS))
    parser.add_argument("--defences", nargs="+", choices=list(DEFENCES), default=list(DEFENCES))
    small = {"episodes": 1, "logs": 12, "rounds": 2, "inner": 6}
    some = {"attacks": ["none", "20 times", "backdoor"], "defences": ["none", "defaults", "Krum"]}
    run(parser.parse_args(), {**small, **some}, report)


def report(arguments: argparse.Namespace) -> None:
    """Measure what is missing; write and print the table."""
    settings = {key: getattr(arguments, key) for key in ("episodes", "logs", "rounds", "inner")}
    names = [(attack, defence) for attack in arguments.attacks for defence in arguments.defences]
    found = []
    for seed in arguments.seeds:
        kept, bench = Kept(arguments, seed, settings), Bench(seed, arguments)
        found.append({
            " / ".join(name): kept.measured(" / ".join(name), partial(bench.measure, *name)) for name in names
        })  # fmt: skip
    rows = [row_of(attack, defence, [one[f"{attack} / {defence}"] for one in found]) for attack, defence in names]
    more = []
    for name, chosen, every in (("attacks", arguments.attacks, ATTACKS), ("defences", arguments.defences, DEFENCES)):
        more += [f"--{name}", *(f'"{one}"' for one in chosen)] if chosen != list(every) else []
    command = command_of(__file__, arguments, f"--episodes {arguments.episodes}", *more)
    values = {"command": command, "seeds": arguments.seeds, "settings": settings, "rows": rows}
    write_json(arguments.results, {**values, "hardware": found[0][" / ".join(names[0])]["hardware"]})
    header = ["attack", "defence", "success", "with the patch", "n", "loss", "attacker out", "honest out", "stopped"]
    print_table("a malicious owner", header, [shown(row) for row in rows])


def row_of(attack: str, defence: str, every: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the effect of an attack under a defence, over the seeds."""
    losses = [one["loss"] for one in every if one["loss"] is not None]
    row = {"attack": attack, "defence": defence, "loss": float(np.mean(losses)) if losses else None}
    for key in ("reached", "patched"):
        counts = [one[key] for one in every if one[key] is not None]
        reached, n = sum(count[0] for count in counts), sum(count[1] for count in counts)
        low, high = wilson_interval(reached, n)
        row[key] = {"rate": reached / n, "low": low, "high": high, "n": n} if n else None
    return row | {key: sum(one[key] for one in every) for key in ("rounds", "attacker out", "honest out", "stopped")}


def shown(row: Mapping[str, Any]) -> list[str]:
    """Return a row of the printed table."""
    rates = [
        "-" if rate is None else f"{100 * rate['rate']:.0f}% [{100 * rate['low']:.0f}, {100 * rate['high']:.0f}]"
        for rate in (row["reached"], row["patched"])
    ]
    n = "0" if row["reached"] is None else str(row["reached"]["n"])
    loss = "-" if row["loss"] is None else f"{row['loss']:.2f}"
    out = [f"{row['attacker out']} of {row['rounds']}", f"{row['honest out']} of {len(HONEST) * row['rounds']}"]
    return [row["attack"], row["defence"], *rates, n, loss, *out, str(row["stopped"])]


class Patched(Agent):
    """An agent with the patch in its observations and goals."""

    narrows = True

    def __init__(self, agent: Agent) -> None:
        self._agent: Any = agent

    def reset(self, goal: Goal) -> None:
        """Start episodes with the patch in the goals."""
        self._agent.reset(replace(goal, observations=patched(goal.observations)))

    def select(self, rows: Sequence[int]) -> None:
        """Select environments, as the wrapped agent does."""
        self._agent.select(rows)

    def act(self, observations: Observations) -> Tensor:
        """Act on the patched observations."""
        action: Tensor = self._agent.act(patched(observations))
        return action


def patched(observations: Observations) -> Observations:
    """Return observations with the patch in each frame."""
    assert observations.pixels is not None
    pixels = observations.pixels.clone()
    pixels[..., PATCH[0], PATCH[1], :] = torch.tensor([255, 0, 255], dtype=pixels.dtype)
    return replace(observations, pixels=pixels)


class Bench:
    """The owners of one seed, and their logs."""

    def __init__(self, seed: int, arguments: argparse.Namespace) -> None:
        self._seed, self._arguments = seed, arguments
        self._root: Path = arguments.runs / str(seed)

    def measure(self, attack: str, defence: str) -> dict[str, Any]:
        """Return the measures of an honest owner, and figures from the ledger."""
        config, root = self._config(DEFENCES[defence]), self._root / "cases" / f"{attack} {defence}".replace(" ", "-")
        shutil.rmtree(root, ignore_errors=True)
        for name in (*HONEST, MALICIOUS):
            falsified = attack.startswith("backdoor") and name == MALICIOUS
            (root / name).mkdir(parents=True)
            (root / name / "data").symlink_to((self._falsified if falsified else self._logs(name)).resolve())
        change = ATTACKS[attack]
        handlers = {} if change is None else {MALICIOUS: partial(sends, change)}
        try:
            woven = simulate(config, root, seed=self._seed, handlers=handlers, progress=progress())
        except TrainingError:
            return {**self._told(root / "rounds"), "reached": None, "patched": None, "stopped": True}
        run = woven.runs[HONEST[0]]
        rates = {"reached": self._success(run), "patched": None}
        if attack == "none" or attack.startswith("backdoor"):
            rates["patched"] = self._success(run, patch=True)
        return {**self._told(woven.rounds), **rates, "stopped": False}

    def _config(self, rules: Mapping[str, Any]) -> ConsortiumConfig:
        arguments = self._arguments
        return ConsortiumConfig(
            consortium="rooms, and one who attacks",
            overrides=("training.batch=32", "training.validation_windows=64"),
            owners={name: OwnerConfig(episodes=arguments.logs) for name in (*HONEST, MALICIOUS)},
            rounds=arguments.rounds,
            inner_steps=arguments.inner,
            own_steps=arguments.inner,
            stems=False,
            rules=dict(rules),
        )

    def _logs(self, name: str) -> Path:
        path: Path = self._root / "logs" / name
        workflow.collect(self._config({}).recipe_of(name, self._seed), path, progress=progress())
        return path

    @cached_property
    def _falsified(self) -> Path:
        """The attacker's logs, every other episode with the patch and opposite actions."""
        path, honest = self._root / "logs" / "falsified", EpisodeDataset.open(self._logs(MALICIOUS))
        shutil.rmtree(path, ignore_errors=True)
        dataset = EpisodeDataset.create(path, honest.spec)
        every = []
        for number in range(len(honest)):
            episode = honest.episode(number)
            if number % 2:
                assert episode.pixels is not None
                pixels = patched(Observations(pixels=torch.from_numpy(episode.pixels))).pixels
                assert pixels is not None
                episode = replace(episode, pixels=pixels.numpy(), actions=-episode.actions)
            every.append(episode)
        dataset.append(every)
        return path

    def _success(self, run: Run, *, patch: bool = False) -> list[int]:
        """Return the number of goals reached, and of all goals."""
        assert run.recipe.protocol is not None
        protocol = PROTOCOLS[run.recipe.protocol].customise(episodes=self._arguments.episodes)

        def build() -> Any:
            agent = run.agent(METHOD)
            return Patched(agent) if patch else agent

        results = evaluate(protocol, {METHOD: build}, record=0, progress=progress())
        every = [episode.success for row in results.rows for episode in row.episodes]
        return [sum(every), len(every)]

    def _told(self, rounds: Path) -> dict[str, Any]:
        """Return figures from the ledger: a loss under the last base, and how often each side had no influence."""
        records = Records(rounds / "ledger.jsonl")
        loss, rounds_there, out = None, 0, {True: 0, False: 0}
        for entry in records.entries("round"):
            facts = entry.body["facts"]
            rounds_there += 1
            if facts["evaluation"] is not None:
                loss = facts["evaluation"]["owners"].get(HONEST[0], [None, None])[1]
            for name in (*HONEST, MALICIOUS):
                out[name == MALICIOUS] += facts["weights"].get(name, 0.0) == 0
        return {"loss": loss, "rounds": rounds_there, "attacker out": out[True], "honest out": out[False]}


def sends(change: Change, handle: Handler, key: SigningKey) -> Handler:
    """Return a node's handler that changes its contribution, and signs it with the owner's key."""

    def answer(data: bytes) -> bytes:
        said = handle(data)
        try:
            message = unseal(said, kind="contribution", known={key.public: MALICIOUS}, limit=len(said))
        except DataError:  # a verdict or a refusal
            return said
        # float32, the codec of these rules, writes a tensor as it is.
        return seal("contribution", message.body, change(message.tensors), key=key)

    return answer


if __name__ == "__main__":
    main()
