"""Same or different: what is in every image, read back from its pixels, and who can tell."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo import datasets
from zoo.datasets.vision.same_different import CELL, RED, SIDE, same_different, shapes
from zoo.errors import ZooError


def tiles(image: torch.Tensor) -> torch.Tensor:
    """Cut (B, 3, H, W) into the cells (B, places, 3, 4, 4)."""
    cells = image.shape[-1] // CELL
    cut = image.view(len(image), 3, cells, CELL, cells, CELL)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(len(image), cells * cells, 3, CELL, CELL)


def bitmap(tile: torch.Tensor) -> tuple[float, ...]:
    """Return the pixels of a shape (4, 4) within the box around it."""
    rows, columns = (tile > 0).nonzero(as_tuple=True)
    box = tile[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert box.shape == (SIDE, SIDE)
    return tuple((box > 0).float().flatten().tolist())


def known(new: bool) -> set[tuple[float, ...]]:
    return {tuple(shape.flatten().tolist()) for shape in shapes(new)}


@settings(max_examples=25)
@given(
    cells=st.integers(2, 5),
    distractors=st.integers(0, 2),
    jitter=st.booleans(),
    new=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_every_rule_holds(cells: int, distractors: int, jitter: bool, new: bool, seed: int):
    batch = same_different(
        6,
        torch.Generator().manual_seed(seed),
        cells=cells,
        distractors=distractors,
        noise=0.0,
        jitter=jitter,
        new=new,
    )
    assert batch["image"].shape == (6, 3, CELL * cells, CELL * cells)
    for image, label in zip(tiles(batch["image"]), batch["label"].tolist(), strict=True):
        used = image.sum(dim=(-1, -2)) > 0
        assert int(used.any(1).sum()) == 2 + distractors
        assert (used.sum(1) <= 1).all()
        assert int(used[:, RED].sum()) == 2
        drawn = [bitmap(image[place, colour].double()) for place, colour in used.nonzero().tolist()]
        assert set(drawn) <= known(new)
        for place, colour in used.nonzero().tolist():
            light = image[place, colour][image[place, colour] > 0]
            assert (light == light[0]).all()
            assert 0.6 <= light[0] <= 1
            if not jitter:
                assert not image[place, colour, SIDE:].any()
                assert not image[place, colour, :, SIDE:].any()
        red = [bitmap(image[place, RED]) for place in used[:, RED].nonzero()[:, 0].tolist()]
        assert (red[0] == red[1]) == bool(label)


def test_shapes_are_different_however_they_stand_and_none_is_new_and_old():
    old, new = known(False), known(True)
    assert (len(old), len(new)) == (206, 68)
    assert not old & new
    for shape in old | new:
        grid = torch.tensor(shape).view(SIDE, SIDE)
        assert 3 <= grid.sum() <= 6
        assert all(side.any() for side in (grid[0], grid[-1], grid[:, 0], grid[:, -1]))


def test_labels_are_balanced_and_no_pixel_tells_them():
    data = datasets.create("same_different", noise=0.0)
    batch = data.stream("val").take(torch.arange(4000))
    label = batch["label"].double()
    # Five standard errors of a share of one half.
    assert abs(label.mean() - 0.5) < 0.04
    pixels = batch["image"].flatten(1).double()
    centred = pixels - pixels.mean(0)
    spread = centred.square().mean(0).sqrt() * 0.5
    correlation = (centred * (label - label.mean())[:, None]).mean(0) / spread.clamp(min=1e-9)
    assert correlation.abs().max() < 5 / 4000**0.5
    # Nor does how much is red.
    red = pixels[:, : len(pixels[0]) // 3].gt(0).sum(1).double()
    assert abs(red[label == 1].mean() - red[label == 0].mean()) < 0.3


def test_comparing_the_red_cells_solves_it_on_shapes_old_and_new():
    data = datasets.create("same_different", jitter=False, test_size=200)
    for split in data.test_names:
        batch = data.source(split).take(torch.arange(200))
        red = tiles(batch["image"])[:, :, RED]
        places = red.amax(dim=(-1, -2)).topk(2, dim=1).indices
        first, second = (red[torch.arange(200), places[:, i]] > 0.3 for i in (0, 1))
        assert torch.equal((first == second).all(-1).all(-1).long(), batch["label"])


def test_noise_has_its_spread():
    options = {"cells": 3, "distractors": 2, "jitter": False}
    clean, noisy = (
        same_different(200, torch.Generator().manual_seed(0), noise=noise, **options)["image"]
        for noise in (0.0, 0.2)
    )
    assert (noisy - clean).std().item() == pytest.approx(0.2, rel=0.03)


def test_test_sets_differ_in_their_shapes_and_distractors():
    data = datasets.create("same_different", cells=3, distractors=1, noise=0.0, test_size=60)
    assert data.test_names == ["test", "new", "crowded"]
    for split, count, new in (("test", 3, False), ("new", 3, True), ("crowded", 9, False)):
        image = tiles(data.source(split).take(torch.arange(60))["image"])
        used = image.sum(dim=(-1, -2)) > 0
        assert (used.any(2).sum(1) == count).all()
        drawn = {
            bitmap(image[i, place, colour].double()) for i, place, colour in used.nonzero().tolist()
        }
        assert drawn <= known(new)


def test_examples_depend_on_seed_split_and_index_alone(first, same, whole):
    build = {"val_size": 40, "test_size": 30}
    few, many = (datasets.create("same_different", batch_size=n, **build) for n in (10, 30))
    together = first(many, 1)[0]
    for number, batch in enumerate(first(few, 3)):
        rows = slice(10 * number, 10 * number + 10)
        same(batch, {name: column[rows] for name, column in together.items()})
    other = datasets.create("same_different", seed=1, batch_size=30, **build)
    assert not torch.equal(first(other, 1)[0]["image"], together["image"])
    same(whole(many.val_dataloader()), whole(other.val_dataloader()))


def test_no_image_is_in_two_splits(first, whole):
    data = datasets.create("same_different", noise=0.0, batch_size=500, val_size=500, test_size=500)
    parts = [first(data, 1)[0], whole(data.val_dataloader())]
    parts += [whole(loader) for loader in data.test_dataloader()]
    parts.append(first(datasets.create("same_different", noise=0.0, seed=1, batch_size=500), 1)[0])
    rows = torch.cat([part["image"].flatten(1) for part in parts])
    assert len(rows.unique(dim=0)) == len(rows) == 3000


def test_fingerprints_notice_every_option():
    def fingerprint(**options: object) -> str:
        data = datasets.create("same_different", val_size=5, test_size=5, **options)
        data.setup()
        return data.fingerprint

    changes = [{}, {"cells": 5}, {"distractors": 1}, {"noise": 0.1}, {"jitter": True}]
    assert len({fingerprint(**change) for change in changes}) == len(changes)
    assert fingerprint() == fingerprint(seed=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cells": 1}, "cells=1 must be a whole number of at least 2"),
        ({"cells": 2, "distractors": 3}, "distractors=3 must be a whole number from 0 to 2"),
        ({"distractors": -1}, "distractors=-1 must be a whole number from 0 to 7"),
        ({"noise": -0.1}, "noise=-0.1 must be a number of at least 0"),
        ({"jitter": "no"}, "jitter='no' must be True or False"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        datasets.create("same_different", **options)
