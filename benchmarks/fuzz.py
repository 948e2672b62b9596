"""Damages each kind of file that worldloom reads, runs commands on the damaged file, and counts how they end.

    python benchmarks/fuzz.py [--seconds 600] [--only run dataset ...] [--seed 0] [--keep FOLDER]

A target is a folder and the commands that read it. Each case copies the folder, damages one of its files (bits, bytes,
lengths, numbers, JSON values), and runs the commands in a process of its own, with a limit of memory and time. Allowed
ends: success, or an error of one line. A traceback, a signal, a timeout and an error of several lines are faults. The
last line of a target gives its counts; `--keep` keeps the damaged folder of each kind of fault. The same seed gives the
same cases.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

from worldloom.cli.main import main as worldloom

# Imported before the cases are forked, which saves seconds for each. Lance is not: it cannot be used after a fork.
for module in ("torch", "gymnasium", "h5py", "av", "PIL.Image", "pyarrow.parquet", "safetensors.torch", "pydantic"):
    importlib.import_module(module)

VERSIONS = Path(__file__).parents[1] / "tests" / "fixtures"
FIXTURES, FIXTURES_2, FIXTURES_3 = (VERSIONS / f"formats_v{number}" for number in (1, 2, 3))
MEMORY, SECONDS = 4 * 2**30, 60  # limits of one case
SUFFIXES = {"robomimic": ".hdf5", "swm-hdf5": ".h5", "swm-lance": ".lance"}
EXOTIC: list[Any] = [
    None, True, False, 0, -1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x" * 5000, "..",
    "../../evil", "/etc/passwd", "\x1b[31mred\x1b[0m", "\u2028", "1:30", [], {}, [[]], [1] * 1000, {"a": {"b": {}}},
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Target:
    """Files to damage, and the commands that read them; FOLDER in a command is the damaged copy."""

    name: str
    source: Path
    commands: tuple[str, ...]
    damaged: str = "**/*"


def targets(work: Path) -> Iterator[Target]:
    """Yield the targets; foreign formats are written to `work` first."""
    rules = "FOLDER/rules/rules.yaml"
    yield Target(
        name="dataset", source=FIXTURES_2, damaged="dataset/**/*",
        commands=(
            "data validate FOLDER/dataset", "data inspect FOLDER/dataset", "data convert FOLDER/dataset FOLDER/c"),
    )  # fmt: skip
    yield Target(
        name="run", source=FIXTURES, damaged="run/**/*",
        commands=(
            "runs show FOLDER/run", "plan FOLDER/run --protocol two-room@1",
            "evaluate FOLDER/run --protocol two-room@1 --episodes 1 --budget 2 --method random --split same-room",
        ),
    )  # fmt: skip
    yield Target(
        name="memory", source=FIXTURES, damaged="memory/**/*",
        commands=("memory inspect FOLDER/memory", "memory export FOLDER/memory FOLDER/exported.jsonl"),
    )  # fmt: skip
    yield Target(
        name="audit log", source=FIXTURES, damaged="audit-log/**/*",
        commands=(
            "audit verify FOLDER/audit-log", "audit show FOLDER/audit-log --entry 1",
            "audit replay FOLDER/audit-log --entry 2 --run FOLDER/run",
        ),
    )  # fmt: skip
    key = json.loads((FIXTURES_2 / "rules/rules.yaml.sig").read_text())["key"]
    yield Target(
        name="rule set", source=FIXTURES_2, damaged="rules/*",
        commands=(f"rules show {rules} --trust {key}", f"rules show {rules} --unsigned"),
    )  # fmt: skip
    rounds, signed = "FOLDER/rounds", "FOLDER/rounds --constitution FOLDER/constitution.yaml"
    recompute = f"weave recompute {signed} --into FOLDER/computed"
    ledger = (f"weave ledger verify {signed}", f"weave ledger show {rounds}", recompute,
              f"weave report {signed} --out FOLDER/report.html")  # fmt: skip
    yield Target(name="ledger", source=FIXTURES_3 / "plain", commands=ledger)
    yield Target(name="secure ledger", source=FIXTURES_3 / "secure", commands=ledger)
    yield Target(name="message", source=FIXTURES_3 / "plain", damaged="**/*.msg", commands=(recompute,))
    yield Target(name="constitution", source=FIXTURES_3 / "plain", damaged="*.yaml*", commands=ledger[:2])
    for format in ("lerobot-v21", "lerobot-v3", "minari", "robomimic", "swm-hdf5", "swm-lance", "folder"):
        source = work / format / "source"
        data = f"FOLDER/data{SUFFIXES.get(format, '')}"
        source.mkdir(parents=True)
        end = end_of([f"data convert {FIXTURES / 'dataset'} {data.replace('FOLDER', str(source))} --to {format}"])
        if end != "ok":
            sys.exit(f"the dataset could not be converted to {format}: {end}")
        yield Target(name=format, source=source, commands=(f"data convert {data} FOLDER/own",))


def command(line: str) -> tuple[int, str]:
    """Run a command in this process; return its exit code and what it wrote to standard error."""
    sys.argv = ["worldloom", *line.split()]
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            worldloom()
        except SystemExit as end:
            return int(end.code or 0), said.getvalue()
    return 0, said.getvalue()


def damage(path: Path, generator: random.Random) -> str:
    """Damage a file in one of several ways; return a description."""
    content = bytearray(path.read_bytes())
    ways: list[Callable[[bytearray, random.Random], str]] = [flip, cut, insert, repeat, fill]
    if path.suffix in (".json", ".jsonl", ".yaml", ".sig", ".msg", ".csv"):
        ways = [flip, cut, number, swap_json, swap_json, swap_json]
    way = generator.choice(ways)
    told = way(content, generator)
    path.write_bytes(content)
    return f"{way.__name__} {told}"


def flip(content: bytearray, generator: random.Random) -> str:
    """Change one to four bytes."""
    places = [generator.randrange(len(content)) for _ in range(generator.randint(1, 4))] if content else []
    for place in places:
        content[place] = generator.choice([content[place] ^ (1 << generator.randrange(8)), 0, 255])
    return f"at {places}"


def cut(content: bytearray, generator: random.Random) -> str:
    """Remove the end."""
    length = generator.randrange(len(content) + 1)
    del content[length:]
    return f"to {length}"


def insert(content: bytearray, generator: random.Random) -> str:
    """Insert random bytes."""
    place = generator.randrange(len(content) + 1)
    content[place:place] = generator.randbytes(generator.choice([1, 7, 64]))
    return f"at {place}"


def repeat(content: bytearray, generator: random.Random) -> str:
    """Repeat a part."""
    place = generator.randrange(len(content) + 1)
    content[place:place] = content[place : place + 100]
    return f"at {place}"


def fill(content: bytearray, generator: random.Random) -> str:
    """Overwrite a part with zeros, as after a crash of the machine."""
    place, length = generator.randrange(len(content) + 1), generator.choice([8, 512, 4096])
    content[place : place + length] = bytes(len(content[place : place + length]))
    return f"{length} from {place}"


def number(content: bytearray, generator: random.Random) -> str:
    """Replace a number in a text."""
    found = list(re.finditer(rb"-?\d+(\.\d+)?", content))
    if not found:
        return "nothing"
    match = generator.choice(found)
    new = generator.choice(
        [b"-1", b"1e999", b"9" * 400, b"NaN", b"1:30", b"010", b"0x10", b'"7"', b"true", b"99999999"]
    )
    content[match.start() : match.end()] = new
    return f"{match[0]!r} by {new[:20]!r}"


def swap_json(content: bytearray, generator: random.Random) -> str:
    """Remove, replace or repeat a value of a JSON document or of one line of JSON."""
    lines = content.decode("utf-8", "replace").splitlines()
    place = generator.randrange(len(lines)) if lines else 0
    single = False
    try:
        value = json.loads(content)
        single = True
    except ValueError:
        try:
            value = json.loads(lines[place])
        except (ValueError, IndexError):
            return number(content, generator)
    told = "the root"
    spots = list(containers(value))
    if spots:
        holder = generator.choice(spots)
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        name = generator.choice(keys) if keys else None
        if name is None:
            told = "nothing"
        elif generator.random() < 0.3:
            del holder[name]
            told = f"without {name!r}"
        else:
            holder[name] = generator.choice(EXOTIC)
            told = f"{name!r} = {str(holder[name])[:30]!r}"
    else:
        value = generator.choice(EXOTIC)
    text = json.dumps(value)
    content[:] = (text if single else "\n".join([*lines[:place], text, *lines[place + 1 :]]) + "\n").encode()
    return told


def containers(value: Any) -> Iterator[Any]:
    """Yield every object and array in a JSON value."""
    if isinstance(value, dict | list):
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from containers(part)


def limited() -> None:
    """Limit the memory and time of this process."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(SECONDS)


