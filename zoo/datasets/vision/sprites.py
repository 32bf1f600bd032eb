"""Coloured shapes in front of each other, at rest or in motion: what all drawn scenes share.

A scene is drawn object by object, from the back to the front: object m hides the objects before it.
A scene at rest is a video of one frame. A drawn object is kept if it leaves enough of every object
to be seen in the frame where that one appears; otherwise it is drawn anew. Objects that find no
place after many draws make their scene begin again, with the same number of objects, so that how
many there are does not depend on how well they fit.

Legend: B scenes, M objects, T frames, H, W pixels. Places are (x, y), x to the right, y downwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.errors import ZooError

COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.8, 0.1),
    "blue": (0.15, 0.25, 1.0),
    "yellow": (0.95, 0.9, 0.1),
    "magenta": (0.9, 0.1, 0.9),
    "cyan": (0.1, 0.85, 0.9),
    "orange": (1.0, 0.55, 0.1),
    "white": (1.0, 1.0, 1.0),
}
SHAPES = ("square", "circle", "triangle", "diamond", "cross")
BACKGROUNDS = ("black", "grey", "texture")

TRIES = 50
"""Places an object is offered before its scene begins again."""
RESTARTS = 20
"""Times a scene may begin again."""
SUBSAMPLES = 3
"""Points per pixel and axis of a smooth edge."""


@dataclass(frozen=True)
class Look:
    """What is drawn.

    Args:
        height: Pixels, H.
        width: Pixels, W.
        frames: Frames, T.
        min_objects: Fewest objects of a scene.
        max_objects: Most objects of a scene, M.
        shapes: Names of the shapes to draw from.
        colours: Names of the colours to draw from.
        sizes: Sizes to draw from: side of the box around a shape over the image's shorter side.
        background: "black", "grey" (one level for each scene) or "texture" (grey waves).
        min_visible: Fewest pixels of an object that are seen in the frame where it appears.
        max_overlap: Largest share of an object's pixels that is hidden there.
        smooth: Whether edges are smooth in the image; masks are of whole pixels all the same.
        distinct: Whether no two objects of a scene have the same colour.
        speed: Largest distance that an object moves from frame to frame, over the shorter side.
        enter: Probability that an object appears after the first frame.
        leave: Probability that an object disappears before the last frame.
    """

    height: int
    width: int
    frames: int
    min_objects: int
    max_objects: int
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    sizes: tuple[float, ...]
    background: str
    min_visible: int
    max_overlap: float
    smooth: bool
    distinct: bool = False
    speed: float = 0.0
    enter: float = 0.0
    leave: float = 0.0


Objects = dict[str, Tensor]
"""Properties of objects by name, one row for each."""


def inside(shape: Tensor, x: Tensor, y: Tensor, shapes: tuple[str, ...]) -> Tensor:
    """Tell which points lie within a shape that fills the box from -1 to 1.

    Args:
        shape: Index into shapes (R,).
        x: Places (R, T, H, W) in units of half the box, to the right.
        y: Places (R, T, H, W), downwards.
        shapes: Names of the shapes.
    """
    found = torch.zeros(x.shape, dtype=torch.bool)
    for index, name in enumerate(shapes):
        rows = (shape == index).nonzero()[:, 0]
        u, v = x[rows], y[rows]
        across, along = u.abs(), v.abs()
        if name == "square":
            part = torch.maximum(across, along) <= 1
        elif name == "circle":
            part = u * u + v * v <= 1
        elif name == "triangle":
            part = (along <= 1) & (2 * across <= 1 + v)
        elif name == "diamond":
            part = across + along <= 1
        else:
            part = (torch.maximum(across, along) <= 1) & (torch.minimum(across, along) <= 1 / 3)
        found[rows] = part
    return found


def grid(size: int, points: int) -> Tensor:
    """Return the places of ``points`` evenly spaced points in each of so many pixels."""
    return (torch.arange(size * points) + 0.5) / points


def silhouettes(objects: Objects, look: Look, points: int = 1) -> Tensor:
    """Draw whole objects, each alone.

    Args:
        objects: Their properties, R rows.
        look: What is drawn.
        points: Points per pixel and axis.

    Returns:
        Whether a point belongs to the object, (R, T, H * points, W * points).
    """
    radius = objects["radius"][:, None, None]
    x = (grid(look.width, points) - objects["centre"][..., :1]) / radius  # (R, T, W)
    y = (grid(look.height, points) - objects["centre"][..., 1:]) / radius
    shape = (*x.shape[:2], y.shape[-1], x.shape[-1])
    drawn = inside(
        objects["shape"], x[:, :, None].expand(shape), y[..., None].expand(shape), look.shapes
    )
    return drawn & objects["alive"][..., None, None]


def draw_objects(stays: Tensor, look: Look, generator: torch.Generator) -> Objects:
    """Draw properties of objects and the ways they go.

    Objects move in straight lines at a constant speed of their own and bounce off the edges, so
    that they are wholly in the image all the time.

    Args:
        stays: Objects that are there in all frames (R,).
        look: What is drawn.
        generator: Source of randomness.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    def choice(count: int) -> Tensor:
        return torch.randint(count, (rows,), generator=generator)

    rows, frames = len(stays), look.frames
    size = choice(len(look.sizes))
    side = min(look.height, look.width)
    radius = torch.tensor(look.sizes)[size] * side / 2
    room = torch.tensor([look.width, look.height]) - 2 * radius[:, None]  # (R, 2)
    start = uniform(rows, 2) * room
    objects = {"shape": choice(len(look.shapes)), "colour": choice(len(look.colours))}
    if frames > 1:
        angle = uniform(rows) * 2 * math.pi
        pace = (0.5 + uniform(rows) / 2) * look.speed * side
        velocity = torch.stack([angle.cos(), angle.sin()], -1) * pace[:, None]
        gone = start[:, None] + velocity[:, None] * torch.arange(frames)[:, None]
        # A wall mirrors the way: what is walked beyond it is walked back.
        span = room[:, None].clamp(min=1e-6)
        gone = span - (gone % (2 * span) - span).abs()
        lots, when = uniform(2, rows), uniform(2, rows)
        first = 1 + (when[0] * (frames - 1)).long()
        first = torch.where((lots[0] < look.enter) & ~stays, first, 0)
        last = first + 1 + (when[1] * (frames - 1 - first)).long()
        last = torch.where((lots[1] < look.leave) & (first < frames - 1) & ~stays, last, frames)
        time = torch.arange(frames)
        alive = (time >= first[:, None]) & (time < last[:, None])
    else:
        gone, first = start[:, None], torch.zeros(rows, dtype=torch.int64)
        alive = torch.ones(rows, 1, dtype=torch.bool)
    centre = gone + radius[:, None, None]
    return objects | {
        "size": size,
        "radius": radius,
        "centre": centre,
        "first": first,
        "alive": alive,
    }


