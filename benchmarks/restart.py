"""Measures success on far goals after a restart, with the memory of the explorer and with the memory deleted.

    python benchmarks/restart.py [--seeds 0 1 2] [--episodes 24] [--steps 8000] [--protocol maze-200@1]

For each training seed of long-maze (from benchmarks/success.py), one process explores new mazes. When it reports that
it is done, it is killed with SIGKILL. A second process then receives goals in these mazes, with the memory of the first
process. A third process receives the same goals after the memory was deleted. Writes benchmarks/results/restart.json:
success over seeds with its 95% interval, and the hardware."""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from worldloom.cli.console import print_table
from worldloom.core.files import write_json
from worldloom.core.hardware import describe_hardware
from worldloom.evaluation import wilson_interval
from worldloom.memory import EpisodicMemory

RESULTS = Path(__file__).parent / "results" / "restart.json"

# Reports when exploration is done, and then waits to be killed: nothing is closed, and nothing is flushed at the end.
_EXPLORER = """
import sys, time
from worldloom.cli.console import progress
from worldloom.core.hardware import set_threads
from worldloom.workflow import Run, Session
from worldloom import workflow
set_threads(1)
run, memory, protocol, split, episodes, steps = sys.argv[1:]
session = Session(Run.open(run), memory=memory)
workflow.explore(session, int(steps), method="landmarks", protocol=protocol, split=split, episodes=int(episodes),
                 progress=progress())
print("explored", flush=True)
time.sleep(3600)
"""


def explore(run: Path, memory: Path, arguments: argparse.Namespace) -> None:
    """Explore in a separate process, and kill it."""
    options = [arguments.protocol, arguments.split, str(arguments.episodes), str(arguments.steps)]
    command = [sys.executable, "-c", _EXPLORER, str(run), str(memory), *options]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    said = child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    if said != "explored\n":
        raise SystemExit("the explorer ended before it was done")


def ask(run: Path, memory: Path, arguments: argparse.Namespace) -> list[bool]:
    """Give the goals to another process; return which goals it reached."""
    command = [sys.executable, "-m", "worldloom", "evaluate", str(run), "--memory", str(memory), "--json"]
    command += ["--protocol", arguments.protocol, "--split", arguments.split, "--exploration", "0"]
    command += ["--episodes", str(arguments.episodes), "--method", "landmarks", "--threads", "1"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    (row,) = json.loads(done.stdout)["rows"]
    return [bool(episode["success"]) for episode in row["episodes"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--episodes", type=int, default=24)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--protocol", default="maze-200@1")
    parser.add_argument("--split", default="covered")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks"))
    arguments = parser.parse_args()
    reached: dict[str, list[list[bool]]] = {"memory of the explorer": [], "memory deleted": []}
    memories = []
    for seed in arguments.seeds:
        run = arguments.runs / f"long-maze-{seed}" / "run"
        with tempfile.TemporaryDirectory() as folder:
            memory = Path(folder) / "memory"
            explore(run, memory, arguments)
            with EpisodicMemory.open(memory, spec=None) as opened:
                memories.append(len(opened))
            reached["memory of the explorer"].append(ask(run, memory, arguments))
            shutil.rmtree(memory)
            reached["memory deleted"].append(ask(run, memory, arguments))
    rows = []
    for name, seeds in reached.items():
        every = [success for one in seeds for success in one]
        low, high = wilson_interval(sum(every), len(every))
        rates = [sum(one) / len(one) for one in seeds]
        row = {"what": name, "success": sum(every) / len(every), "low": low, "high": high}
        rows.append({**row, "n": len(every), "models": rates})
    values = {
        "command": f"python benchmarks/restart.py --seeds {' '.join(map(str, arguments.seeds))} "
        f"--episodes {arguments.episodes} --steps {arguments.steps} --protocol {arguments.protocol}",
        "memories": memories,
        "rows": rows,
        "hardware": describe_hardware(),
    }
    write_json(RESULTS, values)
    shown = [
        [row["what"], f"{100 * row['success']:.1f}% [{100 * row['low']:.1f}, {100 * row['high']:.1f}]", str(row["n"])]
        for row in rows
    ]
    print_table(f"{arguments.protocol} after a restart", ["", "success", "n"], shown)


if __name__ == "__main__":
    main()
