"""Digests of results: compared between two commits, they show whether a change of the code changed a result.

    python benchmarks/digests.py --out before.json      # takes about 5 minutes of one core
    python benchmarks/digests.py --out after.json       # on another commit; same machine, same environment
    python benchmarks/digests.py compare before.json after.json

An item is a set of named parts. A part is a tensor, or the numbers at one place of a JSON file. `compare` lists the
items that differ, with their parts, and the items that differ only in names, because tensors, files, keys and words may
be renamed. Its exit code is 1 if a result differs or is missing, or if a stage failed.

The script uses only the top-level Python API and the command line, so it also runs on commits with other module paths.
`SPELLINGS` lists names that have changed.

Values that differ between two runs of one commit are excluded: times and speeds, random keys and signatures, masked
messages, privacy noise (from the operating system's randomness), and the order in which files are written.
"""

import argparse
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import cache
from pathlib import Path
from typing import Any

# One thread and no GPU, because the last bit of a sum depends on how it is split. PyTorch reads this when it is loaded.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
os.environ |= {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}  # --help is searched for names

import numpy as np
import safetensors.torch
import torch
from PIL import Image

import worldloom as wl

Parts = dict[str, list[str]]  # name -> values; several where a name without its digest is not unique
Item = tuple[str, Parts]

# Spellings of a name, in the order in which they are tried. For commands and options, the first one in --help is used;
# for keys in recipes and YAML files, the next one is tried if a key is unknown.
SPELLINGS: dict[str, tuple[str, ...]] = {
    "policy": ("rules", "rule-set", "ruleset", "rule_set"),
    "--keep": ("--rules", "--rule-set"),
    "rules": ("constitution", "terms"),
    "settle": ("fine_tune",),
}

# Keys that are not results: times and speeds, the machine, versions, paths, sizes of files (which contain names), and
# settings that are stored again with their results.
NOT_RESULTS = re.compile(
    r"seconds|per_second|^time$|^time/|latency|hardware|^threads$|provenance|^worldloom$|version|^format|bytes|^path$|"
    r"^key$|signature|^config$|^methods?$|^layers$|^rules$|^protocol|^benchmark|^environment$"
)
NOT_NAMES = re.compile(r"[0-9a-f]{16,}(/\d+)?|(?<![\w/])/(?:[^\s/]+/)+")  # digests, and folders of this machine

TINY = [
    "collection.episodes=24", "collection.steps=40", "collection.num_envs=8", "training.steps=50",
    "training.batch=32", "training.threads=1", "training.accelerator=cpu", "training.validation_share=0.2",
    "training.validation_windows=16", "training.checkpoint_every=25", "training.validate_every=25",
    "training.log_every=10", "inverse.steps=20", "distance.steps=20", "reactive.steps=20", "reactive.problems=64",
    "cloning.steps=20",
]  # fmt: skip
SEARCHES: dict[str, dict[str, Any]] = {
    "landmarks": {"name": "landmarks", "exploring": {"name": "cem", "samples": 16}},
    "hierarchy": {"name": "hierarchy", "solver": {"name": "cem", "samples": 32}, "coarse_horizon": 4},
    "iCEM": {"name": "plan", "solver": {"name": "icem"}, "propose": True},
    "MPPI": {"name": "plan", "solver": {"name": "mppi"}, "metric": "distance", "noise": 0.5},
    "Adam": {"name": "plan", "solver": {"name": "adam"}, "replan": 2},
    "random shooting": {"name": "plan", "solver": {"name": "random-shooting"}, "last_weight": 0.5},
}
COARSE = 'hierarchy=[{"stride": 2, "steps": 20}]'


def short(*pieces: bytes | str) -> str:
    """Return a digest of 16 characters."""
    content = b"\0".join(piece.encode() if isinstance(piece, str) else piece for piece in pieces)
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def parts_of(found: Iterator[tuple[str, str]]) -> Parts:
    """Collect parts by their names, without random values and values derived from the content."""
    parts: defaultdict[str, list[str]] = defaultdict(list)
    for name, value in found:
        parts[NOT_NAMES.sub("*", name)].append(value)
    return {name: sorted(values) for name, values in parts.items()}


