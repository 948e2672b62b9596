"""What the benchmarks of weaving share: their options, what each seed gave, kept beside the table, and intervals."""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from worldloom.cli.options import set_threads
from worldloom.core.files import read_json, write_json
from worldloom.core.hardware import describe_hardware
from worldloom.data import EpisodeDataset


def parser_of(doc: str | None, results: Path | None, runs: Path | None = None) -> argparse.ArgumentParser:
    """Return a parser of what all of them are asked."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=results, help="where to write; another place for trials")
    if runs is not None:
        parser.add_argument("--runs", type=Path, default=runs)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--anew", action="store_true", help="take up nothing that was measured before")
    parser.add_argument("--quick", action="store_true", help="try the script on almost nothing, and keep nothing")
    return parser


def run(arguments: argparse.Namespace, quick: Mapping[str, Any], report: Callable[[argparse.Namespace], None]) -> None:
    """Report what is asked for; with `--quick` with these other values, in a folder that is then thrown away."""
    set_threads(arguments.threads)
    if not arguments.quick:
        report(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        elsewhere = {"results": Path(folder) / "results.json", "runs": Path(folder) / "runs"}
        report(argparse.Namespace(**{**vars(arguments), **elsewhere, **quick}))


class Kept:
    """What one seed gave under some settings, by name, in a file; under other settings it is measured anew."""

    def __init__(self, arguments: argparse.Namespace, seed: int, settings: Mapping[str, Any]) -> None:
        self._path = arguments.results.with_suffix("") / f"seed-{seed}.json"
        self._about = {"seed": seed, "settings": json.loads(json.dumps(settings))}  # as they are read back
        kept = read_json(self._path) if self._path.is_file() and not arguments.anew else {}
        self.found: dict[str, Any] = kept["found"] if kept.get("settings") == self._about["settings"] else {}

    def measured(self, name: str, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return what is kept under a name, or measure it, and keep it."""
        if name not in self.found:
            self.found[name] = {**measure(), "hardware": describe_hardware()}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, {**self._about, "found": self.found})
        found: dict[str, Any] = self.found[name]
        return found


def as_one(logs: Sequence[EpisodeDataset], path: Path) -> EpisodeDataset:
    """Return the episodes of several logs as one dataset; one that was left half is made anew."""
    done = path.with_suffix(".done")
    if not done.is_file() or len(EpisodeDataset.open(path)) != sum(len(one) for one in logs):
        done.unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
        dataset = EpisodeDataset.create(path, logs[0].spec)
        for one in logs:
            dataset.append(one.episode(index) for index in range(len(one)))
        done.touch()
    return EpisodeDataset.open(path)


def command_of(script: str, arguments: argparse.Namespace, *more: str) -> str:
    """Return the command that gives a table again."""
    parts = [f"python benchmarks/{Path(script).name} --seeds", *map(str, arguments.seeds)]
    return " ".join([*parts, "--threads", str(arguments.threads), *more])


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean with Student's interval at 95%; of one value there is none."""
    mean = float(np.mean(values))
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)) if len(values) > 1 else None
    return {"mean": mean, "low": None if half is None else mean - half, "high": None if half is None else mean + half}
