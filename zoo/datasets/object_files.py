"""Pictures of objects on disk: where images, masks, videos and properties lie, and their reading.

Two layouts are known.

    images    ROOT/images/**/NAME.png, with, optionally,
              ROOT/masks/**/NAME.png, one picture of labels, or
              ROOT/masks/**/NAME_0.png, NAME_1.png ... or NAME/0.png ..., one picture per object;
              ROOT/scenes.json or ROOT/scenes/*.json, as CLEVR's
    videos    ROOT/VIDEO/rgba_00000.png ... and VIDEO/segmentation_00000.png ..., as MOVi's

In a picture of labels 0 is background and v is object v - 1, if no label exceeds the number of
objects allowed; otherwise, and in pictures in colour (black is background), objects are the labels
that occur, in order. In pictures per object all that is not 0 is the object, and a later one hides
an earlier one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zoo.errors import ZooError

SUFFIXES = (".png", ".jpg", ".jpeg")


def natural(path: Path) -> tuple[Any, ...]:
    """Key that sorts 2 before 10."""
    return tuple(int(p) if p.isdigit() else p for p in re.split(r"(\d+)", str(path)))


def pictures(folder: Path, pattern: str) -> list[Path]:
    """Return the pictures below a folder whose names match, in natural order."""
    found = (path for path in folder.glob(pattern) if path.suffix.lower() in SUFFIXES)
    return sorted(found, key=natural)


@dataclass(frozen=True)
class Entry:
    """The files of one example.

    Args:
        frames: Its images, one unless it is a video.
        masks: For each image its picture of labels, or its pictures of objects; empty for none.
        per_object: Whether they are pictures of objects.
        objects: CLEVR's description of its objects, None if there is none.
    """

    frames: tuple[Path, ...]
    masks: tuple[tuple[Path, ...], ...] = ()
    per_object: bool = False
    objects: list[dict[str, Any]] | None = field(default=None, hash=False)


def find(root: Path, layout: str) -> tuple[str, list[Entry]]:
    """Find the examples below a folder.

    Args:
        root: The folder.
        layout: "images", "videos" or "auto".

    Returns:
        The layout, and the examples in natural order.

    Raises:
        ZooError: A file of scenes that is none, or that leaves out an image.
    """
    videos = {path.parent for path in pictures(root, "*/rgba_*")}
    if layout == "videos" or (layout == "auto" and videos):
        return "videos", [_video(folder) for folder in sorted(videos, key=natural)]
    folder = root / "images"
    described = _descriptions(root)
    masked = (root / "masks").is_dir()
    entries = []
    for image in pictures(folder, "**/*"):
        masks: tuple[Path, ...] = ()
        per_object = False
        if masked:
            masks, per_object = _masks(root / "masks" / image.relative_to(folder))
        if described is not None and image.name not in described:
            raise ZooError(
                f"the scenes of {str(root)!r} do not describe {image.name!r}; allowed: all images "
                "or no file of scenes"
            )
        objects = described[image.name] if described is not None else None
        entries.append(Entry((image,), (masks,) if masked else (), per_object, objects))
    return "images", entries


def _video(folder: Path) -> Entry:
    frames = pictures(folder, "rgba_*")
    names = [folder / f.name.replace("rgba_", "segmentation_") for f in frames]
    # A video without any masks has none; one that lacks a few shows it when it is read.
    masks = tuple((name,) for name in names) if any(n.exists() for n in names) else ()
    return Entry(tuple(frames), masks)


def _masks(place: Path) -> tuple[tuple[Path, ...], bool]:
    """Return the pictures of masks for an image, and whether there is one per object."""
    for suffix in (place.suffix, ".png"):
        if place.with_suffix(suffix).is_file():
            return (place.with_suffix(suffix),), False
    stem = place.with_suffix("")
    beside = [
        path
        for path in (pictures(stem.parent, "*") if stem.parent.is_dir() else [])
        if re.fullmatch(re.escape(stem.name) + r"_\d+", path.stem)
    ]
    return tuple(beside or (pictures(stem, "*") if stem.is_dir() else [])), True


def _descriptions(root: Path) -> dict[str, list[dict[str, Any]]] | None:
    """Read what CLEVR's files say of each image, by the image's name."""
    files = [path for path in (root / "scenes.json",) if path.is_file()]
    files += sorted((root / "scenes").glob("*.json"))
    found: dict[str, list[dict[str, Any]]] = {}
    for path in files:
        try:
            for scene in json.loads(path.read_text())["scenes"]:
                found[scene["image_filename"]] = list(scene["objects"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ZooError(
                f"{str(path)!r} is not a file of scenes, a mapping with the list 'scenes', whose "
                f"items have 'image_filename' and 'objects': {type(error).__name__}: {error}"
            ) from error
    return found if files else None


def read_image(path: Path, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """Read a picture in colour, scaled.

    Args:
        path: Its file.
        size: Height and width to give it.

    Returns:
        Bytes (H, W, 3), and the height and width that it had.

    Raises:
        OSError: It cannot be read.
    """
    from PIL import Image

    with Image.open(path) as image:
        picture = image.convert("RGB")
    had = picture.height, picture.width
    if had != size:
        picture = picture.resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(picture), had


def read_label(path: Path) -> np.ndarray:
    """Read a picture of labels as whole numbers (H, W); colours become one number each.

    Raises:
        OSError: It cannot be read.
    """
    from PIL import Image

    with Image.open(path) as image:
        if image.mode in ("RGB", "RGBA"):
            red, green, blue = np.moveaxis(np.asarray(image.convert("RGB")), 2, 0).astype(np.int64)
            return (red << 16) + (green << 8) + blue
        if image.mode in ("LA", "1"):
            return np.asarray(image.convert("L")).astype(np.int64)
        return np.asarray(image).astype(np.int64)


def read_masks(
    entry: Entry, sizes: Sequence[tuple[int, int]], most: int, size: tuple[int, int]
) -> np.ndarray:
    """Read the masks of an example, scaled to the nearest pixel.

    Args:
        entry: Its files.
        sizes: Height and width of each of its images.
        most: Largest number of objects.
        size: Height and width to give them.

    Returns:
        Labels (T, H, W) in bytes: 0 for background, m + 1 for object m.

    Raises:
        ZooError: A mask of another size than its image, or more objects than allowed.
        OSError: A mask cannot be read.
    """
    frames = []
    for image, files, had in zip(entry.frames, entry.masks, sizes, strict=True):
        if not files:
            raise OSError("it has no mask")
        layers = []
        for path in files:
            layer = read_label(path)
            if layer.shape != had:
                raise ZooError(
                    f"mask {str(path)!r} has {layer.shape[0]}x{layer.shape[1]} pixels, but image "
                    f"{str(image)!r} has {had[0]}x{had[1]}; they must be of one size"
                )
            layers.append(layer)
        labels = layers[0]
        if entry.per_object:
            labels = np.zeros(had, dtype=np.int64)
            for number, layer in enumerate(layers, 1):
                labels[layer != 0] = number
        frames.append(labels)
    values = np.unique(np.concatenate([frame.ravel() for frame in frames]))
    values = values[values != 0]
    number = len(entry.masks[0]) if entry.per_object else len(values)
    if number > most:
        raise ZooError(
            f"the masks of {str(entry.frames[0])!r} show {number} objects; max_objects={most} "
            "must be as many at least"
        )
    if len(values) and values.max() > most:
        frames = [np.searchsorted(values, frame) + (frame != 0) for frame in frames]
    return np.stack([nearest(frame, size) for frame in frames]).astype(np.uint8)


def nearest(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale labels (H, W) to another height and width by taking the nearest pixel."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip(size, labels.shape, strict=True)
    )
    return labels[rows[:, None], columns]


def vocabulary(entries: Sequence[Entry], key: str) -> dict[Any, float]:
    """Number the values that a property takes; numbers stay what they are."""
    values = {item[key] for entry in entries for item in entry.objects or () if key in item}
    if all(isinstance(value, int | float) for value in values):
        return {value: float(value) for value in values}
    return {value: float(n) for n, value in enumerate(sorted(values, key=str))}