def array(value: torch.Tensor | np.ndarray) -> str:
    """Return a digest and the norm; if only the digest differs, rounding may be the cause."""
    tensor = torch.as_tensor(value).detach().contiguous()
    content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{short(str((tuple(tensor.shape), tensor.dtype)), content)} norm {tensor.double().norm().item():.6g}"


def walk(value: Any, name: str = "", place: str = "") -> Iterator[tuple[str, str]]:
    """Yield every array, every number or list of numbers, and every text as a name with the value "text".

    The name of a value contains its positions in lists but not its keys, because keys may have been renamed.
    """
    if isinstance(value, np.ndarray | torch.Tensor):
        yield name, array(value)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            if not NOT_RESULTS.search(str(key)):
                yield from walk(part, f"{name}.{key}", place)
    elif isinstance(value, list | tuple) and not numeric(value):
        for index, part in enumerate(value):
            yield from walk(part, f"{name}[{index}]", f"{place}[{index}]")
    elif isinstance(value, str) and (len(value) < 100 or " " in value):
        yield f"{name}={value[:100]}", "text"
    elif value not in (None, [], ()):
        text = json.dumps(value)
        yield name, f"{short(place, text)} {text[:40]}"


def numeric(value: Any) -> bool:
    """Whether a value is a number or a nested list of numbers."""
    if isinstance(value, list | tuple):
        return all(numeric(part) for part in value)
    return value is None or isinstance(value, int | float)


def values(value: Any) -> Parts:
    """Return the parts of a JSON value."""
    return parts_of(walk(value))


def contents(folder: Path, where: str = ".") -> Parts:
    """Return the tensors of safetensors files below a folder, and the numbers of JSON files."""

    def found() -> Iterator[tuple[str, str]]:
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            if not path.is_file() or not re.search(where, name):
                continue
            if path.suffix == ".safetensors":
                for key, tensor in safetensors.torch.load_file(path).items():
                    yield f"{name}:{key}", array(tensor)
            elif path.suffix == ".json":
                yield from walk(json.loads(path.read_text()), f"{name}:")
            elif path.suffix == ".jsonl":
                yield from walk([json.loads(line) for line in path.read_text().splitlines()], f"{name}:")

    return parts_of(found())


def episodes(path: Path) -> Parts:
    """Return all observations and actions in the episodes of a dataset."""
    dataset = wl.EpisodeDataset.open(path)
    fields = [vars(dataset.episode(index)) for index in range(len(dataset))]
    return values([{name: part for name, part in each.items() if name != "metadata"} for each in fields])


class Failed(Exception):
    """A command that failed."""


@cache
def help_of(*words: str) -> str:
    """Return the help of a command."""
    command = [sys.executable, "-m", "worldloom", *words, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def spelled(word: str, text: str) -> str:
    """Return the spelling of an option or command that is in a help text."""
    form = r"(?<![\w-]){}(?![\w-])" if word.startswith("--") else r"^\W{{1,3}}{}\s"
    known = (word, *SPELLINGS.get(word, ()))
    return next((each for each in known if re.search(form.format(re.escape(each)), text, re.MULTILINE)), word)


def cli(command: str, *arguments: str | Path) -> Any:
    """Run a command on one thread; return its output, parsed as JSON if the command supports it."""
    words: list[str] = []
    for word in command.split():
        words.append(spelled(word, help_of(*words)))
    options = help_of(*words)
    given = [spelled(str(each), options) if str(each).startswith("--") else str(each) for each in arguments]
    given += ["--threads", "1"] if spelled("--threads", options) in options else []
    given += ["--json"] if "--json" in options else []
    line = [sys.executable, "-m", "worldloom", *words, *given]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line.strip("╭╮╰╯│─ ") for line in done.stderr.splitlines()]
        raise Failed(f"worldloom {' '.join(words)}: {' '.join([line for line in said if line][-2:])}")
    return json.loads(done.stdout) if "--json" in given else done.stdout