def place(rows: int, look: Look, generator: torch.Generator) -> tuple[Objects, Tensor, Tensor]:
    """Draw scenes in which every object can be seen when it appears.

    Args:
        rows: Number of scenes, B.
        look: What is drawn.
        generator: Source of randomness.

    Returns:
        Properties (B, M, ...); visible masks (B, M, T, H, W), no two of which share a pixel; number
        of objects (B,).

    Raises:
        ZooError: So many objects find no place under these rules.
    """
    most = look.max_objects
    count = torch.randint(look.min_objects, most + 1, (rows,), generator=generator)
    stays = (torch.rand(rows, generator=generator) * count).long()
    deck = torch.rand(rows, len(look.colours), generator=generator).argsort(1)
    visible = torch.zeros(rows, most, look.frames, look.height, look.width, dtype=torch.bool)
    area = torch.ones(rows, most)
    first = torch.zeros(rows, most, dtype=torch.int64)
    done = torch.zeros(rows, dtype=torch.int64)
    missed = torch.zeros(rows, dtype=torch.int64)
    restarts = torch.zeros(rows, dtype=torch.int64)
    kept: Objects = {}
    while restarts.max() <= RESTARTS:
        open_rows = (done < count).nonzero()[:, 0]
        if not len(open_rows):
            return kept, visible, count
        slot = done[open_rows]
        drawn = draw_objects(stays[open_rows] == slot, look, generator)
        if look.distinct:
            drawn["colour"] = deck[open_rows, slot]
        shape = silhouettes(drawn, look)
        each = torch.arange(len(open_rows))
        whole = shape[each, drawn["first"]].sum((-1, -2))
        # What is left of the objects behind, each in the frame where it appeared.
        others = open_rows[:, None], torch.arange(most), first[open_rows]
        left = visible[others] & ~shape[each[:, None], first[open_rows]]
        left_area = left.sum((-1, -2))
        wanted = ((1 - look.max_overlap) * area[open_rows]).clamp(min=look.min_visible)
        behind = torch.arange(most) < slot[:, None]
        good = ((left_area >= wanted) | ~behind).all(1) & (whole >= look.min_visible)
        rows_in, slot_in = open_rows[good], slot[good]
        visible[rows_in] &= ~shape[good, None]
        visible[rows_in, slot_in] = shape[good]
        area[rows_in, slot_in] = whole[good].float()
        first[rows_in, slot_in] = drawn["first"][good]
        for name, value in drawn.items():
            if name not in kept:
                kept[name] = torch.zeros(rows, most, *value.shape[1:], dtype=value.dtype)
            kept[name][rows_in, slot_in] = value[good]
        done[rows_in] += 1
        missed[rows_in] = 0
        missed[open_rows[~good]] += 1
        again = missed >= TRIES
        done[again], missed[again] = 0, 0
        restarts += again
    raise ZooError(
        f"{look.max_objects} objects find no place in images of {look.height}x{look.width}: fewer "
        "objects (max_objects), smaller sizes, less min_visible or more max_overlap make room"
    )


