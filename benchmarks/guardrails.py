"""Guardrails under a stated risk: how often the true limit is broken, and how many goals are reached.

    python benchmarks/guardrails.py [--seeds 0 1 2] [--risks 0.05 0.01] [--episodes 100] [--only risks shifts] [--anew]

Margins are calibrated for each training seed of the recipe pits and each risk; missing runs are trained first. Every
method for applying guardrails then acts in the same episodes of pits@1, which calibration does not use. A true
violation is reported by the world: the agent fell into a pit.

In the second table, the dynamics shift in the middle of each episode. It compares the calibrated margins with margins
that adapt to the observed errors.

Writes benchmarks/results/guardrails.json. Results of a seed are stored beside it, with the fingerprint of its model,
and reused unless `--anew` is set."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from worldloom import workflow
from worldloom.agents import PlanMethod
from worldloom.cli.console import print_table, progress
from worldloom.core.errors import DataError
from worldloom.core.files import read_json, write_json
from worldloom.core.hardware import describe_hardware, set_threads
from worldloom.evaluation import PROTOCOLS, evaluate, wilson_interval
from worldloom.recipes import load_recipe
from worldloom.workflow import Run, Session, calibrate

RESULTS = Path(__file__).parent / "results" / "guardrails.json"
PARTS = RESULTS.parent / "guardrails"
PROTOCOL = "pits@1"
RISKY = ("per candidate", "calibrated")  # what depends on the stated risk
ONLINE = "recalibrated online"
SHIFT = 8  # steps into an episode
SHIFTS: dict[str, dict[str, Any]] = {
    "as calibrated": {},
    "1.4 times as fast": {"shift_step": SHIFT, "speed_after": 1.4},
    "wind of 0.8 px a step": {"shift_step": SHIFT, "wind_after": [0.8, 0.0]},
}
Measure = Callable[[Run, argparse.Namespace], dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--risks", type=float, nargs="+", default=[0.05, 0.01])
    parser.add_argument("--episodes", type=int, default=100, help="of each split and seed")
    parser.add_argument("--only", nargs="+", choices=["risks", "shifts"], default=["risks", "shifts"])
    parser.add_argument("--anew", action="store_true", help="measure everything, and ignore stored results")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    asked: dict[str, list[tuple[str, Measure]]] = {
        "risks": [(f"{risk:g}", partial(at_risk, risk, first=risk == arguments.risks[0])) for risk in arguments.risks],
        "shifts": [(title, partial(shifted, arguments.risks[0], factors)) for title, factors in SHIFTS.items()],
    }
    found = {part: {title: [] for title, _ in asked[part]} for part in arguments.only}
    for seed in arguments.seeds:
        for part in arguments.only:
            for title, measure in asked[part]:
                found[part][title].append(taken_up(arguments, seed, part, title, measure))
    values: dict[str, Any] = read_json(RESULTS) if RESULTS.is_file() else {}
    values |= {
        "command": f"python benchmarks/guardrails.py --seeds {' '.join(map(str, arguments.seeds))}",
        "seeds": arguments.seeds,
        "hardware": next(iter(found[arguments.only[0]].values()))[0]["hardware"],
        **{part: {title: pooled(seeds) for title, seeds in titles.items()} for part, titles in found.items()},
    }
    write_json(RESULTS, values)
    for part in arguments.only:
        show(part, values[part])


def taken_up(arguments: argparse.Namespace, seed: int, part: str, title: str, measure: Measure) -> dict[str, Any]:
    """Return the stored results of a seed, or measure them."""
    name = f"{part}-{title}".replace(" ", "-")
    path = PARTS / f"seed-{seed}-{name}-{arguments.episodes}.json"
    if arguments.anew or not path.is_file():
        run = open_run(arguments, seed)
        about = {"seed": seed, "model": run.model.spec.fingerprint, "hardware": describe_hardware()}
        path.parent.mkdir(exist_ok=True)
        write_json(path, {**measure(run, arguments), **about})
    values: dict[str, Any] = read_json(path)
    return values


def open_run(arguments: argparse.Namespace, seed: int) -> Run:
    """Return the run of a seed, and train it if it does not exist."""
    recipe = load_recipe("pits").override([f"training.seed={seed}", f"collection.seed={seed}"])
    folder = arguments.runs / f"pits-{seed}"
    workflow.collect(recipe, folder / "data", progress=progress())
    return workflow.train(recipe, folder / "data", folder / "run", resume=True, progress=progress())


def at(run: Run, risk: float) -> Run:
    """Return the run with a different risk in the rules of its recipe."""
    return workflow.train(run.recipe.override([f"rules.risk={risk}"]), run.data, run.path, resume=True)


def calibrated(run: Run, name: str) -> dict[str, Any]:
    """Calibrate a method unless its margins exist; return the rounds of the calibration."""
    method, rules = run.recipe.method(name), run.rules
    assert isinstance(method, PlanMethod)
    assert rules is not None
    if rules.margins(method.calibrated_as) is None:
        try:
            calibrate(run, method=name, protocol=PROTOCOL, progress=progress())
        except DataError as error:
            return {"refused": str(error)}
    found = read_json(rules.margins_path(method.calibrated_as))
    return {key: found[key] for key in ("values", "usual", "rounds") if key in found}


def at_risk(risk: float, run: Run, arguments: argparse.Namespace, *, first: bool) -> dict[str, Any]:
    """Measure the methods that depend on the risk; with the first risk, measure all methods."""
    under = at(run, risk)
    margins = {name: calibrated(under, name) for name in RISKY}
    names = [name for name in run.recipe.methods if name not in RISKY and first]
    names += [name for name in RISKY if "refused" not in margins[name]]
    return {"margins": margins, "rows": measure(under, names, {}, arguments)}


def shifted(risk: float, factors: dict[str, Any], run: Run, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the calibrated and the adaptive margins under dynamics that shift."""
    under = at(run, risk)
    margins = {"calibrated": calibrated(under, "calibrated")}
    return {"margins": margins, "rows": measure(under, ["no guardrail", "calibrated", ONLINE], factors, arguments)}