def respelled(text: str, attempt: Callable[[str], Any]) -> Any:
    """Return the result of an attempt with a text; if a key in it is unknown, try the next spelling."""
    left = {old: list(new) for old, new in SPELLINGS.items()}
    while True:
        try:
            return attempt(text)
        except Exception as error:
            unknown = re.search(r"unknown key '(?:[^']*\.)?([^'.]+)'", str(error))
            if unknown is None or not left.get(unknown[1]):
                raise
            new, *rest = left.pop(unknown[1])
            left[new] = rest
            text = re.sub(rf"(?<![\w-]){re.escape(unknown[1])}(?![\w-])", new, text)


def with_yaml(path: Path, value: Mapping[str, Any], command: str, *arguments: str | Path) -> Any:
    """Write a YAML file, and run a command that reads it."""

    def attempt(text: str) -> Any:
        path.write_text(text)
        return cli(command, *arguments)

    return respelled(json.dumps(value), attempt)


def train(work: Path, name: str, recipe: str, settings: Sequence[str]) -> Iterator[Item]:
    """Collect and train; return the content of the dataset and of the run folder."""
    base = wl.load_recipe(recipe)
    config = respelled("\n".join((*settings, *TINY)), lambda text: base.override(text.splitlines()))
    data, run = work / name / "data", work / name / "run"
    wl.train(config, wl.collect(config, data), run)
    yield f"{name}: data", episodes(data)
    yield f"{name}: parameters", contents(run, r"^model/.*\.safetensors$")
    yield f"{name}: training state", contents(run, r"^checkpoints/.*\.safetensors$")
    yield f"{name}: heads", contents(run, r"^(?!model|checkpoint).*\.safetensors$|^heads.*json$")
    yield f"{name}: figures", contents(run, r"^(?!config|provenance|checkpoint|head|model).*json")


def opened(run: Path, log: Path) -> Any:
    """Open a run with an audit log, in the way that the commit supports."""
    ways = (
        lambda: wl.Session(wl.Run.open(run), audit=log),
        lambda: wl.Session.open(run, audit=log),
        lambda: wl.Run.open(run, audit=log),
    )
    for way in ways:
        try:
            return way()
        except (AttributeError, TypeError) as error:
            missing = error
    raise missing


def audited(name: str, log: Path, replayed: int) -> Iterator[Item]:
    """Return the entries of an audit log, the inputs of each decision, and replays of the last decisions."""
    entries = cli("audit show", log)
    plans = parts_of(
        (f"[{place}].{key}", each)
        for place, entry in enumerate(entries)
        for key, each in entry.items()
        if key in ("actions", "plan")
    )
    yield f"{name}: audit log", values(entries) | plans
    yield f"{name}: situations", contents(log, r"\.safetensors$")
    decided = [place for place, entry in enumerate(entries) if "decided" in map(str, entry.values())]
    again = [cli("audit replay", log, "--entry", str(place)) for place in decided[-replayed:]]
    cli("audit verify", log)  # fails if an entry was changed
    yield f"{name}: replayed", values(again)


# The stages


def rooms(work: Path) -> Iterator[Item]:
    """Train on pixels, with every kind of head."""
    probes = {"position": {"steps": 50}, "shadow": {"label": "position", "steps": 60}}
    methods = [f"methods.{name}={json.dumps(method)}" for name, method in SEARCHES.items()]
    yield from train(work, "two-room", "two-room", [COARSE, f"probes={json.dumps(probes)}", *methods])


def vectors(work: Path) -> Iterator[Item]:
    """Train on vectors with two frames of history, and evaluate on goals that the logging policy reached."""
    world = json.dumps({"env_id": "Pendulum-v1"})
    yield from train(work, "vector", "generic", [f"collection={world}", "training.horizon=4"])
    goals = ["--success", "env", "--goal-offset", "8", "--episodes", "2"]
    yield "vector: evaluation", values(cli("evaluate", work / "vector" / "run", *goals))


def other_parts(work: Path) -> Iterator[Item]:
    """Train the other encoder, predictor and losses, with a target network."""
    settings = [
        'model.encoder={"name": "vit", "width": 32, "depth": 1, "heads": 2}', 'model.predictor={"name": "transformer"}',
        "model.context=2", "training.target={}", 'training.losses.sigreg={"name": "sigreg"}',
        'training.losses.straight={"name": "straightening"}',
    ]  # fmt: skip
    yield from train(work, "other parts", "two-room", settings)


