from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from claim_examples import write
from rich.console import Console
from typer.testing import Result

from zoo.claims import trials as claims
from zoo.claims import verdicts
from zoo.claims.trials import find
from zoo.cli.claims import _print
from zoo.runs.train import run
from zoo.sweeps.sweep import Cell, SweepResult

Call = Callable[..., Result]


class Example(NamedTuple):
    """A claim whose runs have been made, but not judged."""

    recipe: Path
    records: Path
    ids: list[str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Example:
    base = tmp_path_factory.mktemp("claim")
    found = find(str(write(base)))
    for cell in found.cells:
        run(found.recipe, cell, records=base / "records/tiny_claim", runs=base / "runs", quiet=True)
    return Example(base, base / "records", [i for ids in found.ids.values() for i in ids])


@pytest.fixture
def example(trained: Example, tmp_path: Path) -> Example:
    shutil.copytree(trained.records, tmp_path / "records")
    return Example(write(tmp_path), tmp_path / "records", trained.ids)


def options(example: Example) -> list[Any]:
    return ["--records", example.records, "--runs", example.records.parent / "runs"]


def test_a_claim_is_stated_before_it_is_judged(zoo_cli: Call, example: Example) -> None:
    result = zoo_cli("claims", example.recipe, "--workers", 2, *options(example), "--quiet")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[:6] == [
        "claim: Differential attention has at most twice the loss of softmax attention.",
        "source: Table 1",
        "requires: ours.noisy >= 0",
        "criterion: ours.loss < 2 * min(softmax.loss, narrow.loss)",
        "criterion: ours.size > 0",
        "runs: 3 variants (ours, softmax, narrow) at 2 seeds, 6 of 6 done before",
    ]
    assert lines[6].split() == ["variant", "loss", "noisy", "size", "time"]
    assert [line.split()[0] for line in lines[7:10]] == ["ours", "softmax", "narrow"]
    assert lines[10:] == [
        "yes: requires ours.noisy >= 0",
        "yes yes: ours.loss < 2 * min(softmax.loss, narrow.loss)",
        "yes yes: ours.size > 0",
        "verdict: reproduced (the criterion holds on 2 of 2 seeds)",
    ]
    path = example.records / "tiny_claim" / "verdict.yaml"
    anew = f"to run it anew: zoo claims {example.recipe} --jobs 2 --records runs/anew/claims "
    said = [f"wrote {path}", f"{anew}--runs runs/anew"]
    assert result.stderr.splitlines() == ["0 finished, 6 skipped, 0 failed", *said]
    before = path.read_bytes()
    again = zoo_cli("claims", example.recipe, "--verdict-only", *options(example))
    assert again.stdout == result.stdout
    assert again.stderr.splitlines() == said
    assert path.read_bytes() == before


def test_records_that_are_missing_are_no_verdict(
    zoo_cli: Call, only_line: Call, example: Example
) -> None:
    (example.records / "tiny_claim" / f"{example.ids[1]}.json").unlink()
    result = zoo_cli("claims", example.recipe, "--verdict-only", *options(example))
    assert result.exit_code == 2
    assert f"1 of 6 records are missing in {example.records / 'tiny_claim'}" in only_line(result)
    assert "5 of 6 done before" in result.stdout
    assert "verdict:" not in result.stdout
    assert not (example.records / "tiny_claim" / "verdict.yaml").exists()


def test_a_run_that_fails_is_a_failure_of_the_command(
    zoo_cli: Call, monkeypatch: pytest.MonkeyPatch, example: Example
) -> None:
    cell = Cell(["seed=0"], example.ids[2], None, "out of memory")
    monkeypatch.setattr(claims, "sweep", lambda *a, **k: SweepResult(failed=[cell]))
    result = zoo_cli("claims", example.recipe, *options(example))
    assert result.exit_code == 1
    assert "failed: seed=0: out of memory" in result.stderr
    assert "verdict: " in result.stdout  # the records of before are there
    monkeypatch.setattr(claims, "sweep", lambda *a, **k: SweepResult(pending=[cell]))
    stopped = zoo_cli("claims", example.recipe, *options(example))
    assert stopped.exit_code == 130
    assert "verdict: " not in stopped.stdout


def test_a_claim_that_was_changed_is_refused(
    zoo_cli: Call, only_line: Call, example: Example
) -> None:
    assert zoo_cli("claims", example.recipe, "--verdict-only", *options(example)).exit_code == 0
    write(example.recipe.parent, claim__criterion=["ours.loss < 9"])
    for more in ([], ["--verdict-only"]):
        result = zoo_cli("claims", example.recipe, *more, *options(example))
        assert result.exit_code == 2
        assert "was changed after its verdict, 'reproduced'; remove" in only_line(result)
        assert result.stdout == ""


def test_a_claim_that_needs_a_gpu_is_not_run(
    zoo_cli: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    path = write(tmp_path, claim__needs="gpu")
    result = zoo_cli("claims", path, "--records", tmp_path / "records", "--runs", tmp_path / "runs")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("verdict: needs a GPU (")
    assert verdicts.read(tmp_path / "records" / "tiny_claim").outcome == "needs a GPU"
    assert not (tmp_path / "runs").exists()


def test_the_claims_that_ship_are_listed(
    zoo_cli: Call, monkeypatch: pytest.MonkeyPatch, example: Example
) -> None:
    folder = example.records.parent / "recipes"
    (folder / "claims").mkdir(parents=True)
    for module in ("runs.config", "claims.trials"):
        monkeypatch.setattr(f"zoo.{module}.folder", lambda name: folder)
    none = zoo_cli("claims", *options(example))
    assert (none.exit_code, none.stdout) == (0, "")
    assert none.stderr == "no claims ship with this installation\n"
    path = write(folder / "claims")
    words = ["tiny_claim", "differential"]
    statement = "Differential attention has at most twice the loss of softmax attention."
    assert zoo_cli("claims", *options(example)).stdout.splitlines()[1].split() == [
        *words,
        *statement.split(),
    ]
    assert zoo_cli("claims", "tiny_claim", "--verdict-only", *options(example)).exit_code == 0
    judged = zoo_cli("claims", *options(example)).stdout.splitlines()[1]
    assert judged.split() == [*words, "reproduced", "here", *statement.split()]
    write(folder / "claims", claim__statement="Another.")
    stale = zoo_cli("claims", *options(example)).stdout.splitlines()[1]
    assert stale.split() == [*words, "stale", "(reproduced)", "here", "Another."]
    path.write_text(path.read_text().partition("claim:")[0])
    empty = zoo_cli("claims", *options(example))
    assert empty.exit_code == 2
    assert "'tiny_claim' stands among the claims but states none" in empty.stderr


def test_published_verdicts_are_listed_where_there_are_none_here(
    zoo_cli: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = zoo_cli("claims")
    assert result.exit_code == 0, result.output
    rows = [line.split("  ") for line in result.stdout.splitlines()[1:]]
    found = {row[0]: row for row in rows}
    assert set(found) == set(claims.names())
    published = Path(__file__).parents[2] / "data/runs/claims"
    for name, row in found.items():
        judged = verdicts.stated(published / name)
        assert judged is not None
        assert "published" in [cell.strip() for cell in row]
        assert judged.outcome in [cell.strip() for cell in row]
    assert "published: judged in data/runs/claims" in result.stderr
    elsewhere = zoo_cli("claims", "--records", tmp_path)
    assert "published" not in elsewhere.output
    assert "without a verdict" in elsewhere.stderr


def test_the_published_verdict_of_a_claim_is_told(
    zoo_cli: Call, only_line: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = claims.names()[0]
    judged = verdicts.stated(Path(__file__).parents[2] / "data/runs/claims" / name)
    assert judged is not None
    result = zoo_cli("claims", name, "--verdict-only", "--records", tmp_path)
    assert result.exit_code == 2
    assert f"published verdict: {judged.outcome} (data/runs/claims/{name})" in result.stdout
    assert "records are missing" in only_line(result)


def test_the_former_name_of_the_command_works(zoo_cli: Call, tmp_path: Path) -> None:
    assert zoo_cli("claim", "--records", tmp_path).stdout == (
        zoo_cli("claims", "--records", tmp_path).stdout
    )


def test_a_narrow_terminal_has_statements_under_their_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    row = ["cope_counting", "cope", "reproduced", "published", "word " * 30]
    _print(Console(width=60, color_system=None), [row])
    name, *lines = capsys.readouterr().out.splitlines()
    assert name == "cope_counting (cope) published: reproduced"
    assert len(lines) == 3
    assert all(line.startswith("  word ") for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["claims", "nothing_like_it"], "unknown claim 'nothing_like_it'"),
        (["claims", "mqar"], "recipe 'mqar' states no claim; 'zoo claims' lists those that do"),
        (["claims", "nowhere.yaml"], "recipe file nowhere.yaml does not exist"),
        (["claims", "{recipe}", "--workers", "0"], "workers=0 must be a whole number of at least"),
        (["claims", "{recipe}", "--verdict-only", "--jobs", "0"], "workers=0 must be"),
    ],
)
def test_mistakes(
    zoo_cli: Call,
    only_line: Call,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = str(write(tmp_path))
    result = zoo_cli(*(word.replace("{recipe}", recipe) for word in words))
    assert result.exit_code == 2
    assert message in only_line(result)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny_claim.yaml"]


def test_a_claim_is_an_ordinary_recipe_too(zoo_cli: Call, example: Example) -> None:
    result = zoo_cli("run", example.recipe, *options(example), "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    (record,) = (example.records).glob("*.json")
    assert record.stem == example.ids[2]  # the recipe as it stands is the variant without changes
