"""The field's table: cells are files of their own, measuring resumes, and the page shows what was not run."""

import dataclasses
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from worldloom.core.errors import ConfigError
from worldloom.core.files import write_json
from worldloom.evaluation import PROTOCOLS, EpisodeResult, Latency, Results, Row, field_title

ROOT = Path(__file__).parents[2]
RATES = {"search": 80, "without search": 60, "behaviour cloning": 30, "random": 10}


@pytest.fixture
def field(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("field")


@pytest.fixture
def page(field: ModuleType) -> ModuleType:
    return importlib.import_module("field_page")


def stub(cells: list[Any], pairs: str = "") -> list[Results]:
    """Results of 100 episodes for each method of the cells and under each of their rules, without any model."""
    seed = cells[0].seed
    rows = []
    for method in dict.fromkeys(cell.method for cell in cells):
        episodes = [
            EpisodeResult(index=i, seed=i, success=i < RATES[method], steps=int(i >= 5), budget=50,
                          task=f"{seed} {i} {pairs}")
            for i in range(100)
        ]  # fmt: skip
        rows.append(Row(method=method, split="", episodes=tuple(episodes), latency=Latency.of("act", [0.4], [100])))
    every = []
    for protocol in (PROTOCOLS[title] for title in dict.fromkeys(cell.protocol for cell in cells)):
        (split,) = protocol.splits
        mine = tuple(dataclasses.replace(row, split=split) for row in rows)
        hardware = {"processor": "a processor", "threads": 2}
        every.append(Results(protocol=protocol, rows=mine, hardware=hardware, model="c0ffee", training_seed=seed))
    return every


def test_measuring_stops_and_resumes_at_any_cell(field: ModuleType, tmp_path: Path) -> None:
    cells = field.chosen(field.all_cells(), ["world=pusht", "log=weak", "rule=historical,strict", "offset=25,50"])
    assert len(cells) == 2 * 2 * 4 * 3
    calls: list[list[Any]] = []

    def measure(together: list[Any]) -> list[Results]:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(together)
        return stub(together)

    with pytest.raises(KeyboardInterrupt):
        field.measure_missing(cells, tmp_path, measure)
    assert len(list(tmp_path.iterdir())) == 2 * 2 * 4  # the rules and methods of a group share their episodes
    assert f"all: 16 of {len(cells)} cells" in field.listing(cells, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls.clear()
    calls.append([])
    # One method is missing from a finished group: it alone is measured.
    lost = next(cell for cell in cells if cell.read(tmp_path) is not None and cell.method == "search")
    lost.path(tmp_path).unlink()
    one = [cell for cell in cells if (cell.seed, cell.offset, cell.rule) == (lost.seed, lost.offset, lost.rule)]
    assert field.measure_missing(one, tmp_path, measure) == 1
    assert calls[-1] == [lost]
    del calls[:]
    assert field.measure_missing(cells, tmp_path, stub) == len(cells) - 16
    assert field.measure_missing(cells, tmp_path, measure) == 0
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert field.listing(cells, tmp_path).endswith(f"all: {len(cells)} of {len(cells)} cells")


def test_a_cell_of_an_older_protocol_counts_as_missing(field: ModuleType, tmp_path: Path) -> None:
    cells = field.chosen(field.all_cells(), ["world=reacher", "log=weak", "rule=moderate", "offset=25", "seed=0"])
    field.measure_missing(cells, tmp_path, stub)
    path = cells[0].path(tmp_path)
    value = json.loads(path.read_text())
    write_json(path, {**value, "protocol_fingerprint": "0" * 16})
    assert "reacher-25-moderate@1: 3 of 4; missing: search 0" in field.listing(cells, tmp_path)


def test_results_under_other_conventions_are_not_stored(field: ModuleType, tmp_path: Path) -> None:
    cells = field.chosen(field.all_cells(), ["world=reacher", "log=weak", "rule=moderate", "offset=25", "seed=0"])

    def shorter(together: list[Any]) -> list[Results]:
        (results,) = stub(together)
        return [dataclasses.replace(results, protocol=results.protocol.customise(budget=10))]

    with pytest.raises(
        ConfigError, match=r"expected results under reacher-25-moderate@1 .* got reacher-25-moderate-cus"
    ):
        field.measure_missing(cells, tmp_path, shorter)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("world=moon", "no cell has world moon; known: cube"),
        ("planet=x", "a key of world, log"),
        ("world", "no cell has"),
    ],
)
def test_filters_that_select_nothing_are_refused(field: ModuleType, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        field.chosen(field.all_cells(), [text])


def test_the_command_lists_and_refuses(field: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    field.main(["--list", "--cells", "world=pusht", "offset=25", "--results", str(tmp_path)])
    assert "pusht-25-strict@1: 0 of 12" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        field.main(["--list", "--cells", "world=moon"])


def test_every_recipe_of_the_table_has_its_methods_with_one_budget(field: ModuleType) -> None:
    for world, log in field.RECIPES:
        recipe = field.field_recipe(world, log, 7)
        assert tuple(recipe.methods) == field.METHODS
        assert recipe.methods["search"].solver == field.SOLVER
        assert (recipe.training.seed, recipe.collection.seed) == (7, 7)
        protocol = PROTOCOLS[field_title(world, log, 25, "historical")]
        assert (protocol.env_id, protocol.policy) == (recipe.collection.env_id, recipe.collection.policy)


def test_the_page_shows_pooled_rates_the_floor_and_what_was_not_run(
    field: ModuleType, page: ModuleType, tmp_path: Path
) -> None:
    cells = field.chosen(field.all_cells(), ["world=pusht", "log=weak", "rule=historical", "offset=25"])
    field.measure_missing(cells, tmp_path, stub)
    text = page.measured_tables(tmp_path)
    section = text.split("### pusht, weak logs")[1].split("###")[0]
    (line,) = [line for line in section.splitlines() if line.startswith("| 25 steps | historical |")]
    fields = [cell.strip() for cell in line.strip("|").split("|")]
    assert fields[2:4] == ["300", "5.0%"]
    assert fields[4].startswith("80.0% [75.1, 84.1], models 80 to 80")
    assert fields[8].startswith("77.8% [")  # (0.8 - 0.1) / (1 - 0.1)
    assert section.count("not run") == 8 * 7
    assert "Measured on a processor, 2 threads." in section
    assert "Milliseconds per decision and environment: search 4, without search 4" in section
    assert "### cube, expert logs" in text
    assert f"CEM with {field.SOLVER.samples} candidates" in text
    # One model has no range.
    for cell in cells:
        if cell.seed:
            cell.path(tmp_path).unlink()
    assert "models" not in page.measured_tables(tmp_path)
    field.measure_missing(cells, tmp_path, stub)
    # Cells on other pairs are not compared.
    (other,) = [cell for cell in cells if (cell.method, cell.seed) == ("random", 1)]
    other.path(tmp_path).unlink()
    field.measure_missing([other], tmp_path, lambda together: stub(together, "others"))
    with pytest.raises(ValueError, match="measured on different pairs"):
        page.measured_tables(tmp_path)


def test_the_published_page_is_what_the_files_say(page: ModuleType, tmp_path: Path) -> None:
    copy = tmp_path / "field.md"
    copy.write_text(page.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    page.write_page(page=copy)
    assert copy.read_text(encoding="utf-8") == page.PAGE.read_text(encoding="utf-8"), "run benchmarks/render.py"
    assert "arXiv:2603.19312" in copy.read_text(encoding="utf-8")


BLOCKS = (ROOT / "docs" / "field.md").read_text(encoding="utf-8").split("```python\n")[1:]


@pytest.mark.parametrize("block", [block.split("```")[0] for block in BLOCKS])
def test_the_pages_code_runs(block: str) -> None:
    exec(compile(block, "docs/field.md", "exec"), {"__name__": "page"})
