"""Pictures of every kind through every data set that reads files.

Files are written number by number; what must be read is computed from the numbers that were
written, never by a second decoder.
"""

from __future__ import annotations

import ast
import io
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets as hf
import numpy as np
import pyarrow as pa
import pytest
import torch
from picture_writers import chunk, exif, palette, png, saved, tiff
from PIL import Image
from pyarrow import parquet
from torch import Tensor

import zoo.datasets
from zoo import datasets
from zoo.datasets import DataModule, hub
from zoo.datasets.picture_reader import (
    SUFFIXES,
    Unreadable,
    as_bytes,
    as_unit,
    read_image,
    read_labels,
    read_mask,
    read_pixels,
)
from zoo.datasets.vision import fashion_mnist
from zoo.errors import ZooError

STEP = 0.5 / 255 + 1e-6
"""Most by which the nearest of 256 levels misses a number."""


def ramp(side: int) -> np.ndarray:
    """Numbers (side, side) from 0 to 65535."""
    return np.linspace(0, 65535, side * side).round().astype(np.int64).reshape(side, side)


def colours(side: int, number: int = 0) -> np.ndarray:
    """Bytes (side, side, 3), no two rows or columns alike."""
    return np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)


def shape(side: int) -> np.ndarray:
    """Mask (side, side) that no turn or reflection leaves as it is."""
    found = np.zeros((side, side), dtype=bool)
    found[2:5, 3 : side - 6] = True
    found[5:9, 3:5] = True
    return found


# Routes: a picture through a data set. Each takes a folder, the bytes of a file and its ending.

Route = Callable[[Path, bytes, str], Tensor]


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def size_of(content: bytes) -> tuple[int, int]:
    """Height and width as they are looked at; all pictures here are square."""
    with Image.open(io.BytesIO(content)) as image:
        return image.height, image.width


def blank(size: tuple[int, int]) -> bytes:
    return png(np.zeros(size), 8, 0)


def write_istd(root: Path, letter: str, content: bytes, ending: str, size: tuple[int, int]) -> None:
    for split, count in (("train", 3), ("test", 2)):
        for number in range(count):
            for other in "ABC":
                mine = other == letter
                name = f"{number}-1{ending if mine else '.png'}"
                put(root / f"{split}_{other}" / name, content if mine else blank(size))


def istd(root: Path) -> DataModule:
    return datasets.create("istd", root=str(root), height=8, width=8)


def read_istd(letter: str, key: str, root: Path, content: bytes, ending: str) -> Tensor:
    write_istd(root, letter, content, ending, size_of(content))
    data = istd(root)
    data.setup()
    return next(iter(data.test_dataloader()[0]))[key][0]


def objects(root: Path, size: tuple[int, int]) -> DataModule:
    height, width = size
    return datasets.create("object_folders", root=str(root), height=height, width=width, frames=1)


def read_objects(layout: str, key: str, root: Path, content: bytes, ending: str) -> Tensor:
    size = size_of(content)
    for number in range(3):
        image, mask = (content, blank(size)) if key == "image" else (blank(size), content)
        endings = (ending, ".png") if key == "image" else (".png", ending)
        if layout == "video":
            put(root / f"video_{number}" / f"rgba_0{ending}", image)
            put(root / f"video_{number}" / f"segmentation_0{ending}", mask)
            continue
        put(root / "images" / f"{number}{endings[0]}", image)
        name = f"{number}_0" if layout == "layers" else f"{number}"
        put(root / "masks" / f"{name}{endings[1]}", mask)
    batch = next(iter(objects(root, size).val_dataloader()))
    if key == "masks":
        return batch["masks"].flatten(0, -4)[0].any(0, keepdim=True)
    return batch["video"][0, 0] if layout == "video" else batch["image"][0]


COLUMN = {"cifar10": "img", "fashion_mnist": "image"}
CELLS = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SIDES = {"cifar10": 32, "fashion_mnist": 28}
GOOD = {name: png(np.zeros((side, side)), 8, 0) for name, side in SIDES.items()}


def cells(content: bytes) -> list[Any]:
    return [{"bytes": content, "path": "a.png"}] * 3


def table(name: str, pictures: list[Any], labels: list[int | None], kind: pa.DataType) -> pa.Table:
    columns = {COLUMN[name]: pa.array(pictures, kind), "label": pa.array(labels, pa.int64())}
    return pa.table(columns)