def backdrop(rows: int, look: Look, generator: torch.Generator) -> Tensor:
    """Draw backgrounds (B, 1, H, W) in grey, which no object has."""
    height, width = look.height, look.width
    if look.background == "black":
        return torch.zeros(rows, 1, height, width)
    level = 0.2 + 0.4 * torch.rand(rows, 1, 1, 1, generator=generator)
    if look.background == "grey":
        return level.expand(rows, 1, height, width)
    # Three waves of one to four periods per image in random directions.
    lots = torch.rand(4, rows, 3, 1, 1, generator=generator)
    angle, cycles, phase = lots[0] * math.pi, 1 + 3 * lots[1], lots[2] * 2 * math.pi
    x = grid(width, 1) / width
    y = grid(height, 1)[:, None] / height
    way = cycles * (angle.cos() * x + angle.sin() * y)
    waves = (2 * math.pi * way + phase).sin() * (0.3 + 0.7 * lots[3])
    return (level + 0.06 * waves.sum(1, keepdim=True)).clamp(0, 1)


def paint(objects: Objects, visible: Tensor, ground: Tensor, look: Look) -> Tensor:
    """Paint the image of placed objects.

    Args:
        objects: Properties (B, M, ...).
        visible: Visible masks (B, M, T, H, W).
        ground: Background (B, 1, H, W).
        look: What is drawn.

    Returns:
        Images (B, T, 3, H, W) with values from 0 to 1.
    """
    palette = torch.tensor([COLOURS[name] for name in look.colours])
    colour = palette[objects["colour"]]  # (B, M, 3)
    image = ground[:, None].expand(-1, look.frames, 3, -1, -1).clone()
    if not look.smooth:
        shown = torch.einsum("bmthw,bmc->btchw", visible.float(), colour)
        return torch.where(visible.any(1)[:, :, None], shown, image)
    for index in range(look.max_objects):
        one = {name: value[:, index] for name, value in objects.items()}
        there = visible[:, index].flatten(1).any(1)
        one["radius"] = one["radius"].masked_fill(~there, 1.0)
        fine = silhouettes(one, look, SUBSAMPLES).float().flatten(0, 1)
        cover = torch.nn.functional.avg_pool2d(fine[:, None], SUBSAMPLES)
        cover = cover.unflatten(0, (len(there), look.frames)) * there[:, None, None, None, None]
        image = torch.lerp(image, colour[:, index, None, :, None, None].expand_as(image), cover)
    return image
