"""Pictures written number by number: PNG and TIFF by hand, the rest by Pillow."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(values: np.ndarray, bits: int, colour: int, *extra: bytes) -> bytes:
    """Return a PNG of numbers (H, W) or (H, W, channels).

    Args:
        values: The numbers.
        bits: 8 or 16 for each.
        colour: 0 grey, 2 RGB, 3 indices of a palette, 4 grey and alpha, 6 RGBA.
        extra: Further chunks.
    """
    height, width = values.shape[:2]
    rows = values.astype(">u2" if bits == 16 else "u1")
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    pieces = (chunk(b"IHDR", head), *extra, chunk(b"IDAT", body), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(pieces)


def palette(*colours: tuple[int, int, int]) -> bytes:
    return chunk(b"PLTE", bytes(number for colour in colours for number in colour))


def tiff(
    body: bytes,
    size: tuple[int, int],
    bits: int,
    *,
    channels: int = 1,
    photometric: int = 1,
    sample: int = 1,
    order: str = "<",
) -> bytes:
    """Return a TIFF without compression; `sample` is 1 unsigned, 2 signed, 3 floating point."""
    height, width = size
    depths = struct.pack(f"{order}{channels}H", *[bits] * channels)
    end = 8 + len(body) + len(body) % 2
    tags: list[tuple[int, int, int, int]] = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, channels, bits if channels == 1 else end),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, 1, 8),
        (277, 3, 1, channels),
        (278, 4, 1, height),
        (279, 4, 1, len(body)),
        (339, 3, 1, sample),
    ]
    found = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", end + len(depths))
    found += body + bytes(len(body) % 2) + depths + struct.pack(f"{order}H", len(tags))
    for tag, kind, count, value in tags:
        found += struct.pack(f"{order}HHI", tag, kind, count)
        short = kind == 3 and count == 1
        found += struct.pack(f"{order}HH", value, 0) if short else struct.pack(f"{order}I", value)
    return found + bytes(4)


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def exif(orientation: int) -> bytes:
    """Return EXIF with this one entry: 0x112, a short number."""
    entry = struct.pack("<HHIHH", 0x112, 3, 1, orientation, 0)
    return b"II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
