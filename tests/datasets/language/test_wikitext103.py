"""WikiText-103 from local files and, with the download replaced, from the hub."""

from __future__ import annotations

from pathlib import Path

import datasets as hf
import pytest

from zoo import datasets
from zoo.datasets import hub
from zoo.errors import ZooError

ROWS = {
    "train": ["", " = Title = \n", "", " Some words . \n"] * 40,
    "validation": [" val words \n"] * 40,
    "test": [" test words \n", ""] * 40,
}
EXPECTED = {
    "train": b"\n = Title = \n\n Some words . \n" * 40,
    "val": b" val words \n" * 40,
    "test": b" test words \n\n" * 40,
}


def fake() -> hf.DatasetDict:
    return hf.DatasetDict({s: hf.Dataset.from_dict({"text": rows}) for s, rows in ROWS.items()})


def write_parquet(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in fake().items():
        half = len(rows) // 2
        for number, part in enumerate((range(half), range(half, len(rows)))):
            rows.select(part).to_parquet(folder / f"{split}-0000{number}-of-00002.parquet")


def test_lines_of_the_hub_get_one_newline_each(monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "load", lambda *names, **_: asked.append(names) or fake())
    data = datasets.create("wikitext103", seq_len=16)
    assert data.read() == EXPECTED
    assert asked == [("Salesforce/wikitext", "wikitext-103-raw-v1")]


@pytest.mark.parametrize("sub", ["", "wikitext-103-raw-v1"])
def test_local_parquet_files_give_the_same_text(tmp_path: Path, monkeypatch, sub: str):
    write_parquet(tmp_path / sub)
    monkeypatch.setattr(hub, "load", lambda *_, **__: pytest.fail("asked the hub"))
    data = datasets.create("wikitext103", root=str(tmp_path), seq_len=16)
    assert data.read() == EXPECTED


def test_local_raw_files_are_taken_as_they_are(tmp_path: Path):
    for word in ("train", "valid", "test"):
        (tmp_path / f"wiki.{word}.raw").write_bytes(f" {word} \n \n".encode() * 30)
    data = datasets.create("wikitext103", root=str(tmp_path), seq_len=16)
    assert data.read()["val"] == b" valid \n \n" * 30
    data.setup()
    assert data.size("test") == (30 * 9 - 1) // 16


def test_max_bytes_stops_reading(monkeypatch):
    monkeypatch.setattr(hub, "load", lambda *_, **__: fake())
    data = datasets.create("wikitext103", seq_len=16, max_bytes=400)
    assert [len(text) for text in data.read().values()] == [360, 20, 20]


def test_missing_folders_and_splits_are_refused(tmp_path: Path):
    with pytest.raises(ZooError, match="is not a folder; allowed: a folder with WikiText-103"):
        datasets.create("wikitext103", root=str(tmp_path / "none"))
    (tmp_path / "wiki.train.raw").write_text("x")
    with pytest.raises(ZooError, match=r"no file for 'val'; it has \['wiki.train.raw'\]"):
        datasets.create("wikitext103", root=str(tmp_path))


def test_files_that_are_no_parquet_are_refused(tmp_path: Path):
    for word in ("train", "validation", "test"):
        (tmp_path / f"{word}.parquet").write_bytes(b"no parquet")
    data = datasets.create("wikitext103", root=str(tmp_path))
    with pytest.raises(ZooError, match=r"'train\.parquet' is not a parquet file"):
        data.setup()


def test_a_parquet_file_with_other_columns_is_refused(tmp_path: Path):
    for word in ("train", "validation", "test"):
        hf.Dataset.from_dict({"line": ["x"]}).to_parquet(tmp_path / f"{word}.parquet")
    data = datasets.create("wikitext103", root=str(tmp_path))
    with pytest.raises(ZooError, match=r"has the columns \['line'\]; needed: \['text'\]"):
        data.setup()


def with_a_null() -> hf.DatasetDict:
    rows = {split: [*texts, None, "more"] for split, texts in ROWS.items()}
    return hf.DatasetDict({s: hf.Dataset.from_dict({"text": texts}) for s, texts in rows.items()})


def test_a_null_row_of_the_hub_is_named(monkeypatch):
    monkeypatch.setattr(hub, "load", lambda *_, **__: with_a_null())
    wanted = r"^row 160, counted from 0, of split 'train' of Salesforce/wikitext, column 'text', "
    with pytest.raises(ZooError, match=wanted + r"holds null; needed: str$"):
        datasets.create("wikitext103", seq_len=16).setup()


def test_a_null_row_of_a_file_is_named(tmp_path: Path):
    for split, rows in with_a_null().items():
        # Rows come in pieces that end with the groups of the file.
        rows.to_parquet(tmp_path / f"{split}.parquet", batch_size=7)
    data = datasets.create("wikitext103", root=str(tmp_path), seq_len=16)
    with pytest.raises(ZooError, match=r"^row 160, counted from 0, of 'train.parquet', column"):
        data.setup()
