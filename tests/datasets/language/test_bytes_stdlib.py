"""The standard library as a text: which files, how they are split, and what the limit does."""

from __future__ import annotations

from pathlib import Path

import pytest

from zoo import datasets
from zoo.datasets.language import bytes_stdlib
from zoo.datasets.language.bytes_stdlib import library_files, library_root
from zoo.errors import ZooError


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of 400 small files and some that do not belong."""
    for number in range(400):
        folder = tmp_path / f"package{number % 7}"
        folder.mkdir(exist_ok=True)
        (folder / f"module{number}.py").write_text(f"value = {number}\n" * 5)
    for name in (
        *("test/a.py", "package0/tests/b.py", "site-packages/c/d.py", "idlelib/e.py"),
        *("config-3-x/f.py", "_sysconfigdata__x.py", "notes.txt", "encodings/g.py"),
    ):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text("excluded")
    (tmp_path / "link.py").symlink_to(tmp_path / "notes.txt")
    monkeypatch.setattr(bytes_stdlib, "library_root", lambda: tmp_path)
    return tmp_path


def test_files_are_split_as_a_whole_and_only_source_is_taken(library: Path):
    splits = library_files(library)
    listed = [name for names in splits.values() for name in names]
    assert len(listed) == len(set(listed)) == 400
    assert all(name.startswith("package") and "/module" in name for name in listed)
    assert 5 < len(splits["val"]) < 45
    assert 5 < len(splits["test"]) < 45


def test_where_a_file_lies_does_not_depend_on_the_others(library: Path):
    before = library_files(library)
    (library / "new_module.py").write_text("new")
    for name in before["val"][:3]:
        (library / name).unlink()
    after = library_files(library)
    assert [n for n in after["test"] if n != "new_module.py"] == before["test"]


def test_the_text_is_that_of_the_files(library: Path):
    data = datasets.create("bytes_stdlib", seq_len=8)
    texts = data.read()
    splits = library_files(library)
    for split, names in splits.items():
        assert texts[split] == b"".join((library / name).read_bytes() for name in names)


def test_the_fingerprint_notices_one_changed_byte(library: Path):
    def fingerprint() -> str:
        data = datasets.create("bytes_stdlib", seq_len=8)
        data.setup()
        return data.fingerprint

    before = fingerprint()
    assert fingerprint() == before
    file = library / library_files(library)["test"][0]
    file.write_bytes(file.read_bytes().replace(b"v", b"w", 1))
    assert fingerprint() != before


def test_a_python_without_source_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(bytes_stdlib, "library_root", lambda: tmp_path)
    with pytest.raises(ZooError, match="seems to come without source; use 'text_files'"):
        datasets.create("bytes_stdlib").setup()


def test_the_real_library_is_large_and_python(whole):
    root = library_root()
    splits = library_files(root)
    assert "dataclasses.py" in {name for names in splits.values() for name in names}
    assert not any("test" in name.split("/") for names in splits.values() for name in names)
    data = datasets.create("bytes_stdlib", seq_len=64, max_bytes=200_000)
    assert {split: len(text) for split, text in data.read().items()} == {
        "train": 180_000,
        "val": 10_000,
        "test": 10_000,
    }
    assert data.task == "language"
    assert (data.vocab_size, data.bytes_per_token, data.max_seq_len) == (256, 1.0, 64)
    text = data.decode(whole(data.val_dataloader())["tokens"].flatten().tolist())
    assert "def " in text
    assert "import " in text
