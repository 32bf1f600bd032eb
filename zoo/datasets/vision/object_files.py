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
an earlier one. `zoo.datasets.picture_reader` says how numbers, colours and alpha are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zoo.datasets.picture_reader import (
    SUFFIXES,
    Unreadable,
    as_bytes,
    read_labels,
    read_pixels,
    scaled,
)
from zoo.errors import ZooError


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
    masks_of = _masks(root / "masks") if (root / "masks").is_dir() else None
    entries = []
    for image in pictures(folder, "**/*"):
        found, per_object = masks_of(image.relative_to(folder)) if masks_of else ((), False)
        if described is not None and image.name not in described:
            raise ZooError(
                f"the scenes of {str(root)!r} do not describe {image.name!r}; allowed: all images "
                "or no file of scenes"
            )
        objects = described[image.name] if described is not None else None
        entries.append(Entry((image,), (found,) if masks_of else (), per_object, objects))
    return "images", entries


def _video(folder: Path) -> Entry:
    frames = pictures(folder, "rgba_*")
    names = [folder / f.name.replace("rgba_", "segmentation_") for f in frames]
    # A video without any masks has none; one that lacks a few shows it when it is read.
    masks = tuple((name,) for name in names) if any(n.exists() for n in names) else ()
    return Entry(tuple(frames), masks)


def _masks(root: Path) -> Callable[[Path], tuple[tuple[Path, ...], bool]]:
    """Return what finds the masks of an image by its place below the folder of images.

    It returns the pictures of masks, and whether there is one for each object.
    """
    alone: dict[Path, Path] = {}
    layers: dict[Path, list[Path]] = {}
    for path in pictures(root, "**/*"):
        place = path.relative_to(root).with_suffix("")
        if alone.setdefault(place, path) != path:
            raise twice(alone[place], path)
        beside = re.fullmatch(r"(.+)_\d+", place.name)
        for image in [place.parent, *([place.with_name(beside[1])] if beside else [])]:
            layers.setdefault(image, []).append(path)

    def look_up(image: Path) -> tuple[tuple[Path, ...], bool]:
        place = image.with_suffix("")
        if place in alone:
            return (alone[place],), False
        return tuple(layers.get(place, ())), True

    return look_up


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


def twice(first: Path, second: Path) -> ZooError:
    """Build the error for two pictures of one name."""
    return ZooError(
        f"{str(first)!r} and {str(second)!r} have one name; allowed: one picture of a name"
    )


def read_image(path: Path, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """Read a picture in colour, scaled.

    Args:
        path: Its file.
        size: Height and width to give it.

    Returns:
        Bytes (H, W, 3), and the height and width that it had.

    Raises:
        Unreadable: It cannot be read.
    """
    pixels = as_bytes(read_pixels(path))
    had = pixels.shape[1], pixels.shape[2]
    if had != size:
        pixels = scaled(pixels, size)
    return pixels.permute(1, 2, 0).numpy(), had


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
        Unreadable: A mask is missing or cannot be read.
    """
    frames = []
    for image, files, had in zip(entry.frames, entry.masks, sizes, strict=True):
        if not files:
            raise Unreadable(image, "it has no mask")
        layers = []
        for path in files:
            layer = read_labels(path).numpy()
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