def measure(run: Run, names: list[str], factors: dict[str, Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return for each method and split how many episodes reached the goal, and how many broke a limit."""
    kwargs = {"factors": factors} if factors else None
    protocol = PROTOCOLS[PROTOCOL].customise(episodes=arguments.episodes, env_kwargs=kwargs)
    methods = dict(run.recipe.methods)
    base = methods["calibrated"]
    assert isinstance(base, PlanMethod)
    methods[ONLINE] = base.model_copy(update={"recalibrate": 0.5})
    session = Session(run)
    agents = {name: partial(session.build, methods[name]) for name in names}
    results = evaluate(protocol, agents, record=0, progress=progress())
    return [
        {
            "method": row.method,
            "split": row.split,
            "n": len(row.episodes),
            "reached": sum(episode.success for episode in row.episodes),
            "broken": sum(episode.violated for episode in row.episodes),
            "safely": sum(episode.success and not episode.violated for episode in row.episodes),
            "ms": None if row.latency is None else row.latency.p50_ms,
        }
        for row in results.rows
    ]


def pooled(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Pool the results of all seeds, for each split and over all splits."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for one in seeds:
        for row in one["rows"]:
            for split in (row["split"], "all"):
                into = rows.setdefault((row["method"], split), {"n": 0, "reached": 0, "broken": 0, "seeds": {}})
                mine = into["seeds"].setdefault(str(one["seed"]), {"n": 0, "reached": 0, "broken": 0})
                for key in ("n", "reached", "broken"):
                    into[key] += row[key]
                    mine[key] += row[key]
    return {
        "margins": [one["margins"] for one in seeds],
        "rows": [{"method": method, "split": split, **row, **rates(row)} for (method, split), row in rows.items()],
    }


def rates(row: dict[str, Any]) -> dict[str, Any]:
    """Return shares with their intervals."""
    return {f"{key} rate": [row[key] / row["n"], *wilson_interval(row[key], row["n"])] for key in ("reached", "broken")}


def show(part: str, values: dict[str, Any]) -> None:
    """Print a table."""
    for title, one in values.items():
        rows = [
            [row["method"], row["split"], str(row["n"]), said(row["reached rate"]), said(row["broken rate"])]
            for row in one["rows"]
        ]
        print_table(f"{part}: {title}", ["method", "split", "n", "goal reached", "limit broken"], rows)


def said(rate: list[float]) -> str:
    """Return a share with its interval, in per cent."""
    middle, low, high = (100 * value for value in rate)
    return f"{middle:.1f}% [{low:.1f}, {high:.1f}]"


if __name__ == "__main__":
    main()
