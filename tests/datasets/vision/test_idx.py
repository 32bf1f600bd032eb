"""IDX files: reading what a writer of their format wrote, and refusing everything else."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch

from zoo.datasets.vision.idx import find_idx, read_idx
from zoo.errors import ZooError


def encode(values: torch.Tensor) -> bytes:
    head = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return head + values.to(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 28, 28), (0, 3, 3)])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_written_file_is_read_back(tmp_path: Path, shape, ending):
    values = torch.randint(256, shape)
    content = encode(values)
    file = tmp_path / f"values{ending}"
    file.write_bytes(gzip.compress(content) if ending else content)
    found = read_idx(file)
    assert found.dtype == torch.uint8
    assert torch.equal(found.long(), values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file of unsigned bytes"),
        (b"\x89PNG....", "starts with 89 50 4e 47, expected 00 00 08"),
        (b"\0\0\x0d\x01\0\0\0\x01abcd", "not an IDX file of unsigned bytes"),
        (b"\0\0\x08\x03\0\0\0\x01", "ends within its header"),
        (encode(torch.zeros(2, 3))[:-1], r"of shape \(2, 3\) needs 6 bytes of data; it has 5"),
        (encode(torch.zeros(2, 3)) + b"x", "it has 7"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content, message):
    file = tmp_path / "values"
    file.write_bytes(content)
    with pytest.raises(ZooError, match=message):
        read_idx(file)


@pytest.mark.parametrize("damage", ["not gzip at all", "cut", "flipped"])
def test_a_broken_archive_is_refused(tmp_path: Path, damage):
    packed = gzip.compress(encode(torch.randint(256, (40, 40))))
    content = {
        "not gzip at all": b"plain",
        "cut": packed[:-20],
        "flipped": packed[:30] + bytes([packed[30] ^ 255]) + packed[31:],
    }[damage]
    file = tmp_path / "values.gz"
    file.write_bytes(content)
    with pytest.raises(ZooError, match=r"'values\.gz' cannot be read"):
        read_idx(file)


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(ZooError, match="cannot be read"):
        read_idx(tmp_path / "none")


@pytest.mark.parametrize(
    "name", ["t10k-images-idx3-ubyte", "t10k-images.idx3-ubyte", "t10k-images-idx3-ubyte.gz"]
)
def test_both_ways_to_write_the_name_are_found(tmp_path: Path, name):
    assert find_idx(tmp_path, "t10k-images-idx3-ubyte") is None
    (tmp_path / name).write_bytes(b"")
    assert find_idx(tmp_path, "t10k-images-idx3-ubyte") == tmp_path / name
