from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.errors import ZooError
from zoo.report import files
from zoo.runs.records import Record, RecordWarning, read, read_all, write

NAMES = [item.name for item in fields(Record)]

words = st.text(min_size=1, max_size=12)
numbers = st.floats(allow_nan=True, allow_infinity=True)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
changes = st.fixed_dictionaries(
    {
        "recipe": words,
        "attention": words,
        "seed": st.integers(0, 2**40),
        "lr": st.floats(min_value=1e-12, max_value=1e3),
        "report": numbers,
        "select": numbers,
        "config": st.dictionaries(words, plain, max_size=4),
        "history": st.lists(
            st.fixed_dictionaries({"step": st.integers(0, 10**9), "train/loss": numbers}),
            max_size=3,
        ),
        "versions": st.dictionaries(words, words, max_size=3),
        "parameters": st.none() | st.integers(0, 10**12),
        "step_time_cpu": st.none() | st.floats(0, 1e6),
        "commit": st.none() | words,
        "conv": st.booleans(),
    }
)


def strict(text):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


@given(changes=changes)
@settings(max_examples=60, deadline=None)
def test_json_round_trip(make, changes):
    record = make(**changes)
    text = record.to_json()
    again = Record.from_json(text)
    assert again == record
    assert again.to_json() == text
    assert set(strict(text)) == set(NAMES)


def test_json_has_sorted_keys_and_ends_with_a_newline(make):
    text = make(config={"b": 1, "a": 2}).to_json()
    assert list(strict(text)) == sorted(NAMES)
    assert list(strict(text)["config"]) == ["a", "b"]
    assert text.endswith("}\n")


def test_numbers_that_json_lacks_are_written_as_words(make):
    record = make(report=math.nan, select=-math.inf, config={"clip": math.inf})
    loaded = strict(record.to_json())
    assert loaded["metrics"] == {"test/accuracy": "nan", "val/accuracy": "-inf"}
    again = Record.from_json(record.to_json())
    assert math.isnan(again.metrics["test/accuracy"])
    assert again.metrics["val/accuracy"] == -math.inf
    assert again.config == {"clip": "inf"}


def test_values_take_the_form_that_json_gives_back(make):
    record = make(
        seed=np.int64(3),
        report=np.float32(0.5),
        config={"betas": (0.9, 0.95), 1: np.float64(2.0)},
        created="2026-01-01T02:30:00+02:30",
    )
    assert type(record.seed) is int
    assert type(record.metrics["test/accuracy"]) is float
    assert record.config == {"betas": [0.9, 0.95], "1": 2.0}
    assert record.created == "2026-01-01T00:00:00+00:00"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("id", "a/b"),
        ("id", ".."),
        ("id", "x" * 201),
        ("id", 3),
        ("recipe", ""),
        ("attention", None),
        ("seed", -1),
        ("seed", 1.5),
        ("seed", True),
        ("lr", 0.0),
        ("lr", "nan"),
        ("lr", True),
        ("status", "done"),
        ("metric", {"select": "a", "report": "b", "mode": "max"}),
        ("metric", {"select": "a", "report": "b", "mode": "up", "solved": None}),
        ("metrics", {"val/accuracy": "high"}),
        ("metrics", [("val/accuracy", 1.0)]),
        ("metrics", {"val/accuracy": 10**400, "test/accuracy": 1.0}),
        ("history", [{"val/accuracy": 1.0}]),
        ("history", [{"step": 1.5}]),
        ("history", {"step": 1}),
        ("steps", None),
        ("conv", 3),
        ("data", {"name": "mqar"}),
        ("device", {"type": "cpu", "name": "x", "threads": "two"}),
        ("versions", {"torch": 2}),
        ("created", "yesterday"),
        ("created", "2026-01-01T00:00:00"),
        ("created", "0001-01-01T00:00:00+14:00"),
        ("config", []),
        ("config", {"path": object()}),
        ("config", {1: "a", "1": "b"}),
        ("parameters", -5),
        ("step_time_cpu", math.inf),
        ("peak_memory_bytes", 1.5),
        ("commit", ""),
        ("schema", 2),
        ("schema", True),
    ],
)
def test_a_wrong_value_is_refused_by_name(make, name, value):
    with pytest.raises(ZooError, match=rf"record field {name}\b\S*( '|=\S.* must be )") as caught:
        make(**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"steps": 3.5},
            "record field steps=3.5 must be a whole number of at least 0 (nearest: 3, 4)",
        ),
        (
            {"parameters": -5},
            "record field parameters=-5 must be a whole number of at least 0, or None",
        ),
        ({"lr": "nan"}, "record field lr='nan' must be a number above 0"),
        ({"versions": {"torch": 2}}, "record field versions.torch=2 must be a non-empty string"),
        ({"status": "finish"}, "unknown record field status 'finish'; did you mean 'finished'?"),
        ({"schema": 2}, "record field schema=2 must be 1"),
        (
            {"history": [{"step": 1}, {"step": -1}]},
            "record field history[1].step=-1 must be a whole number of at least 0",
        ),
    ],
)
def test_an_error_says_that_it_is_about_a_record(make, change, message):
    with pytest.raises(ZooError) as caught:
        make(**change)
    assert str(caught.value) == message


