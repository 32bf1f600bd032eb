"""Pictures from files, or from the bytes of files: the one reader of all data sets.

Pillow decodes; what the numbers mean is settled here, once for every data set.

Pictures, `read_image`:

    values        from 0 to 1: 8 bits / 255, grey of 16 bits / 65535 (a TIFF's of 12 bits / 4095),
                  floating point as it is; numbers outside are refused. Of colours of 16 bits
                  Pillow gives the upper byte, which is what is read.
    orientation   as it is to be looked at: EXIF's is applied, in all eight cases
    alpha         dropped, as torchvision and timm do: pixels have the colour they were stored with
    palettes      the colours that stand in them; CMYK becomes (255 - C)(255 - K) / 255 and so on,
                  without colour profiles; colour becomes grey by 0.299 R + 0.587 G + 0.114 B
    animation     the first frame (GIF, APNG, WebP) or page (TIFF), as torchvision and timm do

Labels and masks, `read_labels` and `read_mask`:

    numbers       those in the file: a palette's index and not its colour, grey as it is stored; a
                  colour counts as one number, 65536 R + 256 G + B. 0 is outside, all else inside.
    alpha         Where some pixels are wholly transparent and others are not, those that are lie
                  outside, whatever their colour; and if all that are not have one number, they lie
                  inside, even if it is 0: a black shape on nothing is a shape. Where all pixels are
                  transparent their numbers count, or nothing lies inside if they have only one.
    orientation, animation   as above
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from zoo.errors import ZooError, unknown

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = ("RGB", "L")
"""Colour and grey, in Pillow's words."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
"""Endings of the files in a folder that are taken for pictures."""
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
"""TIFF's tags for the bits of a number and for what a number means."""


class Unreadable(ZooError):
    """A picture that is missing, broken or none.

    Args:
        path: The file, or words that say where the picture lies.
        reason: What is wrong with it; without one, `path` is the whole message.
    """

    def __init__(self, path: Path | str, reason: str = "") -> None:
        # Exceptions are rebuilt from their message where they come out of a worker process.
        name = repr(str(path)) if isinstance(path, Path) else path
        super().__init__(f"{name} cannot be read: {reason}" if reason else name)
        self.path, self.reason = path, reason


def read_image(source: Path | bytes, mode: str = "RGB", where: str | None = None) -> Tensor:
    """Read a picture as numbers (C, H, W) from 0 to 1, in float32.

    Args:
        source: A file, or its content.
        mode: "RGB" for colour, "L" for grey.
        where: What errors call it; None takes the file's name.

    Raises:
        Unreadable: It is missing, broken, none, or of a kind that has no known range.
        ZooError: An unknown mode.
    """
    return as_unit(read_pixels(source, mode, where))


def read_pixels(source: Path | bytes, mode: str = "RGB", where: str | None = None) -> Tensor:
    """Read a picture in the least memory that loses nothing, (C, H, W).

    Args:
        source: A file, or its content.
        mode: "RGB" for colour, "L" for grey.
        where: What errors call it; None takes the file's name.

    Returns:
        Bytes where the file has 8 bits or fewer for a number, otherwise float32 from 0 to 1.

    Raises:
        Unreadable: It is missing, broken, none, or of a kind that has no known range.
        ZooError: An unknown mode.
    """
    if mode not in MODES:
        raise unknown("mode of a picture", mode, MODES)
    place = _place(source, where)
    image, top = _decoded(source, place)
    if _deep(image):
        grey = torch.from_numpy(_grey(image, top, place) / top).float()
        return grey[None].repeat(len(mode), 1, 1)
    # Left in, it would make Pillow warn, or take one colour for another.
    image.info.pop("transparency", None)
    pixels = torch.from_numpy(_converted(image, mode, place))
    return pixels[None] if mode == "L" else pixels.permute(2, 0, 1).contiguous()


def read_labels(source: Path | bytes, where: str | None = None) -> Tensor:
    """Read a picture of labels as whole numbers (H, W) in int64, 0 for what is outside.

    Args:
        source: A file, or its content.
        where: What errors call it; None takes the file's name.

    Raises:
        Unreadable: It is missing, broken or none, or its numbers are negative or not whole.
    """
    place = _place(source, where)
    image, _ = _decoded(source, place)
    numbers, seen = _numbers(image, place), _seen(image, place)
    if not seen.all():
        shown = numbers[seen] if seen.any() else numbers.ravel()
        alike = bool((shown == shown[0]).all())
        if seen.any():
            numbers = np.where(seen, (shown[0] or 1) if alike else numbers, 0)
        elif alike:
            numbers = np.zeros_like(numbers)
    return torch.from_numpy(numbers)


def read_mask(source: Path | bytes, where: str | None = None) -> Tensor:
    """Read a mask (1, H, W) in bool: where `read_labels` does not give 0.

    Args:
        source: A file, or its content.
        where: What errors call it; None takes the file's name.

    Raises:
        Unreadable: It is missing, broken or none, or its numbers are negative or not whole.
    """
    return read_labels(source, where)[None] != 0


