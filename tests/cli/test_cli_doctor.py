from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import Result

from zoo.cli import doctor as command
from zoo.doctor import Section
from zoo.doctor.lines import Line, note, ok, problem

Call = Callable[..., Result]
FINE = [ok("torch", "torch 2 (>=1)", version="2"), note("hf", "hf is missing", "pip install it")]
WRONG = [problem("page", "the page is old", "make it again")]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Line]], list[object]]:
    """Let the examination find some lines, and return what it was asked."""

    def prepare(lines: list[Line]) -> list[object]:
        given: list[object] = []

        def examine(records: Path | None, page: Path | None) -> Iterator[Section]:
            given.extend((records, page))
            yield Section("versions", tuple(lines[:2]))
            yield Section("leaderboard", tuple(lines[2:]))

        monkeypatch.setattr("zoo.doctor.examine", examine)
        return given

    return prepare


def test_notes_are_no_failure(zoo_cli: Call, asked: Callable[..., list[object]]) -> None:
    given = asked(FINE)
    result = zoo_cli("doctor")
    assert result.exit_code == 0
    assert given == [None, None]
    assert result.stdout.splitlines() == [
        "ok       versions: torch 2 (>=1)",
        "note     versions: hf is missing -> pip install it",
        "no problems, 1 note",
    ]
    assert result.stderr == ""


def test_a_problem_is_a_failure(zoo_cli: Call, asked: Callable[..., list[object]]) -> None:
    given = asked([*FINE, *WRONG])
    result = zoo_cli("doctor", "--records", "made", "--page", "page.md")
    assert result.exit_code == 1
    assert given == [Path("made"), Path("page.md")]
    assert result.stdout.splitlines()[2:] == [
        "problem  leaderboard: the page is old -> make it again",
        "1 problem, 1 note",
    ]


def test_as_json(zoo_cli: Call, asked: Callable[..., list[object]]) -> None:
    asked([*FINE, *WRONG])
    result = zoo_cli("doctor", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["healthy"] is False
    assert found["counts"] == {"ok": 1, "note": 1, "problem": 1}
    assert [part["section"] for part in found["sections"]] == ["versions", "leaderboard"]
    assert found["sections"][0]["lines"][0] == {
        "name": "torch",
        "level": "ok",
        "text": "torch 2 (>=1)",
        "todo": "",
        "facts": {"version": "2"},
    }


def test_on_a_terminal_lines_stay_in_their_column(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    line = problem("page", "word " * 12, "do it")
    command._show(Console(width=40, color_system=None), Section("leaderboard", (line,)))
    shown = [text.rstrip() for text in capsys.readouterr().out.splitlines()]
    assert shown == [
        "leaderboard",
        "problem  word word word word word word",
        "         word word word word word word",
        "         -> do it",
        "",
    ]


@pytest.mark.slow
def test_the_repository_is_healthy(zoo_cli: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    result = zoo_cli("doctor", "--json")
    found = json.loads(result.stdout)
    problems = [
        line for part in found["sections"] for line in part["lines"] if line["level"] == "problem"
    ]
    assert problems == []
    assert result.exit_code == 0