def test_a_finished_record_needs_the_figures_it_is_about(make):
    with pytest.raises(ZooError, match="lacks 'test/accuracy'"):
        make(metrics={"val/accuracy": 1.0})
    with pytest.raises(ZooError, match="field error='but it finished' must be None"):
        make(error="but it finished")


def test_a_failed_record_needs_its_reason(make):
    with pytest.raises(ZooError, match="field error=None must be the reason"):
        make(status="failed", error=None)
    assert make(status="nan", error=None).metrics == {}


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_field_is_refused_by_name(make, name):
    loaded = strict(make().to_json())
    del loaded[name]
    with pytest.raises(ZooError, match=f"without '{name}'"):
        Record.from_json(json.dumps(loaded))


def test_an_unknown_field_is_refused_with_the_nearest_name(make):
    loaded = strict(make().to_json()) | {"sede": 1}
    with pytest.raises(ZooError, match="'sede'; did you mean 'seed'"):
        Record.from_json(json.dumps(loaded))


def test_another_schema_is_named_before_its_other_fields(make):
    with pytest.raises(ZooError, match=r"^record field schema=2 must be 1$"):
        Record.from_json('{"schema": 2, "accuracy": 1}')


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"lr": NaN}', "[" * 100_000])
def test_what_is_no_record_is_refused(text):
    with pytest.raises(ZooError, match="not"):
        Record.from_json(text)


def test_write_creates_the_folder_and_replaces_an_older_record(make, tmp_path):
    folder = tmp_path / "a" / "b"
    first = make(id="run", status="failed")
    path = write(first, folder)
    assert path == folder / "run.json"
    assert read(path) == first
    second = make(id="run")
    write(second, folder)
    assert read(path) == second
    assert os.listdir(folder) == ["run.json"]
    assert path.read_bytes() == second.to_json().encode()


