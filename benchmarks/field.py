"""Measures the field's table: worlds, logs, goal offsets, rules and methods, with several training seeds.

    python benchmarks/field.py [--list] [--cells KEY=VALUE[,VALUE ...] ...] [--threads N]

Each cell of the table is one file in benchmarks/results/field/, written when its episodes are finished; all rules judge
the same episodes. Finished cells are skipped, so the command can be interrupted and repeated at any time. `--list` only
prints what is finished and what is missing. `--cells` selects cells by world, log, offset, rule, method or seed, such
as `--cells world=pusht,reacher rule=strict`. Data and trained models lie in `--runs`; each world, log and seed is
collected and trained once. docs/field.md explains the table; `python benchmarks/render.py` writes it there.
"""

import argparse
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from worldloom.agents import PlannedMethod
from worldloom.core.errors import ConfigError
from worldloom.core.files import read_json, write_json
from worldloom.core.hardware import set_threads
from worldloom.evaluation import PROTOCOLS, RULES, Results, field_title
from worldloom.planning.solvers import CEM
from worldloom.recipes import Recipe, load_recipe

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "field"
COMMAND = "python benchmarks/field.py"

RECIPES = {
    ("two-room", "weak"): "two-room",
    ("two-room", "expert"): "two-room-expert",
    ("reacher", "weak"): "reacher",
    ("reacher", "expert"): "reacher-expert",
    ("pusht", "weak"): "pusht",
    ("pusht", "expert"): "pusht-expert",
    ("cube", "weak"): "cube-state",
    ("cube", "expert"): "cube-expert-state",
}
OFFSETS = (25, 50, 100)
SEEDS = (0, 1, 2)
# All searches have the same budget, whatever their recipes say: 128 candidates, 5 iterations, 16 elites. On PushT, a
# budget of 300 candidates and 10 iterations is no better (docs/log.md), and takes five times as long.
SOLVER = CEM(samples=128, iterations=5, elites=16)
# The recipes' default methods are their best searches, but tree search has no such budget.
SEARCH_OF = {("two-room", "weak"): "CEM, latent L2"}
# Each training seed is evaluated on its own pairs. No setting was chosen on the seeds of this root.
EVALUATION_SEED = 1000
SEARCH, WITHOUT, CLONING, RANDOM = METHODS = ("search", "without search", "behaviour cloning", "random")
# The best method without search; elsewhere GC-IDM. Weak logs rarely cross the door, so imitation learns little there.
WITHOUT_SEARCH_OF = {("two-room", "weak"): "reactive policy"}


@dataclass(frozen=True, order=True)
class Cell:
    """One method, trained with one seed, under one protocol."""

    world: str
    log: str
    offset: int
    rule: str
    method: str
    seed: int

    @property
    def protocol(self) -> str:
        """The title of the protocol."""
        return field_title(self.world, self.log, self.offset, self.rule)

    def path(self, folder: Path) -> Path:
        """Return the path of the cell's file."""
        return folder / f"{'-'.join(str(part) for part in asdict(self).values()).replace(' ', '-')}.json"

    def read(self, folder: Path) -> dict[str, Any] | None:
        """Return the content of the cell's file; None if it is missing, or was measured under other conventions."""
        path = self.path(folder)
        value = read_json(path) if path.is_file() else None
        same = value is not None and value["protocol_fingerprint"] == PROTOCOLS[self.protocol].fingerprint
        return value if same else None


def all_cells() -> list[Cell]:
    """Return all cells in the order of the table."""
    return [Cell(*pair, *values) for pair, *values in itertools.product(RECIPES, OFFSETS, RULES, METHODS, SEEDS)]


def chosen(cells: Iterable[Cell], filters: Sequence[str]) -> list[Cell]:
    """Return the cells that agree with every filter KEY=VALUE[,VALUE ...].

    Raises:
        ValueError: a filter has no such form, or no cell has one of its values.
    """
    selected = list(cells)
    for each in filters:
        key, _, text = each.partition("=")
        known = {str(asdict(cell)[key]) for cell in all_cells()} if key in Cell.__annotations__ else set()
        values = set(text.split(","))
        if not known:
            raise ValueError(
                f"expected --cells KEY=VALUE with a key of {', '.join(Cell.__annotations__)}; got {each!r}"
            )
        if values - known:
            raise ValueError(
                f"no cell has {key} {', '.join(sorted(values - known))}; known: {', '.join(sorted(known))}"
            )
        selected = [cell for cell in selected if str(asdict(cell)[key]) in values]
    return selected


# Evaluates cells that differ only in their methods and rules: the results under each rule.
Measure = Callable[[list[Cell]], list[Results]]


