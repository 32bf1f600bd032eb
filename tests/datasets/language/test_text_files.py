"""Local files: what paths stand for, both ways to split, and what goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from zoo import datasets
from zoo.datasets.language.text_files import find_files
from zoo.errors import ZooError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "texts"
    (root / "sub").mkdir(parents=True)
    for number in range(20):
        place = root / "sub" if number % 2 else root
        (place / f"{number:02d}.txt").write_text(f"<{number:02d}>" * 100)
    (root / "readme.md").write_text("m" * 500)
    return root


def names(files: list[Path]) -> list[str]:
    return sorted(file.name for file in files)


def test_paths_may_be_files_folders_and_wildcards(folder: Path):
    texts = [f"{number:02d}.txt" for number in range(20)]
    assert names(find_files([str(folder)], "*.txt")) == texts
    assert names(find_files([str(folder)], "*.md")) == ["readme.md"]
    assert names(find_files([str(folder / "*.txt")], "")) == texts[::2]
    assert names(find_files([str(folder / "**" / "1*.txt")], "")) == texts[10:]
    assert names(find_files([str(folder / "readme.md")], "")) == ["readme.md"]


def test_a_file_named_twice_counts_once(folder: Path):
    assert len(find_files([str(folder), str(folder / "00.txt")], "*.txt")) == 20


def test_the_order_does_not_depend_on_where_the_folder_lies(folder: Path, tmp_path: Path):
    before = [file.relative_to(folder) for file in find_files([str(folder)], "*.txt")]
    moved = folder.rename(tmp_path / "elsewhere")
    after = [file.relative_to(moved) for file in find_files([str(moved)], "*.txt")]
    assert before == after
    assert before != sorted(before)


def test_whole_files_go_to_one_split(folder: Path):
    data = datasets.create(
        "text_files", paths=str(folder), seq_len=8, val_fraction=0.1, test_fraction=0.2
    )
    texts = data.read()
    assert {split: len(text) for split, text in texts.items()} == {
        "train": 14 * 400,
        "val": 2 * 400,
        "test": 4 * 400,
    }
    found = [{text[i : i + 4] for i in range(0, len(text), 4)} for text in texts.values()]
    assert len(set.union(*found)) == sum(len(part) for part in found) == 20


def test_one_file_is_cut_by_position(tmp_path: Path):
    file = tmp_path / "one.txt"
    content = bytes(i % 251 for i in range(1000))
    file.write_bytes(content)
    data = datasets.create("text_files", paths=[str(file)], seq_len=8, val_fraction=0.1)
    texts = data.read()
    assert texts == {"train": content[:850], "val": content[850:950], "test": content[950:]}


@pytest.mark.parametrize("split", ["file", "position"])
def test_other_lengths_are_cut_out_of_the_test_text(folder: Path, split: str, whole):
    data = datasets.create(
        "text_files", paths=str(folder), split=split, seq_len=8, test_lengths=[8, 32]
    )
    data.setup()
    text = data.read()["test"]
    for length in (8, 32):
        tokens = whole(data.eval_dataloader(str(length)))["tokens"]
        assert bytes(tokens.flatten().tolist()) == text[: (len(text) - 1) // 32 * 32]


def test_position_cuts_every_file(folder: Path):
    paths = [str(folder / "00.txt"), str(folder / "02.txt")]
    texts = datasets.create("text_files", paths=paths, seq_len=8).read()
    for text in texts.values():
        assert b"00" in text
        assert b"02" in text
    assert sum(len(text) for text in texts.values()) == 800


def test_split_can_be_chosen(folder: Path):
    by_position = datasets.create("text_files", paths=str(folder), split="position", seq_len=8)
    assert len(by_position.read()["val"]) == 20 * 20
    with pytest.raises(ZooError, match=r"split 'file' needs at least 3 files; got 1.*'position'"):
        datasets.create("text_files", paths=str(folder / "00.txt"), split="file")
    with pytest.raises(ZooError, match="unknown split 'files'; did you mean 'file'"):
        datasets.create("text_files", paths=str(folder), split="files")


@pytest.mark.parametrize("split", ["file", "position"])
def test_max_bytes_limits_every_split(folder: Path, split: str):
    data = datasets.create("text_files", paths=str(folder), split=split, seq_len=8, max_bytes=1000)
    assert {s: len(text) for s, text in data.read().items()} == {
        "train": 900,
        "val": 50,
        "test": 50,
    }


def test_bytes_that_are_no_text_are_taken_as_they_are(tmp_path: Path, first):
    file = tmp_path / "raw.bin"
    file.write_bytes(bytes(range(256)) * 4)
    data = datasets.create("text_files", paths=str(file), seq_len=16, batch_size=200)
    (batch,) = first(data, 1)
    assert int(batch["tokens"].max()) == 255


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "paths is empty"),
        ("{}/none.txt", r"paths: '.*none\.txt' does not exist; allowed: a file, folder or wild"),
        ("{}/*.rst", r"stands for no file: no file matches"),
        (["{}", "{}/none"], "none' does not exist"),
    ],
)
def test_missing_paths_are_refused(folder: Path, paths, message):
    filled = paths.format(folder) if isinstance(paths, str) else [p.format(folder) for p in paths]
    with pytest.raises(ZooError, match=message):
        datasets.create("text_files", paths=filled)


def test_a_folder_without_fitting_files_names_the_pattern(folder: Path):
    with pytest.raises(ZooError, match=r"no file '\*\.rst'; change the option 'pattern'"):
        datasets.create("text_files", paths=str(folder), pattern="*.rst")


def test_an_unreadable_file_is_named(folder: Path, monkeypatch):
    data = datasets.create("text_files", paths=str(folder), seq_len=8)

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ZooError, match=r"paths: '.*\.txt' cannot be read: Permission denied"):
        data.setup()


@pytest.mark.parametrize("option", ["val_fraction", "test_fraction"])
@pytest.mark.parametrize("value", [0, 0.5, -0.1, "0.1"])
def test_impossible_fractions_are_refused(folder: Path, option, value):
    with pytest.raises(ZooError, match=rf"{option}={value!r} must be a number in \[0.001, 0.4\]"):
        datasets.create("text_files", paths=str(folder), **{option: value})


def test_a_text_that_is_too_short_is_refused(tmp_path: Path):
    file = tmp_path / "short.txt"
    file.write_text("short")
    with pytest.raises(ZooError, match=r"seq_len 128 is too long for the train split .* 5 bytes"):
        datasets.create("text_files", paths=str(file)).setup()
    file.write_text("")
    with pytest.raises(ZooError, match="which has 0 bytes"):
        datasets.create("text_files", paths=str(file)).setup()