def test_a_written_record_is_as_readable_as_other_files(make, tmp_path):
    plain_file = tmp_path / "plain"
    plain_file.touch()
    assert write(make(), tmp_path).stat().st_mode == plain_file.stat().st_mode


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("problem", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_write_that_breaks_leaves_the_old_record(make, tmp_path, monkeypatch, step, problem):
    old = make(id="run", seed=1)
    write(old, tmp_path)

    def fail(*arguments):
        raise problem

    with monkeypatch.context() as patch:
        patch.setattr(files.os, step, fail)
        with pytest.raises((ZooError, KeyboardInterrupt)) as caught:
            write(make(id="run", seed=2), tmp_path)
    if isinstance(problem, OSError):
        assert str(caught.value) == (
            f"cannot write run.json in the folder {tmp_path}: No space left"
        )
    assert read_all(tmp_path) == [old]
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_folder_that_is_a_file_is_an_error_that_names_it(make, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ZooError, match=r"in the folder .*file: ") as caught:
        write(make(), tmp_path / "file")
    assert "\n" not in str(caught.value)


def test_read_names_the_file(make, tmp_path):
    with pytest.raises(ZooError, match=r"gone\.json: No such file"):
        read(tmp_path / "gone.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ZooError, match=r"bytes\.json: "):
        read(tmp_path / "bytes.json")


def test_read_all_is_sorted_whatever_the_files_are_called(make, tmp_path):
    seeds = [make(id=f"{9 - seed}", seed=seed) for seed in range(4)]
    other = make(id="a", track="copy")
    for record in [*seeds, other]:
        write(record, tmp_path)
    assert read_all(tmp_path) == [other, *seeds]


def test_read_all_skips_what_is_no_record_and_keeps_it(make, tmp_path):
    good = make()
    write(good, tmp_path)
    whole = good.to_json()
    odd = {
        "half.json": whole[: len(whole) // 2],
        "foreign.json": "[1, 2, 3]",
        "copy of it.json": whole,
    }
    for name, text in odd.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "notes.txt").write_text("not read at all")
    with pytest.warns(RecordWarning) as caught:
        found = read_all(tmp_path)
    assert found == [good]
    messages = [str(item.message) for item in caught]
    assert len(messages) == len(odd)
    assert all(sum(name in message for message in messages) == 1 for name in odd)
    assert all((tmp_path / name).read_text() == text for name, text in odd.items())


def test_read_all_reads_inner_folders_only_if_asked(make, tmp_path):
    outer, inner = make(seed=1), make(seed=2)
    write(outer, tmp_path)
    write(inner, tmp_path / "inner")
    assert read_all(tmp_path) == [outer]
    assert read_all(tmp_path, recursive=True) == [outer, inner]
    deeper = make(seed=3)
    write(deeper, tmp_path / "other" / "inner")
    assert read_all(tmp_path, recursive=True, without="inner") == [outer, deeper]


def test_of_two_records_with_one_id_the_newer_counts(make, tmp_path):
    old = make(id="run", created="2026-01-01T00:00:00Z")
    new = replace(old, seed=5, created="2026-01-02T00:00:00Z")
    write(new, tmp_path / "a")
    write(old, tmp_path / "b")
    with pytest.warns(RecordWarning, match="two records of 'run'"):
        assert read_all(tmp_path, recursive=True) == [new]
    write(new, tmp_path / "b")
    assert read_all(tmp_path, recursive=True) == [new]  # a plain copy needs no warning


def test_read_all_refuses_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ZooError, match="gone does not exist"):
        read_all(tmp_path / "gone")


WRITERS = """
import multiprocessing, sys
from dataclasses import replace
from zoo.runs.records import Record, write

record, folder = Record.from_json(open(sys.argv[1]).read()), sys.argv[2]

def work(writer):
    for i in range(12):
        write(replace(record, id=f"w{writer}-{i}", seed=i), folder)
        write(replace(record, id="shared", seed=writer), folder)

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(n,)) for n in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.exit(any(worker.exitcode for worker in workers))
"""


def test_many_processes_that_write_at_once_lose_nothing(make, tmp_path):
    (tmp_path / "template").write_text(make(id="template").to_json())
    folder = tmp_path / "records"
    command = [sys.executable, "-c", WRITERS, str(tmp_path / "template"), str(folder)]
    subprocess.run(command, check=True, timeout=120)
    ids = {record.id for record in read_all(folder)}
    assert ids == {f"w{writer}-{i}" for writer in range(8) for i in range(12)} | {"shared"}
    assert len(os.listdir(folder)) == len(ids)