def end_of(commands: list[str]) -> str:
    """Run commands in a child process; return "ok", "error", or a description of the fault."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        limited()
        ends = []
        for line in commands:
            try:
                code, said = command(line)
                lines = [part for part in said.splitlines() if part.startswith("error:")]
                if code and len(said.splitlines()) > 1 and said.count("\n", said.find("error:")) > 1:
                    told = re.sub(r"\S*/case/\S*", "FILE", " ".join(said.split()))
                    ends.append(f"several lines: {told[:60]}")
                ends.append("error" if lines or code else "ok")
            except BaseException as error:
                frames = [f for f in traceback.extract_tb(error.__traceback__) if "worldloom" in f.filename]
                at = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
                ends.append(f"traceback: {type(error).__name__} at {at}")
        faults = [end for end in ends if end not in ("ok", "error")]
        os.write(writer, (faults[0] if faults else "error" if "error" in ends else "ok").encode()[:4000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return "timeout" if number == signal.SIGALRM else f"signal: {signal.Signals(number).name}"
    return told or f"exit {os.waitstatus_to_exitcode(status)} without a word"


def copy_private(source: Path, folder: Path) -> None:
    """Copy a folder; only this user may use the copy, as worldloom demands of memories."""
    shutil.copytree(source, folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(path.stat().st_mode & 0o700)


def fuzz(target: Target, seconds: float, seed: int, work: Path, keep: Path | None) -> Counter[str]:
    """Run cases for a number of seconds; return the counts of their ends."""
    found: Counter[str] = Counter()
    copy_private(target.source, work / "case")
    if (end := end_of([line.replace("FOLDER", str(work / "case")) for line in target.commands])) != "ok":
        sys.exit(f"{target.name}: the commands fail on files without damage: {end}")
    shutil.rmtree(work / "case")
    until, case = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        generator = random.Random(f"{seed} {target.name} {case}")
        folder = work / "case"
        copy_private(target.source, folder)
        files = sorted(path for path in folder.glob(target.damaged) if path.is_file())
        chosen = generator.choice(files)
        told = damage(chosen, generator)
        end = end_of([line.replace("FOLDER", str(folder)) for line in target.commands])
        found[end] += 1
        if end not in ("ok", "error") and found[end] == 1:
            print(f"{target.name}, case {case}: {chosen.relative_to(folder)}, {told}: {end}", flush=True)
            if keep is not None:
                shutil.copytree(folder, keep / f"{target.name}-{case}")
        shutil.rmtree(folder)
        case += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="for each target")
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        for target in targets(work):
            if arguments.only and target.name not in arguments.only:
                continue
            found = fuzz(target, arguments.seconds, arguments.seed, work, arguments.keep)
            faults = {end: count for end, count in found.items() if end not in ("ok", "error")}
            print(json.dumps({"target": target.name, "cases": found.total(), "ok": found["ok"],
                              "error": found["error"], "faults": faults}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