def from_parquet(
    name: str,
    root: Path,
    pictures: list[Any],
    labels: list[int | None],
    kind: pa.DataType = CELLS,
) -> DataModule:
    for split in ("train", "test"):
        parquet.write_table(table(name, pictures, labels, kind), root / f"{split}-0.parquet")
    return datasets.create(name, root=str(root), val_size=1, standardize=False)


def from_hub(name: str, root: Path, pictures: list[Any], labels: list[int | None]) -> DataModule:
    features = hf.Features({COLUMN[name]: hf.Image(), "label": hf.Value("int64")})
    rows = table(name, pictures, labels, CELLS)
    loaded = {
        split: hf.Dataset(rows, info=hf.DatasetInfo(features=features), split=hf.Split(split))
        for split in ("train", "test")
    }
    # The fixture below undoes it.
    hub.load = lambda *_, **__: hf.DatasetDict(loaded)
    return datasets.create(name, val_size=1, standardize=False)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fashion_mnist, "PACKAGE_FOLDER", tmp_path / "none")
    monkeypatch.setattr(hub, "load", lambda *_, **__: pytest.fail("asked the hub"))


TABLES = {
    f"{name} from {place}": (name, build)
    for name in COLUMN
    for place, build in (("parquet", from_parquet), ("the hub", from_hub))
}


def read_table(title: str, root: Path, content: bytes, ending: str) -> Tensor:
    name, build = TABLES[title]
    data = build(name, root, cells(content), [0, 1, 2])
    return next(iter(data.test_dataloader()[0]))["image"][0]


IMAGES: dict[str, tuple[Route, int, float]] = {
    "ISTD's images": (lambda *a: read_istd("A", "image", *a), 20, 1e-7),
    "ISTD's targets": (lambda *a: read_istd("C", "target", *a), 20, 1e-7),
    "images of objects": (lambda *a: read_objects("images", "image", *a), 20, STEP),
    "videos of objects": (lambda *a: read_objects("video", "image", *a), 20, STEP),
    **{
        title: (lambda *a, title=title: read_table(title, *a), SIDES[TABLES[title][0]], STEP)
        for title in TABLES
    },
}
"""Routes of pictures, the side that they need, and how far off they may be beyond 8 bits."""
MASKS: dict[str, Route] = {
    "ISTD's masks": lambda *a: read_istd("B", "mask", *a),
    "labels of objects": lambda *a: read_objects("images", "masks", *a),
    "layers of objects": lambda *a: read_objects("layers", "masks", *a),
    "labels of videos": lambda *a: read_objects("video", "masks", *a),
}


@pytest.fixture(params=IMAGES)
def image_route(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Callable, int, float]:
    """Read through one data set: the reading, the side of a picture, the error allowed."""
    route, side, error = IMAGES[request.param]
    places: Iterator[Path] = (tmp_path / str(number) for number in range(99))

    def read(content: bytes, ending: str = ".png") -> Tensor:
        place = next(places)
        place.mkdir()
        return route(place, content, ending)

    return read, side, error


@pytest.fixture(params=MASKS)
def mask_route(request: pytest.FixtureRequest, tmp_path: Path) -> Callable:
    def read(content: bytes, ending: str = ".png") -> Tensor:
        return MASKS[request.param](tmp_path, content, ending)

    return read


def near(found: Tensor, wanted: np.ndarray, error: float) -> None:
    """Require numbers from 0 to 1: (H, W) in every channel, or (H, W, 3), grey in one channel."""
    wanted = wanted.astype(np.float64)
    if wanted.ndim == 3 and len(found) == 1:
        wanted, error = wanted @ np.array([0.299, 0.587, 0.114]), max(error, STEP)
    expected = torch.from_numpy(wanted)
    expected = expected.permute(2, 0, 1) if expected.ndim == 3 else expected.expand_as(found)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=max(error, 1e-7))


# Depth.


