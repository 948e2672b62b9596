"""Text of other parties reaches the terminal without commands to it, and a working directory replaces no module."""

import io
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldloom.cli import console, main
from worldloom.cli.options import import_modules
from worldloom.core.errors import DataError
from worldloom.core.text import markdown

HOSTILE = "\x1b[2J\x1b]0;own\x07 \x9b31m \u202egnp.exe \r\b\x00 [bold]x[/bold] a\u200bb"
CONTROLS = ("\x1b", "\x07", "\x9b", "\u202e", "\b", "\x00", "\u200b", "\r")


def harmless(text: str) -> bool:
    return not any(control in text for control in CONTROLS)


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_tables_and_progress_show_controls_as_escapes(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = io.StringIO()
    safe = console.SafeConsole(file=written, force_terminal=terminal, color_system=None, width=400)
    monkeypatch.setattr(console, "out", safe)
    monkeypatch.setattr(console, "err", safe)
    console.show(HOSTILE, console.table(HOSTILE, [HOSTILE], [[HOSTILE]]), console.values_table("x", {HOSTILE: HOSTILE}))
    with console.LineProgress().task(HOSTILE, 1) as task:
        task.advance()
    shown = written.getvalue() + capsys.readouterr().out  # in a pipe, tables go to the standard output
    assert harmless(shown)
    assert shown.count(r"\x1b[2J") >= 6
    assert "[bold]x[/bold]" in shown
    with console.BarProgress().task(HOSTILE, 1) as task:
        task.advance()
    assert "own\x07" not in written.getvalue()
    assert "\u202e" not in written.getvalue()


@given(st.text(alphabet=st.characters(categories=["Cc", "Cf", "Ll", "Zl", "Zp"])))
def test_no_text_reaches_the_terminal_as_a_command(text: str) -> None:
    written = io.StringIO()
    console.SafeConsole(file=written, width=100).print(text, markup=False, soft_wrap=True)
    assert harmless(written.getvalue())


def test_errors_logs_and_tracebacks_show_controls_as_escapes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: Any) -> None:
        raise DataError(f"the plant said {HOSTILE}\nerror: none\tat all")

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(SystemExit):
        main.main()
    error = capsys.readouterr().err
    assert harmless(error.replace("\x1b[31m", "").replace("\x1b[0m", ""))
    assert error.count("\n") == 1
    try:
        raise RuntimeError(HOSTILE)
    except RuntimeError as raised:
        record = logging.LogRecord("x", logging.WARNING, "x", 1, f"a\n{HOSTILE}", (), None)
        lines = console.SafeFormatter("%(levelname)s %(message)s").format(record).split("\n")
        assert len(lines) == 1
        assert harmless(lines[0])
        record = logging.LogRecord("x", logging.WARNING, "x", 1, "a" * 10**6, (), None)
        assert len(console.SafeFormatter("%(levelname)s %(message)s").format(record)) == 10_000
        sys.excepthook(type(raised), raised, raised.__traceback__)
    assert harmless(capsys.readouterr().err)


def test_the_working_directory_replaces_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mymodule_of_a_user.py").write_text("")
    (tmp_path / "this.py").write_text("raise RuntimeError('taken from the working directory')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "this", raising=False)
    before = list(sys.path)
    import_modules(["mymodule_of_a_user", "this"])
    assert sys.path == [*before, str(tmp_path)]


def test_markdown_shows_text_as_it_is() -> None:
    text = "<img src=x> [click](javascript:alert(3)) ![t](http://evil.example/x.png) `x` | www.evil.example\n\n# h"
    assert markdown(text) == (
        r"&lt;img src=x\> \[click\](javascript\:alert(3)) !\[t\](http\://evil.example/x.png) \`x\` \| "
        r"www\.evil.example \# h"
    )
    assert markdown("the north_1: 0.5 (round 2)") == r"the north\_1: 0.5 (round 2)"