def as_unit(pixels: Tensor) -> Tensor:
    """Return pixels as float32 from 0 to 1; bytes are divided by 255."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


def as_bytes(pixels: Tensor) -> Tensor:
    """Return pixels as bytes; numbers from 0 to 1 become the nearest of 256 levels."""
    return pixels if pixels.dtype == torch.uint8 else (pixels * 255).round().to(torch.uint8)


def scaled(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale bytes in colour (3, H, W) to another height and width, smoothly."""
    from PIL import Image

    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    picture = picture.resize(size[::-1], Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def cell(value: object, where: str) -> Path | bytes:
    """Return the picture that a cell of a table holds: the content of a file, or its path.

    Args:
        value: The cell: bytes, or a mapping with ``bytes`` or an absolute ``path``, as in
            ``datasets``.
        where: What errors call it.

    Raises:
        Unreadable: It is null or holds no picture.
    """
    if isinstance(value, Mapping):
        path, value = value.get("path"), value.get("bytes")
        if value is None and isinstance(path, str):
            # A path that is not absolute was one in somebody else's folder.
            if Path(path).is_absolute():
                return Path(path)
            raise Unreadable(where, f"it has no bytes, only the path {path!r}")
    if value is None:
        raise Unreadable(where, "it is null")
    if not isinstance(value, bytes):
        raise Unreadable(where, f"it is of type {type(value).__name__} and no picture")
    return value


def _place(source: Path | bytes, where: str | None) -> Path | str:
    return where or (source if isinstance(source, Path) else "a picture in bytes")


def _decoded(source: Path | bytes, place: Path | str) -> tuple[Image, int]:
    """Decode a picture and turn it upright.

    Returns:
        The picture, and the number that means white where numbers have more than 8 bits.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
            upright = ImageOps.exif_transpose(image)
            tags = getattr(image, "tag_v2", {})
    except UnidentifiedImageError as error:
        raise Unreadable(place, "no picture that Pillow knows, or its beginning only") from error
    # Each of Pillow's decoders has ways of its own to fail on a broken file.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise Unreadable(place, reason) from error
    if not upright.mode.startswith("I;16"):
        return upright, 1 if upright.mode == "F" else 65535
    top = 2 ** tags.get(_BITS, (16,))[0] - 1
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        # Pillow turns such numbers round itself if they have 8 bits, but not these.
        upright = Image.fromarray((top - np.asarray(upright)).astype(np.uint16))
    return upright, top


def _deep(image: Image) -> bool:
    """Tell whether the numbers of a picture have more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def _grey(image: Image, top: int, place: Path | str) -> np.ndarray:
    """Return numbers of more than 8 bits in float64, none of them outside 0 to `top`."""
    # Some NaN warn when they are cast; all are refused below.
    with np.errstate(invalid="ignore"):
        numbers = np.asarray(image).astype(np.float64)
    if not (numbers.min() >= 0 and numbers.max() <= top):
        raise Unreadable(
            place,
            f"its numbers go from {numbers.min():g} to {numbers.max():g}; allowed in pictures of "
            f"Pillow's mode {image.mode!r}: 0 (black) to {top} (white)",
        )
    return numbers


def _converted(image: Image, mode: str, place: Path | str) -> np.ndarray:
    # What Pillow cannot convert to every mode in one step.
    plain = {"RGBa": "RGBA", "La": "LA", "LAB": "RGB"}.get(image.mode)
    try:
        return np.array((image.convert(plain) if plain else image).convert(mode))
    except ValueError as error:
        raise Unreadable(place, f"Pillow cannot convert {image.mode} to {mode}") from error


def _numbers(image: Image, place: Path | str) -> np.ndarray:
    """Return the numbers of a picture of labels as they stand in the file, (H, W) in int64."""
    if _deep(image):
        numbers = np.asarray(image)
        if not (numbers.min() >= 0 and numbers.max() < 2**31 and (numbers % 1 == 0).all()):
            raise Unreadable(place, "labels must be whole numbers, from 0 to 2147483647")
        return numbers.astype(np.int64)
    if image.mode in ("P", "PA"):
        return np.asarray(image.getchannel(0)).astype(np.int64)
    if image.mode in ("1", "L", "LA", "La"):
        return _converted(image, "LA", place)[..., 0].astype(np.int64)
    red, green, blue = np.moveaxis(_converted(image, "RGBA", place), 2, 0)[:3].astype(np.int64)
    return (red << 16) + (green << 8) + blue


def _seen(image: Image, place: Path | str) -> np.ndarray:
    """Return where a picture is not wholly transparent, (H, W) in bool."""
    if _deep(image):
        # No label is negative, so that -1 hides none.
        return np.asarray(image) != image.info.get("transparency", -1)
    if image.has_transparency_data:
        return _converted(image, "RGBA", place)[..., 3] > 0
    return np.full((image.height, image.width), True)
