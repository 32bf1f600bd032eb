from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import Result

from zoo.runs.records import read, write

Call = Callable[..., Result]


@pytest.fixture
def folder(recall_run, tmp_path: Path) -> Path:
    """Records of two attentions in one table, on two devices, and of one of them in another."""
    (path,) = recall_run.records.glob("*.json")
    made = read(path)
    report = made.metric["report"]
    for attention, figures in (("mha", [0.9, 0.8, 0.7]), ("cog", [0.6, 0.5, 0.5])):
        for seed, figure in enumerate(figures):
            device = {**made.device, "name": f"device of {attention}"}
            metrics = {**made.metrics, report: figure}
            changes = {"attention": attention, "seed": seed, "metrics": metrics, "device": device}
            name = f"{attention}-{seed}"
            # A recipe that does not ship is never stale.
            write(replace(made, id=name, recipe="own", **changes), tmp_path)
    failed = {"status": "failed", "error": "it broke", "metrics": {}}
    write(replace(made, id="failed", recipe="own", attention="cog", seed=3, **failed), tmp_path)
    write(replace(made, id="alone", recipe="other", attention="mha"), tmp_path)
    return tmp_path


def test_two_specifications_side_by_side(zoo_cli: Call, folder: Path) -> None:
    result = zoo_cli("compare", "cog", "mha+none", "--records", folder)
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[:2] == ["A: cog", "B: mha"]
    (figure,) = (line for line in lines if line.startswith("test/accuracy"))
    assert figure == "test/accuracy ↑ 0.5333 ± 0.0577 (3 of 4) 0.8000 ± 0.1000 (3)"
    (difference,) = (line for line in lines if line.startswith("A - B: "))
    assert difference.startswith("A - B: -0.2667 [")
    assert difference.endswith("over 3 seeds excludes zero: loss")
    (note,) = (line for line in lines if "devices" in line)
    assert "device of cog" in note
    assert "device of mha" in note
    assert any("A failed at lr" in line and "seed 3" in line for line in lines)
    assert lines[lines.index("only B stands in") + 1].startswith("recall: other, group ")
    assert "recall 1 0 0 1 0 0 0 1" in lines


def test_as_json(zoo_cli: Call, folder: Path) -> None:
    result = zoo_cli("compare", "cog", "mha", "--records", folder, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (table,) = found["tables"]
    assert (table["recipe"], table["outcome"], table["stale"]) == ("own", "loss", False)
    assert table["first"]["values"] == {"0": 0.6, "1": 0.5, "2": 0.5}
    assert table["difference"]["excludes_zero"] is True
    assert found["alone"][0]["attention"] == "mha"
    assert found["outcomes"] == {"win": 0, "tie": 0, "loss": 1, "undecided": 0}


def test_a_table_of_a_recipe_that_was_changed(zoo_cli: Call, folder: Path) -> None:
    for path in folder.glob("*.json"):
        write(replace(read(path), recipe="mqar"), folder)
    result = zoo_cli("compare", "cog", "mha", "--records", folder)
    assert "note: stale, the recipe was changed since; this table counts" in result.stdout
    assert (
        result.stdout.splitlines()[-1] == "stale tables alone hold both, so nothing can be counted"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cgo", "mha"], "unknown mechanism 'cgo'; did you mean 'cog'"),
        (["cog+rope", "mha"], "there is no record of 'cog+rope'; nearest with records: 'cog'"),
        (["cog", "cog"], "'cog' and 'cog' are both 'cog'"),
        (["cog"], "missing argument 'B'"),
        (["cog", "mha", "--records", "nowhere"], "the records folder nowhere does not exist"),
    ],
)
def test_mistakes(
    zoo_cli: Call, only_line: Call, folder: Path, words: list[str], message: str
) -> None:
    more = [] if "--records" in words else ["--records", folder]
    result = zoo_cli("compare", *words, *more)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in only_line(result)