def deep(side: int) -> dict[str, tuple[bytes, str, np.ndarray]]:
    """Grey pictures of more than 8 bits: content, ending, numbers from 0 to 1."""
    numbers, size = ramp(side), (side, side)
    unit = numbers / 65535
    twelve = numbers >> 4
    pairs = twelve.reshape(-1, 2)
    packed = np.stack(
        [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1
    )
    little, big = numbers.astype("<u2").tobytes(), numbers.astype(">u2").tobytes()
    whole, real = numbers.astype("<i4").tobytes(), unit.astype("<f4").tobytes()
    return {
        "PNG": (png(numbers, 16, 0), ".png", unit),
        "TIFF, little end first": (tiff(little, size, 16), ".tif", unit),
        "TIFF, big end first": (tiff(big, size, 16, order=">"), ".tiff", unit),
        "TIFF, 0 is white": (tiff(little, size, 16, photometric=0), ".tif", 1 - unit),
        "TIFF, 12 bits": (tiff(packed.astype("u1").tobytes(), size, 12), ".tif", twelve / 4095),
        "TIFF, 32 bits": (tiff(whole, size, 32, sample=2), ".tif", unit),
        "TIFF, floating point": (tiff(real, size, 32, sample=3), ".tif", unit),
        "TIFF, compressed": (
            saved(Image.fromarray(numbers.astype(np.uint16)), "tiff", compression="tiff_lzw"),
            ".tif",
            unit,
        ),
    }


@pytest.mark.parametrize("kind", deep(2))
def test_grey_of_more_than_8_bits_is_scaled_to_its_range(image_route, kind):
    read, side, error = image_route
    content, ending, wanted = deep(side)[kind]
    near(read(content, ending), wanted, error)
    near(read_image(content, "L"), wanted, 1e-7)


@pytest.mark.parametrize("order", [None, "<", ">"])
def test_colours_of_16_bits_are_read_by_their_upper_byte(image_route, order):
    read, side, _ = image_route
    numbers = np.stack([ramp(side), ramp(side)[::-1], ramp(side).T], -1)
    if order is None:
        content, ending = png(numbers, 16, 2), ".png"
    else:
        body = numbers.astype(f"{order}u2").tobytes()
        content = tiff(body, (side, side), 16, channels=3, photometric=2, order=order)
        ending = ".tif"
    found = read(content, ending)
    near(found, (numbers >> 8) / 255, 1e-7)
    near(found, numbers / 65535, 1 / 255)


def test_a_ramp_keeps_all_its_levels():
    found = read_pixels(png(ramp(256), 16, 0), "L")
    assert len(found.unique()) == 65536
    assert float(found.mean()) == pytest.approx(0.5, abs=1e-6)
    assert as_unit(found) is found
    assert as_bytes(found).unique().tolist() == list(range(256))


@pytest.mark.parametrize(
    ("numbers", "sample", "says"),
    [
        (np.array([[0, 65536]]), 2, r"from 0 to 65536; allowed .* 0 \(black\) to 65535 \(white\)"),
        (np.array([[-1, 5]]), 2, "from -1 to 5"),
        (np.array([[0.0, 1.5]], dtype="<f4"), 3, r"from 0 to 1.5; allowed .* to 1 \(white\)"),
        (np.array([[0.0, np.nan]], dtype="<f4"), 3, "from nan to nan"),
    ],
)
def test_numbers_of_unknown_range_are_refused(numbers, sample, says):
    body = numbers.astype("<i4" if sample == 2 else "<f4").tobytes()
    with pytest.raises(Unreadable, match=says):
        read_image(tiff(body, (1, 2), 32, sample=sample))


def test_8_bits_are_read_to_the_byte(image_route):
    read, side, _ = image_route
    numbers = colours(side)
    near(read(png(numbers, 8, 2)), numbers / 255, 0)
    near(read(png(numbers[..., 0], 8, 0)), numbers[..., 0] / 255, 0)
    near(read(saved(Image.fromarray(numbers), "bmp"), ".bmp"), numbers / 255, 0)
    assert read_pixels(png(numbers, 8, 2)).dtype == torch.uint8


# Orientation.

# What EXIF's orientation says of a stored array: how to turn it for looking at it.
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_pictures_are_turned_upright(image_route, orientation):
    read, side, _ = image_route
    numbers = colours(side)
    content = png(numbers, 8, 2, chunk(b"eXIf", exif(orientation)))
    near(read(content), UPRIGHT[orientation](numbers) / 255, 0)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_masks_and_labels_are_turned_upright(mask_route, orientation):
    mask = shape(20)
    content = png(mask * 255, 8, 0, chunk(b"eXIf", exif(orientation)))
    assert torch.equal(mask_route(content)[0], torch.tensor(UPRIGHT[orientation](mask).copy()))


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation_of_every_format_and_depth(orientation):
    numbers = colours(12)[:, :8]
    upright = UPRIGHT[orientation](numbers)
    options = {"exif": b"Exif\0\0" + exif(orientation)}
    for kind, more in (("webp", {"lossless": True}), ("png", {}), ("tiff", {})):
        near(read_image(saved(Image.fromarray(numbers), kind, **options, **more)), upright / 255, 0)
    # JPEG is not exact; blocks of one grey are.
    blocks = np.kron(np.array([[10, 200], [90, 30], [250, 130]]), np.ones((8, 8))).astype(np.uint8)
    found = read_image(saved(Image.fromarray(blocks), "jpeg", **options, quality=100), "L")
    near(found, UPRIGHT[orientation](blocks) / 255, 2 / 255)
    numbers = ramp(12)[:, :8]
    upright = UPRIGHT[orientation](numbers)
    sixteen = png(numbers, 16, 0, chunk(b"eXIf", exif(orientation)))
    near(read_image(sixteen), upright / 65535, 1e-7)
    assert read_labels(sixteen).tolist() == upright.tolist()


def test_a_turned_picture_has_the_size_that_is_seen(tmp_path: Path):
    """A picture on its side, and masks that are not: objects and places are as they are seen."""
    wide = colours(12)[:, :8]
    for number in range(3):
        put(tmp_path / "images" / f"{number}.png", png(wide, 8, 2, chunk(b"eXIf", exif(6))))
        put(tmp_path / "masks" / f"{number}.png", png(np.ones((8, 12)), 8, 0))
    batch = next(iter(objects(tmp_path, (8, 12)).val_dataloader()))
    near(batch["image"][0], UPRIGHT[6](wide) / 255, 0)


# Palettes and alpha.


def test_palettes_have_their_colours_and_alpha_is_dropped(image_route):
    read, side, _ = image_route
    table = colours(16)
    index = np.random.default_rng(1).integers(0, 256, (side, side))
    entries = palette(*map(tuple, table.reshape(-1, 3).tolist()))
    seen = table.reshape(-1, 3)[index] / 255
    near(read(png(index, 8, 3, entries)), seen, 0)
    near(read(png(index, 8, 3, entries, chunk(b"tRNS", bytes(range(256))))), seen, 0)
    numbers, alpha = colours(side), colours(side, 2)[..., :1]
    near(read(png(np.concatenate([numbers, alpha], -1), 8, 6)), numbers / 255, 0)
    near(read(png(np.concatenate([numbers[..., :1], alpha], -1), 8, 4)), numbers[..., 0] / 255, 0)
    key = chunk(b"tRNS", struct.pack(">H", int(numbers[0, 0, 0])))
    near(read(png(numbers[..., 0], 8, 0, key)), numbers[..., 0] / 255, 0)


def masks() -> dict[str, tuple[bytes, str, np.ndarray]]:
    """Masks as they are found: content, ending, what is inside."""
    inside = shape(20)
    where = inside[..., None]
    number = inside.astype(np.uint8)
    white, black, blue = (255, 255, 255), (0, 0, 0), (0, 0, 1)

    def rgba(fore: tuple[int, ...], back: tuple[int, ...]) -> bytes:
        return png(np.where(where, fore, back), 8, 6)

    three = np.where(where, (9, 9, 9, 255), (0, 0, 0, 0))
    three[-1] = (0, 0, 0, 255)
    cmyk = np.where(where, (0, 200, 9, 40), (0, 0, 0, 255)).astype(np.uint8)
    frames = [Image.fromarray(n) for n in (number, 1 - number)]
    for frame in frames:
        frame.putpalette([*white, *black])
    found = {
        "grey, 1": png(number, 8, 0),
        "grey, 255": png(number * 255, 8, 0),
        "16 bits": png(number * 200, 16, 0),
        "the darkest blue": png(np.where(where, blue, black), 8, 2),
        "palette of white and black": png(number, 8, 3, palette(white, black)),
        "palette of black and blue": png(number, 8, 3, palette(black, blue)),
        "palette of one colour": png(number, 8, 3, palette(black, black)),
        "palette with a transparent entry": png(
            number, 8, 3, palette(white, black), chunk(b"tRNS", b"\0\xff")
        ),
        "palette whose outside is seen": png(
            1 - number, 8, 3, palette(black, white), chunk(b"tRNS", b"\xff\0")
        ),
        "black, shape in alpha": rgba((*black, 255), (*black, 0)),
        "white, shape in alpha": rgba((*white, 255), (*white, 0)),
        "black on transparent white": rgba((*black, 255), (*white, 0)),
        "opaque": rgba((*white, 255), (*black, 255)),
        "half transparent": rgba((*white, 99), (*black, 255)),
        "transparent, but for its colours": rgba((*white, 0), (*black, 0)),
        "three kinds of pixels": png(three, 8, 6),
        "grey with alpha": png(np.where(where, (0, 255), (0, 0)), 8, 4),
        "grey with a transparent level": png(
            np.where(inside, 0, 70), 8, 0, chunk(b"tRNS", struct.pack(">H", 70))
        ),
        "16 bits with a transparent level": png(
            np.where(inside, 5, 7), 16, 0, chunk(b"tRNS", struct.pack(">H", 7))
        ),
    }
    others = {
        "one bit": (saved(Image.fromarray(inside), "png"), ".png", inside),
        "CMYK": (saved(Image.fromarray(cmyk, "CMYK"), "tiff"), ".tif", inside),
        "GIF, its first frame": (
            saved(frames[0], "gif", save_all=True, append_images=frames[1:], optimize=False),
            ".gif",
            inside,
        ),
        "nothing": (png(np.zeros((20, 20)), 8, 0), ".png", np.zeros((20, 20), bool)),
        "nothing, opaque": (rgba((*black, 255), (*black, 255)), ".png", np.zeros((20, 20), bool)),
        "nothing to be seen": (rgba((*white, 0), (*white, 0)), ".png", np.zeros((20, 20), bool)),
        "everything": (png(np.full((20, 20), 3), 8, 0), ".png", np.ones((20, 20), bool)),
    }
    return {name: (content, ".png", inside) for name, content in found.items()} | others


@pytest.mark.parametrize("kind", masks())
def test_masks_of_every_kind(mask_route, kind):
    content, ending, inside = masks()[kind]
    found = mask_route(content, ending)
    assert found.dtype == torch.bool
    assert torch.equal(found[0], torch.from_numpy(inside))
    assert torch.equal(read_mask(content)[0], torch.from_numpy(inside))


def test_labels_are_the_numbers_in_the_file():
    numbers = np.arange(12).reshape(3, 4)
    assert read_labels(png(numbers, 8, 0)).tolist() == numbers.tolist()
    assert read_labels(png(numbers * 5000, 16, 0)).tolist() == (numbers * 5000).tolist()
    mixed = palette(*[(n * 37 % 256, 0, 0) for n in range(12)][::-1])
    assert read_labels(png(numbers, 8, 3, mixed)).tolist() == numbers.tolist()
    colour = np.stack([numbers, numbers * 2, numbers * 3], -1)
    packed = 65536 * numbers + 256 * numbers * 2 + numbers * 3
    assert read_labels(png(colour, 8, 2)).tolist() == packed.tolist()
    # What is transparent is background, whatever its colour.
    seen = numbers % 4 > 0
    alpha = np.concatenate([colour + 1, seen[..., None] * 200], -1)
    assert read_labels(png(alpha, 8, 6)).tolist() == np.where(seen, packed + 65793, 0).tolist()
    assert read_labels(tiff(b"\0\0\0@", (1, 1), 32, sample=3)).tolist() == [[2]]


@pytest.mark.parametrize("number", [0.5, -1.0, float("nan"), float("inf"), 1e30])
def test_labels_that_are_no_whole_numbers_are_refused(number):
    with pytest.raises(Unreadable, match="labels must be whole numbers, from 0 to 2147483647"):
        read_labels(tiff(struct.pack("<f", number), (1, 1), 32, sample=3))


# Animation and CMYK.


def test_the_first_frame_of_an_animation_is_read(image_route):
    read, side, _ = image_route
    frames = [Image.fromarray(colours(side, number)) for number in range(3)]
    options = {"save_all": True, "append_images": frames[1:]}
    for kind, more in (("png", {}), ("webp", {"lossless": True}), ("tiff", {})):
        content = saved(frames[0], kind, **options, **more)
        with Image.open(io.BytesIO(content)) as image:
            assert image.n_frames == 3
        near(read(content, f".{kind}"), colours(side, 0) / 255, 0)
    # A GIF has 256 colours.
    grey = [Image.fromarray(colours(side, number)[..., 0]) for number in range(3)]
    content = saved(grey[0], "gif", save_all=True, append_images=grey[1:])
    near(read(content, ".gif"), colours(side, 0)[..., 0] / 255, 0)


def test_cmyk_is_converted(image_route):
    read, side, _ = image_route
    inks = np.concatenate([colours(side), colours(side, 1)[..., :1]], -1)
    left = 255 - inks.astype(np.float64)
    wanted = left[..., :3] * left[..., 3:] / 255 / 255
    content = saved(Image.fromarray(inks, "CMYK"), "tiff")
    # Two roundings where grey is made of the colours.
    near(read(content, ".tif"), wanted, 2 * STEP)
    near(read_image(content), wanted, STEP)
    even = np.broadcast_to(np.array([40, 90, 200, 60], np.uint8), (side, side, 4))
    left = 255 - even.astype(np.float64)
    jpeg = saved(Image.fromarray(even.copy(), "CMYK"), "jpeg", quality=100)
    near(read(jpeg, ".jpg"), left[..., :3] * left[..., 3:] / 255 / 255, 4 / 255)


@pytest.mark.parametrize("mode", ["YCbCr", "LAB", "RGBX", "LA", "PA", "1"])
def test_other_modes_are_read_as_well(mode):
    picture = Image.fromarray(np.full((4, 5, 3), 255, np.uint8))
    if mode == "LAB":
        picture = Image.frombytes("LAB", (5, 4), bytes([255, 0, 0] * 20))
    else:
        picture = picture.convert("LA" if mode == "PA" else mode).convert(mode)
    content = saved(picture, "tiff")
    near(read_image(content), np.ones((4, 5)), 2 / 255)
    near(read_image(content, "L"), np.ones((4, 5)), 2 / 255)


# What is broken.


def broken(side: int) -> dict[str, tuple[bytes, str]]:
    """Files that hold no picture, or half of one."""
    picture = Image.fromarray(colours(side))
    whole = {
        ".png": saved(picture, "png"),
        ".jpg": saved(picture, "jpeg"),
        ".gif": saved(picture, "gif"),
        ".tif": saved(picture, "tiff"),
        ".webp": saved(picture, "webp"),
        ".bmp": saved(picture, "bmp"),
    }
    found = {f"half a {end}": (all_[: len(all_) // 2], end) for end, all_ in whole.items()}
    # Width and height stand first in a PNG; the sum after them is then wrong as well.
    huge = png(np.zeros((1, 1)), 8, 0).replace(struct.pack(">II", 1, 1), b"\0\1" * 4)
    damaged = whole[".png"][:70] + b"\0\0\0" + whole[".png"][73:]
    return found | {
        "nothing": (b"", ".png"),
        "text": (b"no picture", ".png"),
        "a head": (whole[".png"][:40], ".png"),
        "a wrong sum": (damaged, ".png"),
        "a wrong size": (huge, ".png"),
    }


def one_line(message: str) -> None:
    assert "\n" not in message
    assert "0x" not in message


@pytest.mark.parametrize("title", TABLES)
@pytest.mark.parametrize("kind", [*broken(20), "null", "null bytes", "a path"])
def test_a_broken_row_is_named(title, kind, tmp_path: Path):
    name, build = TABLES[title]
    rows = cells(GOOD[name])
    more = cells(GOOD[name])
    if kind == "null":
        rows[1] = None
    elif kind.startswith("null") or kind == "a path":
        rows[1] = {"bytes": None, "path": "a.png" if kind == "a path" else None}
    else:
        rows[1] = {"bytes": broken(28)[kind][0], "path": None}
    data = build(name, tmp_path, more + rows, [0] * 6)
    table = "'train-0.parquet'" if build is from_parquet else "split 'train' of the hub's data set"
    with pytest.raises(ZooError) as caught:
        data.setup()
    message = str(caught.value)
    start = f"row 4, counted from 0, of {table}, column {COLUMN[name]!r}, cannot be read: "
    assert message.startswith(start)
    assert len(message) > len(start)
    one_line(message)


@pytest.mark.parametrize("title", TABLES)
def test_labels_and_sizes_that_are_none_are_named(title, tmp_path: Path):
    name, build = TABLES[title]
    rows = cells(GOOD[name])
    with pytest.raises(ZooError, match=r"^row 2, .*, column 'label', holds null; needed: int$"):
        build(name, tmp_path, rows, [0, 1, None]).setup()
    rows[1] = {"bytes": png(np.zeros((3, 5)), 8, 0), "path": None}
    side = size_of(GOOD[name])[0]
    with pytest.raises(ZooError, match=rf"^row 1, .* has 3x5 pixels; the first row has {side}x"):
        build(name, tmp_path, rows, [0, 1, 2]).setup()
    with pytest.raises(ZooError, match="has no rows"):
        build(name, tmp_path, [], []).setup()


def test_rows_are_counted_across_pieces_and_files(tmp_path: Path):
    content = {"bytes": GOOD["fashion_mnist"], "path": None}
    rows = [*[content] * 4200, None]
    data = from_parquet("fashion_mnist", tmp_path, rows, [0] * len(rows))
    (tmp_path / "train-0.parquet").rename(tmp_path / "train-1.parquet")
    from_parquet("fashion_mnist", tmp_path, [content] * 7, [0] * 7)
    with pytest.raises(ZooError, match=r"^row 4200, counted from 0, of 'train-1.parquet'"):
        data.setup()


def test_a_column_of_plain_bytes_is_read_and_one_of_numbers_refused(tmp_path: Path):
    name, content = "fashion_mnist", GOOD["fashion_mnist"]
    from_parquet(name, tmp_path, [content] * 3, [0, 1, 2], pa.binary()).setup()
    with pytest.raises(ZooError, match=r"^row 0, .*'image', cannot be read: it is of type int"):
        from_parquet(name, tmp_path, [1, 2, 3], [0, 1, 2], pa.int64()).setup()


def test_a_path_of_the_hub_is_opened(tmp_path: Path):
    numbers = colours(32)
    put(tmp_path / "a.png", png(numbers, 8, 2))
    rows = [{"bytes": None, "path": str(tmp_path / "a.png")}] * 3
    data = from_hub("cifar10", tmp_path, rows, [0, 1, 2])
    near(next(iter(data.val_dataloader()))["image"][0], numbers / 255, 0)


def test_a_broken_page_of_a_parquet_file_names_the_file(tmp_path: Path):
    rows = [{"bytes": GOOD["cifar10"], "path": None}] * 50
    data = from_parquet("cifar10", tmp_path, rows, [1] * 50)
    file = tmp_path / "train-0.parquet"
    content = bytearray(file.read_bytes())
    content[40:400] = b"\xff" * 360
    file.write_bytes(content)
    with pytest.raises(ZooError, match=r"^root: 'train-0.parquet' is broken after its first 0 "):
        data.setup()


@pytest.mark.parametrize("kind", broken(20))
def test_a_broken_file_of_a_folder_is_named(kind, tmp_path: Path):
    """Folders leave such files out, as they document, and say which and why."""
    content, ending = broken(20)[kind]
    size = (20, 20)
    for letter in "ABC":
        root = tmp_path / letter
        write_istd(root, letter, blank(size), ".png", size)
        bad = root / f"train_{letter}" / f"2-1{ending}"
        bad.with_suffix(".png").unlink()
        put(bad, content)
        data = istd(root)
        with pytest.warns(UserWarning, match=rf"1 files of .*2-1\{ending} \(.+\)$"):
            data.setup()
        assert list(data.skipped) == [str(bad)]
        one_line(data.skipped[str(bad)])
        # Held pictures are read once, others again: then it is an error.
        with pytest.raises(ZooError, match=rf"^'.*2-1\{ending}' cannot be read: .+"):
            read_image(bad) if letter != "B" else read_mask(bad)
    for folder in ("images", "masks"):
        root = tmp_path / folder
        for number in range(4):
            for other in ("images", "masks"):
                mine = number == 3 and other == folder
                name = f"{number}{ending if mine else '.png'}"
                put(root / other / name, content if mine else blank(size))
        data = objects(root, size)
        with pytest.warns(UserWarning, match=rf"1 of 4 examples of .*3\{ending} \(.+\)$"):
            data.setup()
        assert list(data.skipped) == [str(root / folder / f"3{ending}")]
        one_line(next(iter(data.skipped.values())))


def test_a_file_that_breaks_later_is_named(tmp_path: Path):
    write_istd(tmp_path, "A", blank((20, 20)), ".png", (20, 20))
    data = datasets.create("istd", root=str(tmp_path), height=8, width=8, hold=False)
    data.setup()
    (tmp_path / "test_A" / "1-1.png").write_bytes(b"")
    with pytest.raises(ZooError, match=r"^'.*test_A.1-1.png' cannot be read: no picture"):
        list(data.test_dataloader()[0])


def test_two_pictures_of_one_name_are_refused(tmp_path: Path):
    size = (20, 20)
    write_istd(tmp_path / "istd", "A", blank(size), ".png", size)
    put(tmp_path / "istd" / "train_A" / "0-1.tif", blank(size))
    with pytest.raises(ZooError, match=r"0-1.png' and '.*0-1.tif' have one name"):
        istd(tmp_path / "istd").setup()
    for ending in (".png", ".bmp"):
        put(tmp_path / "objects" / "images" / "0.png", blank(size))
        put(tmp_path / "objects" / "masks" / f"0{ending}", blank(size))
    with pytest.raises(ZooError, match=r"0.bmp' and '.*0.png' have one name"):
        objects(tmp_path / "objects", size).setup()


def test_an_empty_binary_file_is_named(tmp_path: Path):
    for number in range(1, 6):
        (tmp_path / f"data_batch_{number}.bin").write_bytes(b"")
    (tmp_path / "test_batch.bin").write_bytes(b"")
    with pytest.raises(ZooError, match=r"^root: 'data_batch_1.bin' has 0 bytes; needed:"):
        datasets.create("cifar10", root=str(tmp_path)).setup()


def test_errors_survive_the_way_out_of_a_worker():
    error = pickle.loads(pickle.dumps(Unreadable(Path("a.png"), "it is empty")))
    assert str(error) == "'a.png' cannot be read: it is empty"
    assert (error.path, error.reason) == (Path("a.png"), "it is empty")
    assert str(Unreadable("row 3, cannot be read: null")) == "row 3, cannot be read: null"


def test_an_unknown_mode_is_refused():
    with pytest.raises(ZooError, match="unknown mode of a picture 'rgb'; did you mean 'RGB'"):
        read_image(blank((2, 2)), "rgb")
    with pytest.raises(Unreadable, match=r"^a picture in bytes cannot be read: no picture"):
        read_image(b"")


def test_every_ending_is_found(tmp_path: Path):
    for number, ending in enumerate(SUFFIXES):
        put(tmp_path / "images" / f"{number}{ending}", blank((4, 4)))
        put(tmp_path / "images" / f"{number}x{ending.upper()}", blank((4, 4)))
    data = objects(tmp_path, (4, 4))
    data.setup()
    assert sum(data.size(split) for split in ("train", "val", "test")) == 2 * len(SUFFIXES)


LIBRARIES = {"PIL", "cv2", "imageio", "matplotlib", "skimage", "torchvision"}
"""What decodes pictures."""


def test_there_is_no_second_reader():
    """Nothing else below zoo.datasets imports a library that decodes pictures."""
    root = Path(zoo.datasets.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if {name.split(".")[0] for name in names} & LIBRARIES:
                found.add(path.relative_to(root).as_posix())
    assert found == {"picture_reader.py"}


@pytest.mark.parametrize("title", TABLES)
def test_a_path_that_is_not_absolute_is_not_looked_for(title, tmp_path: Path, monkeypatch):
    """A file of this name that happens to lie here is another one."""
    name, build = TABLES[title]
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "a.png", GOOD[name])
    data = build(name, tmp_path, [{"bytes": None, "path": "a.png"}] * 3, [0, 1, 2])
    with pytest.raises(ZooError, match=r"cannot be read: it has no bytes, only the path 'a.png'$"):
        data.setup()
