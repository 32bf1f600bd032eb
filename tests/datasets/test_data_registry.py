"""Finding data sets by name, their options, and the YAML files that name them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

import zoo.datasets.registry as registry
from zoo import datasets, tasks
from zoo.datasets import DataModule, dataset
from zoo.errors import ZooError

ROOT = Path(__file__).parents[2]
FILES = sorted(
    f for folder in ("synthetic", "language", "vision") for f in (ROOT / "data" / folder).iterdir()
)


def test_the_list_is_sorted_and_holds_every_module_that_registers():
    names = datasets.list()
    assert names == sorted(names)
    folder = Path(registry.__file__).parent
    modules = [f for f in folder.rglob("*.py") if "\n@dataset(" in f.read_text()]
    assert len(names) == len(modules)
    assert {"mqar", "bytes_stdlib", "digits"} <= set(names)


@pytest.mark.parametrize("name", datasets.list())
def test_every_data_set_describes_itself_and_documents_every_option(name):
    info = datasets.info(name)
    assert info.name == name
    assert info.task in tasks.names()
    assert info.summary.endswith(".")
    assert {"batch_size", "eval_batch_size", "seed"} <= info.options.keys()
    doc = registry._find(name).__doc__
    for option in (*info.options, *info.required):
        assert f"\n        {option}: " in doc, option


def test_a_name_gives_the_module_with_its_options():
    data = datasets.create("mqar", vocab_size=64, seq_len=32, pairs=4, batch_size=5)
    assert isinstance(data, DataModule)
    assert (data.name, data.vocab_size, data.batch_size) == ("mqar", 64, 5)


def test_unknown_names_and_options_name_the_nearest():
    with pytest.raises(ZooError, match="unknown data set 'mqr'; did you mean 'mqar'"):
        datasets.create("mqr")
    with pytest.raises(ZooError, match="unknown data set 'digit'; did you mean 'digits'"):
        datasets.info("digit")
    with pytest.raises(ZooError, match="option of data set 'mqar' 'vocab'; did you mean 'vocab_s"):
        datasets.create("mqar", vocab=3)


def test_a_missing_option_is_named():
    assert datasets.info("text_files").required == ("paths",)
    with pytest.raises(ZooError, match="'text_files' needs the option 'paths'"):
        datasets.create("text_files")


def test_names_are_taken_once_and_in_snake_case(monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    with pytest.raises(ZooError, match="not snake_case"):
        dataset("Mqar")
    with pytest.raises(ZooError, match=r"'mqar' is taken by zoo\.datasets\.synthetic\.mqar\.MQAR"):
        dataset("mqar")(DataModule)


def test_a_data_set_from_outside_is_found(monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))

    @dataset("mine")
    @dataclass(kw_only=True, eq=False, repr=False)
    class Mine(DataModule):
        """My own."""

        extra: int = 3
        task = "tagging"

    assert "mine" in datasets.list()
    assert datasets.info("mine").options["extra"] == 3
    assert datasets.create("mine", extra=4).extra == 4


@pytest.mark.parametrize("file", FILES, ids=[f.stem for f in FILES])
def test_every_yaml_file_builds_what_it_describes(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    data = datasets.from_yaml(file, batch_size=3)
    assert data.batch_size == 3
    tasks = {
        "vision": [
            *("classification", "objects", "object_videos", "properties", "restoration", "sets")
        ],
        "synthetic": ["tagging", "regression", "collapse"],
        "language": ["language"],
    }
    assert data.task in tasks[file.parent.name]


def test_every_data_set_has_a_yaml_file_of_its_name():
    assert set(datasets.list()) <= {file.stem for file in FILES}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("options: {}", "needs the key 'name'"),
        ("- mqar", "needs the key 'name'"),
        ("name: mqar\nopts: {}", "unknown key .*did you mean 'options'"),
        ("name: mqar\noptions: 3", "options in data file .* is 3"),
        ("name: mqar\noptions: {pair: 3}", "did you mean 'pairs'"),
        ("name: [", "cannot be read"),
        ("name: ${nothing}", "cannot be read"),
    ],
)
def test_a_wrong_yaml_file_is_refused(tmp_path, content, message):
    file = tmp_path / "wrong.yaml"
    file.write_text(content)
    with pytest.raises(ZooError, match=message):
        datasets.from_yaml(file)


def test_a_missing_yaml_file_is_refused(tmp_path):
    with pytest.raises(ZooError, match="cannot be read"):
        datasets.from_yaml(tmp_path / "none.yaml")