def measure_missing(cells: Iterable[Cell], folder: Path, measure: Measure) -> int:
    """Measure the cells without a valid file, all rules and methods together; return how many were measured.

    Raises:
        ConfigError: the results are not from the protocols of the cells.
    """
    missing = sorted((cell for cell in cells if cell.read(folder) is None), key=_episodes)
    folder.mkdir(parents=True, exist_ok=True)
    for _, group in itertools.groupby(missing, key=_episodes):
        together = list(group)
        every = measure(together)
        row_of: dict[tuple[str, str], dict[str, Any]] = {}
        for title, results in zip(_protocols(together), every, strict=True):
            expected = PROTOCOLS[title]
            if results.protocol.fingerprint != expected.fingerprint:
                raise ConfigError(
                    f"expected results under {expected.title} ({expected.fingerprint}); got {results.protocol.title} "
                    f"({results.protocol.fingerprint}). Make the recipe collect from the protocol's world"
                )
            row_of |= {(title, row["method"]): row for row in results.to_json()["rows"]}
        for cell in together:
            row = row_of[cell.protocol, cell.method]
            write_json(cell.path(folder), {"command": COMMAND, **asdict(cell), **_slim(row)})
    return len(missing)


def _episodes(cell: Cell) -> tuple[str, str, int, int]:
    return (*_training(cell), cell.offset)


def _protocols(cells: Iterable[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.protocol for cell in cells))


def _training(cell: Cell) -> tuple[str, str, int]:
    return cell.world, cell.log, cell.seed


def _slim(row: dict[str, Any]) -> dict[str, Any]:
    names = ("protocol", "protocol_fingerprint", "pairs", "n", "successes", "solved_at_start", "latency", "hardware")
    return {name: row[name] for name in (*names, "threads", "model", "seeds")}


def field_recipe(world: str, log: str, seed: int) -> Recipe:
    """Return the recipe of a world and a kind of log, with the table's methods, and one seed for all."""
    recipe = load_recipe(RECIPES[world, log])
    search = recipe.method(SEARCH_OF.get((world, log)))
    assert isinstance(search, PlannedMethod), f"the method of the recipe {recipe.name} does not search"
    methods = {
        SEARCH: search.model_copy(update={"solver": SOLVER}),
        WITHOUT: recipe.method(WITHOUT_SEARCH_OF.get((world, log), "GC-IDM")),
        CLONING: recipe.method("behaviour cloning"),
        RANDOM: recipe.method("random"),
    }
    recipe = recipe.model_copy(update={"methods": methods, "default_method": SEARCH})
    return recipe.override([f"training.seed={seed}", f"collection.seed={seed}"])


def train_and_evaluate(cells: list[Cell], runs: Path) -> list[Results]:
    """Collect, train and evaluate under each rule; finished stages are reused, and interrupted ones are resumed."""
    from worldloom import workflow
    from worldloom.cli.console import progress

    first = cells[0]
    folder = runs / "-".join(map(str, _training(first)))
    recipe = field_recipe(first.world, first.log, first.seed)
    workflow.collect(recipe, folder / "data", progress=progress())
    run = workflow.train(recipe, folder / "data", folder / "run", resume=True, progress=progress())
    return workflow.evaluate_together(
        run,
        _protocols(cells),
        methods=list(dict.fromkeys(cell.method for cell in cells)),
        seed=EVALUATION_SEED + first.seed,
        progress=progress(),
    )


def listing(cells: Iterable[Cell], folder: Path) -> str:
    """Return one line for each protocol: how many of its cells are finished, and which are missing."""
    lines, finished, total = [], 0, 0
    for protocol, group in itertools.groupby(cells, key=lambda cell: cell.protocol):
        mine = list(group)
        missing = [f"{cell.method} {cell.seed}" for cell in mine if cell.read(folder) is None]
        lines.append(f"{protocol}: {len(mine) - len(missing)} of {len(mine)}")
        lines[-1] += f"; missing: {', '.join(missing)}" if 0 < len(missing) < len(mine) else ""
        finished, total = finished + len(mine) - len(missing), total + len(mine)
    return "\n".join([*lines, f"all: {finished} of {total} cells"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print what is finished and what is missing")
    parser.add_argument("--cells", nargs="+", default=[], metavar="KEY=VALUE", help="only these cells")
    parser.add_argument("--runs", type=Path, default=Path("runs/field"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    try:
        cells = chosen(all_cells(), options.cells)
    except ValueError as error:
        parser.error(str(error))
    if not options.list:
        set_threads(options.threads)
        measure_missing(cells, options.results, lambda together: train_and_evaluate(together, options.runs))
    print(listing(cells, options.results))


if __name__ == "__main__":
    main()
