"""The table of docs/field.md, from the cells that benchmarks/field.py has measured."""

import itertools
from pathlib import Path
from typing import Any

from field import METHODS, OFFSETS, RANDOM, RECIPES, RESULTS, SOLVER, Cell, all_cells
from worldloom.core.files import read_json
from worldloom.evaluation import RULES, SuccessRate, above_text

PAGE = Path(__file__).parent.parent / "docs" / "field.md"
PUBLISHED = Path(__file__).parent / "field_published.json"
MARKS = {
    name: (f"<!-- {name}: written by benchmarks/render.py -->\n", f"<!-- end of {name} -->\n")
    for name in ("measured", "published")
}
NOT_RUN = "not run"


def write_page(folder: Path = RESULTS, page: Path = PAGE) -> None:
    """Write both tables between their marks in the page."""
    text = page.read_text(encoding="utf-8")
    for name, table in (("measured", measured_tables(folder)), ("published", published_table(read_json(PUBLISHED)))):
        begin, end = MARKS[name]
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    page.write_text(text, encoding="utf-8")


def measured_tables(folder: Path) -> str:
    """Return one table for each world and log; cells without measurements are marked."""
    cells = [(cell, value) for cell in all_cells() if (value := cell.read(folder)) is not None]
    budget = f"CEM with {SOLVER.samples} candidates, {SOLVER.iterations} iterations and {SOLVER.elites} elites"
    parts = [f"The budget of every search: {budget}.\n"]
    for world, log in RECIPES:
        mine = [(cell, value) for cell, value in cells if (cell.world, cell.log) == (world, log)]
        header = ["goal", "rule", "n", "solved at the start", *METHODS]
        header += [f"{method}, above the floor" for method in METHODS if method != RANDOM]
        rows = [_row(offset, rule, mine) for offset, rule in itertools.product(OFFSETS, RULES)]
        title = f"### {world}, {log} logs\n"
        parts.append("\n".join([title, *map(_line, (header, ["---"] * len(header), *rows)), ""]))
        if mine:
            parts.append(f"{_latencies(mine)} {_hardware(mine)}")
    return "\n".join(parts)


def _row(offset: int, rule: str, cells: list[tuple[Cell, dict[str, Any]]]) -> list[str]:
    here = [(cell, value) for cell, value in cells if (cell.offset, cell.rule) == (offset, rule)]
    by_method = {method: [(cell, value) for cell, value in here if cell.method == method] for method in METHODS}
    _check_pairs(here)
    rates = {method: _pooled(mine) for method, mine in by_method.items()}
    floor = rates[RANDOM]
    counts = sorted({rate.n for rate in rates.values() if rate is not None})
    solved = [value["solved_at_start"] / value["n"] for _, value in here]
    return [
        f"{offset} steps",
        rule,
        " to ".join(map(str, {counts[0]: 0, counts[-1]: 0})) if counts else "-",
        f"{100 * sum(solved) / len(solved):.1f}%" if solved else "-",
        *(NOT_RUN if rate is None else _success(rate, by_method[method]) for method, rate in rates.items()),
        *(NOT_RUN if rate is None else above_text(_above(rate, floor, by_method[method], by_method[RANDOM]))
          for method, rate in rates.items() if method != RANDOM),
    ]  # fmt: skip


def _above(
    rate: SuccessRate, floor: SuccessRate | None, mine: list[tuple[Cell, Any]], floors: list[tuple[Cell, Any]]
) -> tuple[float, float, float] | None:
    """Return the rate above the floor, if both were measured with the same seeds."""
    same = {cell.seed for cell, _ in mine} == {cell.seed for cell, _ in floors}
    return rate.above(floor) if same else None


def _check_pairs(cells: list[tuple[Cell, dict[str, Any]]]) -> None:
    for seed in {cell.seed for cell, _ in cells}:
        pairs = {value["pairs"]: cell for cell, value in cells if cell.seed == seed}
        if len(pairs) > 1:
            raise ValueError(
                f"cells of seed {seed} were measured on different pairs: {', '.join(map(str, pairs.values()))}. Delete "
                f"their files, and measure them again"
            )


def _pooled(cells: list[tuple[Cell, dict[str, Any]]]) -> SuccessRate | None:
    if not cells:
        return None
    counts = [(value["n"], value["successes"]) for _, value in cells]
    return SuccessRate(label="all", n=sum(n for n, _ in counts), successes=sum(count for _, count in counts))


def _success(rate: SuccessRate, cells: list[tuple[Cell, dict[str, Any]]]) -> str:
    low, high = rate.interval
    single = [100 * value["successes"] / value["n"] for _, value in cells]
    models = f", models {min(single):.0f} to {max(single):.0f}" if len(single) > 1 else ""
    return f"{100 * rate.rate:.1f}% [{100 * low:.1f}, {100 * high:.1f}]{models}"


def _latencies(cells: list[tuple[Cell, dict[str, Any]]]) -> str:
    parts = []
    for method in METHODS:
        times = [value["latency"]["mean_ms"] for cell, value in cells if cell.method == method and value["latency"]]
        mean = sum(times) / len(times) if times else 0.0
        parts += [f"{method} {mean:.0f}" if mean >= 10 else f"{method} {mean:.2g}"] if times else []
    return f"Milliseconds per decision and environment: {', '.join(parts)}."


def _hardware(cells: list[tuple[Cell, dict[str, Any]]]) -> str:
    machines = dict.fromkeys(f"{value['hardware']}, {value['threads']} threads" for _, value in cells)
    return f"Measured on {'; '.join(machines)}.\n"


def published_table(entries: list[dict[str, Any]]) -> str:
    """Return the published figures, one line for each method and setting."""
    worlds = list(dict.fromkeys(world for world, _ in RECIPES))
    header = ["method", "goal", "rule", *worlds, "source", "what differs"]
    lines = [
        [
            entry["method"],
            f"{entry['offset']} steps" if entry["offset"] else "-",
            entry["rule"],
            *(str(entry["success"].get(world, "-")) for world in worlds),
            entry["source"],
            entry["differs"],
        ]
        for entry in entries
    ]
    return "\n".join([*map(_line, (header, ["---"] * len(header), *lines)), ""])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