def plans(work: Path) -> Iterator[Item]:
    """Plan once with each method that searches, and between two pictures."""
    run, start, goal = work / "two-room" / "run", work / "start.png", work / "goal.png"
    pixels = wl.EpisodeDataset.open(work / "two-room" / "data").episode(0).pixels
    for picture, frame in ((start, pixels[0]), (goal, pixels[-1])):
        Image.fromarray(frame).save(picture)
    for method in ("tree search", "CEM, latent L2", "CEM, learned distance", *SEARCHES):
        yield f"plan: {method}", values(cli("plan", run, "--method", method))
    between = ["--start", start, "--goal", goal, "--explain", work / "why.png"]
    yield "plan: between pictures", values(cli("plan", run, "--method", "CEM, latent L2", *between))


def evaluation(work: Path) -> Iterator[Item]:
    """Evaluate every method, also those that do not plan."""
    found = cli("evaluate", work / "two-room" / "run", "--episodes", "2", "--budget", "20")
    yield "evaluation", values(found)


def guardrails(work: Path) -> Iterator[Item]:
    """Plan and evaluate under a rule set with guardrails and objectives of many kinds."""
    run, file, log = work / "two-room" / "run", work / "rules.yaml", work / "log"
    near, known = {"name": "goal", "within": 0.5}, {"name": "familiar", "times": 50}
    box, ball = {"name": "box", "low": [-20, None]}, {"name": "ball", "centre": [5, 5], "radius": 2}
    rules = {
        "owner": "the lab",
        "guardrails": {
            "apart": {"name": "keep-away", "quantity": "position", "other": "shadow", "distance": 1e-9},
            "inside": {"name": "keep-in", "quantity": "position", "region": box},
            "outside": {"name": "keep-out", "quantity": "position", "region": ball},
            "unlike": {"name": "unlike", "pictures": [str(work / "goal.png")], "distance": 0.01},
            "known": known,
            "agreed": {"name": "agreed", "runs": [str(run)], "spread": 1},
            "returnable": {"name": "returnable", "steps": 1000},
            "gently": {"name": "magnitude", "limit": 0.8},
            "smoothly": {"name": "rate", "limit": 1.2},
        },
        "objectives": {
            "there": near,
            "soon": {"name": "time", "until": near, "weight": 0.5},
            "effort": {"name": "effort", "weight": 0.1},
            "smooth": {"name": "smoothness", "weight": 0.2},
            "well known": {"name": "avoid", "rail": {**known, "times": 1}, "weight": 0.3},
            "learn": {"name": "information", "runs": [str(run)], "weight": 0.1},
        },
        "fallback": {"name": "hold"},
    }
    yield "guardrails: rule set", values(with_yaml(file, rules, "policy show", file, "--unsigned"))
    under = [run, "--keep", file, "--unsigned", "--method", "CEM, latent L2"]
    yield "guardrails: plan", values(cli("plan", *under, "--audit", log, "--explain", work / "why.png"))
    yield "guardrails: evaluation", values(cli("evaluate", *under, "--episodes", "2", "--budget", "20"))
    yield from audited("guardrails", log, replayed=1)


def pits(work: Path) -> Iterator[Item]:
    """Calibrate margins for a stated risk, and evaluate with an audit log."""
    methods = [f"methods.{name}={json.dumps(SEARCHES[name])}" for name in ("landmarks", "hierarchy")]
    probes = [f"probes.{name}.steps=50" for name in ("pit_depth", "position")]
    yield from train(work, "pits", "pits", ["policy.risk=0.3", *probes, COARSE, *methods])
    run, log, split = work / "pits" / "run", work / "pits" / "log", "in the open"
    chosen = [part for method in ("calibrated", "per candidate", "landmarks") for part in ("--method", method)]
    yield "pits: calibrated", values(cli("calibrate", run, "--split", split, "--episodes", "12", *chosen))
    yield "pits: margins", contents(run / "margins")
    with ExitStack() as stack:
        session = opened(run, log)
        stack.enter_context(session if hasattr(session, "__exit__") else closing(session))
        wl.evaluate(session, methods=["calibrated"], split=split, episodes=3, budget=16)
    (results,) = run.rglob("results.json")
    yield "pits: evaluation", values(json.loads(results.read_text()))
    yield from audited("pits", log, replayed=2)


