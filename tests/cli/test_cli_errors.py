from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

import zoo
from zoo import registry
from zoo.cli import browse, errors, main
from zoo.errors import ZooError

Call = Callable[..., Result]
Process = Callable[..., subprocess.CompletedProcess[str]]

# What the command line consists of: a change here is a change for its users.
COMMANDS = {
    "list": "pattern kind trait axis recipes data json",
    "info": "name json",
    "run": "recipe overrides resume records runs quiet resume_if_possible",
    "sweep": "recipe grid jobs ray records runs minutes quiet",
    "claims": "name workers records runs verdict_only quiet",
    "claim": "name workers records runs verdict_only quiet",
    "leaderboard": "page records output figures show html",
    "compare": "first second records json",
    "doctor": "json records page",
    "sample": "run prompt tokens temperature top_k top_p seed runs",
    "show": "spec run recipe runs output length heads dim causal seed changes",
    "bench": "specs lengths dim heads batch shape host slots causal causal_baseline threads"
    " forward_only core baseline repeats min_time device dtype give_up output",
    "kernels": "only lengths dtype seconds smoke output",
}


def test_the_commands_and_their_options() -> None:
    from typer.main import get_command

    from zoo.cli import app

    group = get_command(app)
    found = {name: [p.name for p in command.params] for name, command in group.commands.items()}
    assert found == {name: options.split() for name, options in COMMANDS.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(zoo_cli: Call, name: str) -> None:
    result = zoo_cli(name, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: zoo {name}") or f"{name} [OPTIONS]" in result.stdout


def test_version(zoo_cli: Call) -> None:
    assert zoo_cli("--version").stdout == f"zoo {zoo.__version__}\n"


def test_without_a_command_there_is_help(zoo_cli: Call) -> None:
    result = zoo_cli()
    assert result.exit_code == 2
    assert "Commands:" in result.output


def test_an_alias_is_not_shown(zoo_cli: Call) -> None:
    shown = [line.split()[0] for line in zoo_cli("--help").stdout.splitlines() if line.strip()]
    assert "claims" in shown
    assert "claim" not in shown
    assert "'claim'" not in zoo_cli("clai").stderr


def test_a_process_says_one_line(process: Process) -> None:
    done = process("bnch")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "zoo: error: unknown command 'bnch'; did you mean 'bench'?\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info"], "missing argument 'name'; see 'zoo info --help'"),
        (["info", "mha", "--jsn"], "no such option: --jsn"),
        (["bench", "mha", "--dim", "x"], "invalid value for '--dim'"),
        (["bench", "mha", "--lengths", "8,x"], "lengths='8,x' must be whole numbers"),
        (["bench", "triplet", "--shape", "8,x"], "shape='8,x' must be whole numbers"),
        (["bench", "mha", "--shape", "8,4,4,4"], "shape=8,4,4,4 is for feature modules"),
        (["bench", "triplet", "--heads", "8"], "--heads is for token mixers"),
        (["info", "mha", "rope"], "unexpected extra argument"),
        (["--nonsense"], "no such option: --nonsense; see 'zoo --help'"),
    ],
)
def test_usage_errors(zoo_cli: Call, only_line: Call, words: list[str], message: str) -> None:
    result = zoo_cli(*words)
    assert result.exit_code == 2
    line = only_line(result)
    assert line.startswith("zoo: error: ")
    assert message in line


@pytest.mark.parametrize(
    "words", [["--debug", "info", "mhaa"], ["info", "--debug", "mhaa"], ["info", "mhaa", "--debug"]]
)
def test_debug_works_in_any_place(zoo_cli: Call, words: list[str]) -> None:
    result = zoo_cli(*words)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "registry.py" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("zoo: error: unknown mechanism 'mhaa'")


def test_debug_after_two_dashes_is_a_word(zoo_cli: Call, only_line: Call) -> None:
    assert "unknown mechanism '--debug'" in only_line(zoo_cli("info", "--", "--debug"))


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(name: str) -> registry.Entry:
        raise error

    monkeypatch.setattr(browse.registry, "info", fail)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ZooError("a\n  b"), 2, "zoo: error: a b"),
        (errors.Failed("run x failed"), 1, "zoo: error: run x failed"),
        (OSError(errno.ENOSPC, "No space left on device", "out.json"), 2,
         "zoo: error: out.json: No space left on device"),
        (OSError("odd"), 2, "zoo: error: odd"),
        (KeyboardInterrupt(), 130, "zoo: error: interrupted"),
    ],
)  # fmt: skip
def test_exit_codes(
    zoo_cli: Call,
    only_line: Call,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    line: str,
) -> None:
    raising(monkeypatch, error)
    result = zoo_cli("info", "mha")
    assert result.exit_code == code
    assert only_line(result) == line


def test_bugs_are_not_hidden(zoo_cli: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, AssertionError("a bug"))
    result = zoo_cli("info", "mha")
    assert isinstance(result.exception, AssertionError)


def test_an_exit_code_of_a_command_is_kept(zoo_cli: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, SystemExit(143))
    result = zoo_cli("info", "mha", "--debug")
    assert result.exit_code == 143
    assert result.stderr == ""


def test_warnings_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warned(name: str) -> registry.Entry:
        warnings.warn("mind\nthe gap", UserWarning, stacklevel=2)
        raise ZooError("then this")

    monkeypatch.setattr(browse.registry, "info", warned)
    warnings.simplefilter("always")
    with pytest.raises(SystemExit) as left:
        main(["info", "mha"])
    assert left.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "zoo: warning: mind the gap",
        "zoo: error: then this",
    ]


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "zoo", "list"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode in (1, 141)
