"""Shared code of the weaving benchmarks: options, stored results of each seed, and intervals."""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from worldloom.core.files import read_json, write_json
from worldloom.core.hardware import describe_hardware, set_threads
from worldloom.data import EpisodeDataset


def parser_of(doc: str | None, results: Path | None, runs: Path | None = None) -> argparse.ArgumentParser:
    """Return a parser with the options that all of these benchmarks have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=results, help="the folder for results")
    if runs is not None:
        parser.add_argument("--runs", type=Path, default=runs)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--anew", action="store_true", help="measure everything, and ignore stored results")
    parser.add_argument("--quick", action="store_true", help="try the script with minimal settings, and store nothing")
    return parser


def run(arguments: argparse.Namespace, quick: Mapping[str, Any], report: Callable[[argparse.Namespace], None]) -> None:
    """Run `report` with the given options; with `--quick`, with these `quick` values and in a temporary folder."""
    set_threads(arguments.threads)
    if not arguments.quick:
        report(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        elsewhere = {"results": Path(folder) / "results.json", "runs": Path(folder) / "runs"}
        report(argparse.Namespace(**{**vars(arguments), **elsewhere, **quick}))


class Kept:
    """The results of one seed by name, stored in a file; with different settings they are measured again."""

    def __init__(self, arguments: argparse.Namespace, seed: int, settings: Mapping[str, Any]) -> None:
        self._path = arguments.results.with_suffix("") / f"seed-{seed}.json"
        self._about = {"seed": seed, "settings": json.loads(json.dumps(settings))}  # as they are read back
        kept = read_json(self._path) if self._path.is_file() and not arguments.anew else {}
        self.found: dict[str, Any] = kept["found"] if kept.get("settings") == self._about["settings"] else {}

    def measured(self, name: str, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the stored result of this name, or measure and store it."""
        if name not in self.found:
            self.found[name] = {**measure(), "hardware": describe_hardware()}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, {**self._about, "found": self.found})
        found: dict[str, Any] = self.found[name]
        return found


def as_one(logs: Sequence[EpisodeDataset], path: Path) -> EpisodeDataset:
    """Return the episodes of several logs as one dataset; an incomplete dataset is created again."""
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
    """Return the command that reproduces a table."""
    parts = [f"python benchmarks/{Path(script).name} --seeds", *map(str, arguments.seeds)]
    return " ".join([*parts, "--threads", str(arguments.threads), *more])


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean with Student's interval at 95%; one value has no interval."""
    mean = float(np.mean(values))
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)) if len(values) > 1 else None
    return {"mean": mean, "low": None if half is None else mean - half, "high": None if half is None else mean + half}