def consortium(work: Path) -> Iterator[Item]:
    """Simulate two rounds of three owners, one with private data, and then one round of secure aggregation."""
    small = [
        "training.batch=16", "training.horizon=2", "training.threads=1", "training.validation_windows=16",
        "model.encoder.channels=[8, 8]", "model.encoder.hidden=16", "model.latent_dim=8", "model.predictor.hidden=[16]",
        "collection.steps=20", "collection.num_envs=4", "inverse.steps=20",
    ]  # fmt: skip
    turned = {"episodes": 6, "settle": "sovereign", "world": {"size": 48}, "factors": {"action_turn": 90}}
    owners = {"north": {"episodes": 8}, "east": turned, "vault": {"episodes": 6, "data_class": "private"}}
    rules: dict[str, Any] = {"quality": {"max_worse": 10.0}, "codec": {"name": "int8"}}
    start = {"pilot": "north", "align_steps": 5, "rounds": 2}
    yield from weave(work, "consortium", {"owners": owners, **start, "rules": rules, "overrides": small}, ["east"])
    owners = {name: {"episodes": 6} for name in ("north", "east", "south")}
    rules = {"quorum": 3, "secure_aggregation": True, "aggregation": {"name": "mean"}}
    masked = {"owners": owners, "stems": False, "rounds": 1, "rules": rules, "overrides": small}
    yield from weave(work, "masked consortium", masked, [])


def weave(work: Path, name: str, stated: Mapping[str, Any], without: Sequence[str]) -> Iterator[Item]:
    """Simulate a consortium, and recompute its bases, with all members and without some."""
    out, file = work / name, work / f"{name}.yaml"
    stated = {"consortium": name, "inner_steps": 6, "own_steps": 4, **stated}
    yield f"{name}: simulated", values(with_yaml(file, stated, "weave simulate", file, "--out", out))
    yield f"{name}: bases and contributions", contents(out / "rounds", r"\.safetensors$")
    yield f"{name}: runs", contents(out, r"^(?!rounds).*\.safetensors$")
    yield f"{name}: ledger", values(cli("weave ledger show", out / "rounds"))
    for left_out in (None, *without):
        into = work / f"{name} without {left_out}"
        said = ["--constitution", out / "constitution.yaml", "--into", into]
        said += [] if left_out is None else ["--without", left_out]
        bases = cli("weave recompute", out / "rounds", *said)
        found = contents(into, r"\.safetensors$") | {f"fingerprint {number}": [base] for number, base in bases.items()}
        yield f"{name}: recomputed without {left_out}", found


def memory(work: Path) -> Iterator[Item]:
    """Store explored states and logs in a memory, recall them, and evaluate goals afterwards."""
    run, explored, logs = work / "two-room" / "run", work / "explored", work / "logs"
    there = [run, "--memory", explored, "--method", "landmarks", "--split", "cross-room", "--episodes", "2"]
    cli("explore", *there, "--steps", "60")
    cli("memory remember", logs, run, work / "two-room" / "data")
    for path in (explored, logs):
        name = f"memory of {path.name}"
        yield f"{name}: recalled", values(cli("memory recall", path, "--id", "5"))
        cli("memory export", path, path.with_suffix(".jsonl"))
        yield f"{name}: exported", contents(work, rf"^{path.name}\.jsonl$")
    picture = ["--image", work / "goal.png", "--run", run]
    yield "memory of logs: like a picture", values(cli("memory recall", logs, *picture))
    yield "memory of explored: evaluation", values(cli("evaluate", *there, "--exploration", "0", "--budget", "20"))
    yield "memory of explored: landmarks", contents(explored, r"\.safetensors$")


