"""Interrupts every command that writes: SIGKILL at random times, two at once, a full disk and a read-only disk.

    python benchmarks/kills.py [--kills 5] [--only collect train ...] [--seed 0] [--no-disks]

Each case is a command with a small job. A run without interruption gives the expected result. Then the command is
killed `--kills` times at random moments, on the same folder, and run once more to its end; after each kill, a check of
the folder may report an error of one line but no traceback. Then two processes run the command on one folder at the
same time: at least one must succeed. Then the command writes to a disk that is read-only, and to one that is full or
becomes full: these must be errors of one line, and after the disk has space again the command must succeed. In all
four, the result must equal the expected one. The disks need root, to mount a file system in memory. Prints one JSON
line per case.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldloom.core.files import read_json
from worldloom.data import EpisodeDataset

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures" / "formats_v1"
SMALL = [
    "model.encoder.channels=[4, 4]", "model.encoder.hidden=8", "model.latent_dim=4", "model.predictor.hidden=[8]",
    "training.batch=8", "training.horizon=4", "training.threads=1", "training.validation_windows=8",
    "training.accelerator=cpu", "training.validation_share=0.2", "inverse.hidden=[8]", "inverse.steps=4",
    "training.steps=200", "training.checkpoint_every=20", "training.validate_every=100", "distance.hidden=[8]",
    "distance.steps=4", "reactive.hidden=[8]", "reactive.steps=4", "reactive.problems=8", "cloning.hidden=[8]",
    "cloning.steps=4", "cloning.latent_dim=4",
    'cloning.encoder={"name": "patch-conv", "channels": [4, 4], "hidden": 8}',
]  # fmt: skip
CONSORTIUM = {
    "consortium": "kills", "owners": {"north": {"episodes": 4}, "east": {"episodes": 4}}, "pilot": "north",
    "rounds": 2, "inner_steps": 2, "own_steps": 2, "align_steps": 1,
    "overrides": [*SMALL[:12], "collection.num_envs=4", "collection.steps=30"],
    "rules": {"quality": {"max_worse": 100.0}, "codec": {"name": "int8"}},
}  # fmt: skip
RULES = "rules: 1\nowner: the lab\nrisk: 0.4\nguardrails:\n  gently: {name: magnitude, limit: 0.8}\n"
# Of the library beside this file, because commands run in other folders.
ENVIRONMENT = {
    "PYTHONPATH": str(Path(__file__).parents[1] / "src"),
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
CLI = [sys.executable, "-m", "worldloom"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command on a folder, a check of the folder after a kill, and its result without times.

    `again` are the words that the second and later runs add, such as --resume. A command with `appends` adds to its
    result at each run, so only the check is compared.
    """

    name: str
    words: Callable[[Path], list[str]]
    check: Callable[[Path], list[str]]
    result: Callable[[Path], Any]
    inputs: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
    appends: bool = False


def sets(values: list[str]) -> list[str]:
    return [word for value in values for word in ("--set", value)]


def rows(folder: Path) -> Any:
    """Return the rows of the evaluations of a run, without times."""
    found = [read_json(path) for path in sorted(folder.glob("run/evaluation/*/results.json"))]
    return [
        [{key: row.get(key) for key in ("method", "split", "n", "successes")} for row in each["rows"]] for each in found
    ]


def tensors(pattern: str) -> Callable[[Path], Any]:
    """Return a function that names the tensor files of a folder: their names contain digests of their content."""
    return lambda folder: sorted(path.name for path in folder.glob(pattern))


