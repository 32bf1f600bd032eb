from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
from typer.testing import Result

import zoo

Call = Callable[..., Result]


def names(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    return [line.split()[0] for line in result.stdout.splitlines()[1:]]


def test_list_shows_every_mechanism_with_its_facts(zoo_cli: Call) -> None:
    result = zoo_cli("list")
    assert names(result) == zoo.list()
    line = next(x for x in result.stdout.splitlines() if x.startswith("sliding_window "))
    entry = zoo.info("sliding_window")
    for fact in ("select", "2020", entry.summary, "N * window", "no-cross no-equivariant"):
        assert fact in line


@pytest.mark.parametrize(
    ("words", "filters"),
    [
        (["*max", "r*"], {"pattern": ["*max", "r*"]}),
        (["--kind", "position", "--kind", "select"], {"kind": ["position", "select"]}),
        (
            ["--trait", "no-cross", "--trait", "causal"],
            {"traits": {"cross": False, "causal": True}},
        ),
        (["--trait", "mask=keys"], {"traits": {"mask": "keys"}}),
        (["--axis", "positions=local"], {"positions": "local"}),
        (["--axis", "trainable_params=true"], {"trainable_params": True}),
        (["--axis", "causality=required"], {"causality": "required"}),
    ],
)
def test_filters(zoo_cli: Call, words: list[str], filters: dict[str, object]) -> None:
    expected = zoo.list(**filters)
    assert expected
    assert expected != zoo.list()
    assert names(zoo_cli("list", *words)) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kind", "positon"], "unknown kind 'positon'; did you mean 'position'?"),
        (["--trait", "no-crss"], "unknown trait 'crss'; did you mean 'cross'"),
        (["--trait", "mask"], "trait 'mask' must be written mask=VALUE"),
        (["--trait", "causal=yes"], "trait 'causal=yes' must be written causal or no-causal"),
        (["--trait", "causal", "--trait", "no-causal"], "trait 'causal' is asked for twice"),
        (["--axis", "positions"], "axis 'positions' must be written NAME=VALUE"),
        (["--axis", "kind=position"], "unknown axis 'kind'"),
        (["--axis", "positions=locl"], "did you mean 'local'"),
        (["--axis", "trainable_params=1"], "trainable_params=true or trainable_params=false"),
        (["--axis", "exact=yes", "--axis", "exact=no"], "axis 'exact' is asked for twice"),
        (["--recipes", "--data"], "--recipes and --data are two lists"),
        (["--recipes", "--kind", "position"], "--kind filters mechanisms"),
        (["no_such_*"], "nothing matches"),
    ],
)
def test_bad_filters(zoo_cli: Call, only_line: Call, words: list[str], message: str) -> None:
    result = zoo_cli("list", *words)
    assert result.exit_code == 2
    assert message in only_line(result)


def test_list_json(zoo_cli: Call) -> None:
    found = json.loads(zoo_cli("list", "--kind", "normalize", "--json").stdout)
    assert [item["name"] for item in found] == zoo.list(kind="normalize")
    assert found[0]["traits"]["causal"] is True
    assert json.loads(zoo_cli("list", "no_such_*", "--json").stdout) == []


def test_recipes(zoo_cli: Call) -> None:
    result = zoo_cli("list", "--recipes")
    assert {"mqar", "bytes", "digits"} <= set(names(result))
    found = json.loads(zoo_cli("list", "mqar", "--recipes", "--json").stdout)
    assert [item["name"] for item in found] == ["mqar"]
    assert (found[0]["task"], found[0]["model"]) == ("tagging", "decoder_lm")


def test_data_sets(zoo_cli: Call) -> None:
    result = zoo_cli("list", "--data")
    assert {"mqar", "digits", "bytes_stdlib"} <= set(names(result))
    line = next(x for x in result.stdout.splitlines() if x.startswith("text_files "))
    assert "paths=required" in line
    assert "max_bytes=none" in line
    assert "batch_size" not in line
    found = json.loads(zoo_cli("list", "mqar", "--data", "--json").stdout)
    assert found[0]["options"]["pairs"] >= 1


@pytest.mark.parametrize("name", zoo.list())
def test_info_of_every_mechanism(zoo_cli: Call, name: str) -> None:
    entry = zoo.info(name)
    known = json.loads(zoo_cli("info", name, "--json").stdout)
    assert known["name"] == name
    assert set(known["options"]) == set(entry.options)
    assert known["paper"]["url"] == entry.paper.url
    assert known["file"].endswith(".py")
    text = zoo_cli("info", name).stdout
    for fact in (
        *(entry.summary, entry.paper.title, entry.parameters, entry.traits.cost, known["file"]),
        *(f"distribution={entry.taxonomy.distribution}", *entry.options, *entry.aliases),
    ):
        assert fact in text
    # The equations stand there as they are written, line by line.
    for line in known["equations"].splitlines():
        assert line in text


def test_info_takes_aliases_and_paths(zoo_cli: Call, only_line: Call) -> None:
    assert "sliding_window (select)" in zoo_cli("info", "swa").stdout
    assert "softmax (normalize)" in zoo_cli("info", "zoo.normalize.softmax:Softmax").stdout
    result = zoo_cli("info", "sliding_windw")
    assert result.exit_code == 2
    assert only_line(result) == (
        "zoo: error: unknown mechanism 'sliding_windw'; did you mean 'sliding_window'?"
    )


def test_browsing_imports_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from zoo.cli import app\n"
        "for words in (['list'], ['info', 'mha'], ['--help'], ['list', '--json']):\n"
        "    assert CliRunner().invoke(app, words).exit_code == 0\n"
        "heavy = ('lightning', 'timm', 'datasets', 'matplotlib', 'omegaconf', 'torchmetrics')\n"
        "print(sorted(set(heavy) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