def conversions(work: Path) -> Iterator[Item]:
    """Inspect a dataset, and convert it to other formats and back."""
    source = work / "two-room" / "data"
    fingerprint = {"fingerprint": [wl.EpisodeDataset.open(source).fingerprint()]}
    yield "data: inspected", values(cli("data inspect", source)) | fingerprint
    for name, options in (("folder", ["--lossless"]), ("robomimic", []), ("lerobot-v3", ["--lossless"])):
        there, back = work / f"as {name}", work / f"from {name}"
        yield f"data: as {name}", values(cli("data convert", source, there, "--to", name, *options))
        yield f"data: from {name}", values(cli("data convert", there, back)) | episodes(back)


STAGES = (rooms, vectors, other_parts, plans, evaluation, guardrails, pits, consortium, memory, conversions)


def take(work: Path, stages: Sequence[str]) -> dict[str, Any]:
    """Run the stages, and print and return their digests; if a stage fails, the others still run."""
    found: dict[str, Any] = {"items": {}, "failed": {}, "seconds": {}}
    for stage in STAGES:
        if stage.__name__ not in stages:
            continue
        began = time.perf_counter()
        try:
            for name, parts in stage(work):
                every = [value for each in parts.values() for value in each]
                item = {"digest": short(*sorted(every)), "names": short(*sorted(parts)), "parts": parts}
                found["items"][name] = item
                print(f"{item['digest']}  names {item['names']}  {len(every):4d} parts  {name}", flush=True)
        except Exception as error:
            found["failed"][stage.__name__] = f"{type(error).__name__}: {error}"
            print(f"failed            {stage.__name__}: {found['failed'][stage.__name__]}", flush=True)
        found["seconds"][stage.__name__] = round(time.perf_counter() - began, 1)
    return found


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Print the differences between two files; return whether all results are equal."""
    same = True
    for name in dict.fromkeys([*before["items"], *after["items"]]):
        both = [each["items"].get(name, {}).get("parts", {}) for each in (before, after)]
        was, now = (Counter((part, value) for part in one for value in one[part]) for one in both)
        gone, new = was - now, now - was
        by_value: defaultdict[str, list[str]] = defaultdict(list)
        for part, value in new.elements():
            by_value[value].append(part)
        renamed, changed = [], []
        for part, value in gone.elements():
            if by_value[value] and part not in {other for other, _ in new}:
                renamed.append(f"{part} -> {by_value[value].pop(0)}")
            elif value == "text":
                renamed.append(f"{part} is gone")
            else:
                changed.append(f"{part}: {value} -> {', '.join(both[1].get(part, ['gone']))}")
        left = [(part, value) for value, others in by_value.items() for part in others]
        renamed += [f"{part} is new" for part, value in left if value == "text"]
        known = {part for part, _ in gone}
        changed += [f"{part} is new: {value}" for part, value in left if value != "text" and part not in known]
        missing = [when for when, parts in zip(("before", "after"), both, strict=True) if not parts]
        verdict = f"missing {missing[0]}" if missing else "DIFFERENT" if changed else "renamed" if renamed else "equal"
        print(f"{verdict:9}  {name}")
        shown = [] if missing else changed or renamed
        print("".join(f"    {line}\n" for line in shown[:12]), end="")
        print(f"    and {len(shown) - 12} more\n" * (len(shown) > 12), end="")
        same = same and not changed and not missing
    for when, each in (("before", before), ("after", after)):
        for stage, error in each["failed"].items():
            same = False
            print(f"failed {when}: {stage}: {error}")
    return same


def main() -> None:
    """Compute digests, or compare those of two commits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="The JSON file for the digests.")
    parser.add_argument("--work", type=Path, help="An empty folder for the outputs; by default a temporary one.")
    parser.add_argument("--stages", nargs="+", default=[stage.__name__ for stage in STAGES])
    commands = parser.add_subparsers(dest="command")
    comparing = commands.add_parser("compare", help="Compare two files of digests.")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "compare":
        sys.exit(not compare(json.loads(arguments.before.read_text()), json.loads(arguments.after.read_text())))
    torch.set_num_threads(1)
    logging.getLogger("worldloom").setLevel(logging.ERROR)
    print(f"worldloom of {Path(wl.__file__).parent}", file=sys.stderr)
    with ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = take(work, arguments.stages)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(bool(found["failed"]))


if __name__ == "__main__":
    main()