def cases() -> Iterator[Case]:
    """Yield one case for each command that writes."""
    fingerprint = lambda name: lambda folder: EpisodeDataset.open(folder / name).fingerprint()  # noqa: E731
    few = ["--episodes", "2"]
    yield Case(
        name="collect",
        words=lambda folder: [
            "collect", "two-room", "--out", f"{folder}/data", "--episodes", "60", "--steps", "40", "--num-envs", "4"
        ],
        check=lambda folder: ["data", "validate", f"{folder}/data"],
        result=fingerprint("data"),
    )  # fmt: skip
    yield Case(
        name="data convert",
        words=lambda folder: ["data", "convert", f"{folder}/dataset", f"{folder}/out", "--to", "folder"],
        check=lambda folder: ["data", "convert", f"{folder}/out", f"{folder}/check"],
        result=lambda folder: sorted(path.name for path in folder.glob("out/*")),
        inputs=("dataset",),
    )
    yield Case(
        name="train",
        words=lambda folder: [
            "train", f"{folder}/dataset", "--recipe", "two-room", "--out", f"{folder}/new", *sets(SMALL)
        ],
        check=lambda folder: ["runs", "show", f"{folder}/new"],
        result=tensors("new/*/*.safetensors"),
        inputs=("dataset",),
        again=("--resume",),
    )  # fmt: skip
    yield Case(
        name="calibrate",
        words=lambda folder: [
            "calibrate", f"{folder}/run", "--rules", f"{folder}/rules.yaml", "--unsigned", "--method", "CEM, latent L2",
            "--episodes", "20", "--threads", "1"
        ],
        check=lambda folder: ["runs", "show", f"{folder}/run"],
        result=lambda folder: [read_json(path)["values"] for path in sorted(folder.glob("run/margins/*.json"))],
        inputs=("run", "dataset"),
    )  # fmt: skip
    yield Case(
        name="evaluate",
        words=lambda folder: ["evaluate", f"{folder}/run", *few, "--budget", "10", "--threads", "1"],
        check=lambda folder: ["runs", "show", f"{folder}/run"],
        result=rows,
        inputs=("run", "dataset"),
    )
    yield Case(
        name="plan --audit",
        words=lambda folder: ["plan", f"{folder}/run", "--audit", f"{folder}/log", "--threads", "1"],
        check=lambda folder: ["audit", "verify", f"{folder}/log"],
        result=lambda folder: None,
        inputs=("run",),
        appends=True,
    )
    yield Case(
        name="memory remember",
        words=lambda folder: ["memory", "remember", f"{folder}/new", f"{folder}/run", f"{folder}/dataset"],
        check=lambda folder: ["memory", "inspect", f"{folder}/new"],
        result=lambda folder: None,
        inputs=("run", "dataset"),
        appends=True,
    )
    yield Case(
        name="rules sign",
        words=lambda folder: ["rules", "sign", f"{folder}/rules.yaml", "--key", f"{folder}/key.pem"],
        check=lambda folder: ["rules", "show", f"{folder}/rules.yaml", "--unsigned"],
        result=tensors("rules.yaml.sig"),
    )
    yield Case(
        name="weave simulate",
        words=lambda folder: [
            "weave", "simulate", f"{folder}/consortium.json", "--out", f"{folder}/made", "--threads", "1"
        ],
        check=lambda folder: [
            "weave", "ledger", "verify", f"{folder}/made/rounds", "--constitution", f"{folder}/made/constitution.yaml"
        ],
        result=lambda folder: len(list(folder.glob("made/rounds/bases/*.json"))),
    )  # fmt: skip


