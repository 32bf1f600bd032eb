"""IDX files, the format of MNIST: magic number, sizes, then bytes; plain or compressed."""

from __future__ import annotations

import gzip
import struct
import zlib
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from zoo.errors import ZooError

_UNSIGNED_BYTE = 0x08


def find_idx(folder: Path, stem: str) -> Path | None:
    """Return the file of that name in a folder, or None.

    Args:
        folder: Where to look.
        stem: Name such as ``"train-images-idx3-ubyte"``; ``"train-images.idx3-ubyte"`` and the
            ending ``.gz`` are recognised as well.
    """
    for name in (stem, stem.replace("-idx", ".idx")):
        for ending in ("", ".gz"):
            if (folder / (name + ending)).is_file():
                return folder / (name + ending)
    return None


def read_idx(file: Path) -> Tensor:
    """Read an IDX file of unsigned bytes as a tensor of its shape.

    Args:
        file: IDX file; ``.gz`` is decompressed.

    Raises:
        ZooError: The file cannot be read, is no IDX file of bytes, or has the wrong length.
    """
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ZooError(f"IDX file {file.name!r} cannot be read: {error}") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTE:
        raise ZooError(
            f"{file.name!r} is not an IDX file of unsigned bytes; it starts with "
            f"{content[:4].hex(' ')}, expected 00 00 08 and the number of dimensions"
        )
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise ZooError(f"IDX file {file.name!r} ends within its header")
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    if len(content) - start != prod(shape):
        raise ZooError(
            f"IDX file {file.name!r} of shape {shape} needs {prod(shape)} bytes of data; "
            f"it has {len(content) - start}"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].reshape(shape)