def prepare(case: Case, folder: Path) -> None:
    """Fill a folder with what the command reads."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in case.inputs:
        shutil.copytree(FIXTURES / name, folder / name, dirs_exist_ok=True)
    (folder / "rules.yaml").write_text(RULES)
    (folder / "consortium.json").write_text(json.dumps(CONSORTIUM))
    if not (folder / "key.pem").exists():
        run(["rules", "key", f"{folder}/key.pem"], folder)


def run(words: list[str], folder: Path) -> tuple[int, str]:
    """Run a command in a folder to its end; return the exit code and the fault of an unfriendly end, or ""."""
    done = subprocess.run([*CLI, *words], capture_output=True, text=True, env=ENVIRONMENT, timeout=600, cwd=folder)
    return done.returncode, fault_of(done.returncode, done.stderr)


def fault_of(code: int, said: str) -> str:
    if code < 0 or "Traceback" in said:
        return f"exit {code}: {said.strip().splitlines()[-1] if said.strip() else ''}"
    return "" if code == 0 or "error:" in said else f"exit {code} without an error message"


def killed(case: Case, folder: Path, kills: int, generator: random.Random, longest: float) -> list[str]:
    """Kill the command at random moments, check after each, and let it finish."""
    faults = []
    prepare(case, folder)
    words = case.words(folder)
    begun = False
    for _ in range(kills):
        process = subprocess.Popen(
            [*CLI, *words, *(case.again if begun else ())],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
            cwd=folder,
        )  # fmt: skip
        time.sleep(generator.uniform(0.3, longest))
        process.kill()
        _, said = process.communicate()
        if process.returncode >= 0 and (fault := fault_of(process.returncode, said)):
            faults.append(fault)
        _, fault = run(case.check(folder), folder)
        faults += [f"check: {fault}"] if fault else []
        shutil.rmtree(folder / "check", ignore_errors=True)
        begun = begun or (folder / "new" / "config.json").exists()
    code, fault = run([*words, *(case.again if begun else ())], folder)
    return [*faults, *([fault] if fault else []), *([f"exit {code} at the end"] if code else [])]


def twice(case: Case, folder: Path) -> list[str]:
    """Run the command twice at the same time; at least one must succeed."""
    prepare(case, folder)
    both = [
        subprocess.Popen(
            [*CLI, *case.words(folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
            cwd=folder,
        )
        for _ in range(2)
    ]
    said = [process.communicate()[1] for process in both]
    faults = [fault_of(process.returncode, text) for process, text in zip(both, said, strict=True)]
    return [fault for fault in faults if fault] + ([] if any(p.returncode == 0 for p in both) else ["both failed"])


@contextmanager
def disk(path: Path) -> Iterator[Callable[[str], None]]:
    """Mount a file system in memory; the yielded function remounts it with options."""
    path.mkdir(parents=True)

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)

    mount("size=1g")
    try:
        yield lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", path], check=True)


def on_disks(case: Case, folder: Path) -> list[str]:
    """Run the command on a read-only disk, on a full disk, and again when there is space."""
    faults = []
    with disk(folder) as remount:
        prepare(case, folder)
        remount("ro")
        code, fault = run(case.words(folder), folder)
        faults += [f"read-only disk: {fault or 'no error'}"] if fault or not code else []
        remount("rw,size=1g")
        for pages in (0, 16):  # no space at all, and space for the beginning of the work
            remount(f"size={shutil.disk_usage(folder).used + 4096 * pages}")
            code, fault = run(case.words(folder), folder)
            if fault or (not code and not pages):
                faults.append(f"full disk, {pages} pages left: {fault or 'no error'}")
        remount("size=1g")
        begun = (folder / "new" / "config.json").exists()
        code, fault = run([*case.words(folder), *(case.again if begun else ())], folder)
        faults += [f"after the full disk: exit {code} {fault}"] if code else []
        faults += compare(case, folder, EXPECTED[case.name])
    return faults


EXPECTED: dict[str, Any] = {}


def compare(case: Case, folder: Path, expected: Any) -> list[str]:
    """Compare the result in a folder, and run the check."""
    code, fault = run(case.check(folder), folder)
    faults = [f"check at the end: exit {code} {fault}"] if code else []
    if not case.appends and (found := case.result(folder)) != expected:
        faults.append(f"result {str(found)[:200]}; expected {str(expected)[:200]}")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disks", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        for case in cases():
            if arguments.only and case.name not in arguments.only:
                continue
            work = Path(directory) / case.name.replace(" ", "-")
            prepare(case, work / "whole")
            start = time.monotonic()
            code, fault = run(case.words(work / "whole"), work / "whole")
            if code:
                sys.exit(f"{case.name}: the command fails without interruption: exit {code} {fault}")
            seconds = time.monotonic() - start
            expected = EXPECTED[case.name] = case.result(work / "whole")
            generator = random.Random(f"{arguments.seed} {case.name}")
            faults = killed(case, work / "killed", arguments.kills, generator, seconds)
            faults += compare(case, work / "killed", expected)
            faults += [f"two at once: {fault}" for fault in twice(case, work / "twice")]
            faults += [f"two at once: {fault}" for fault in compare(case, work / "twice", expected)]
            if arguments.disks:
                faults += on_disks(case, work / "disk")
            print(json.dumps({"command": case.name, "kills": arguments.kills, "seconds": round(seconds, 1),
                              "faults": faults}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
