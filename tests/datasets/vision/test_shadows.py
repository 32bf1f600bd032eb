"""Synthetic shadows: what is drawn, where it is cut from, and that nothing else changes."""

from __future__ import annotations

import math

import pytest
import torch

from zoo import datasets
from zoo.datasets.vision import shadow_synthesis as synthesis
from zoo.datasets.vision import shadows
from zoo.errors import ZooError
from zoo.pictures.colour import to_linear

FEW = {"height": 24, "width": 32, "val_size": 9, "test_size": 5, "batch_size": 6}


@pytest.fixture
def source():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def build():
    def make(**options: object):
        return datasets.create("shadows", **{**FEW, **options})

    return make


def test_a_batch_has_images_in_range_of_eight_bits_and_masks(build, first):
    data = build()
    (batch,) = first(data, 1)
    assert batch.keys() == {"image", "mask", "target", "region"}
    for name in ("image", "target"):
        assert batch[name].shape == (6, *data.image_shape)
        assert batch[name].min() >= 0
        assert batch[name].max() <= 1
        levels = batch[name] * 255
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    for name in ("mask", "region"):
        assert batch[name].shape == (6, 1, 24, 32)
        assert batch[name].dtype == torch.bool
    image, mask = data.example()
    assert image.shape == (1, *data.image_shape)
    assert (mask.shape, mask.dtype) == ((1, 1, 24, 32), torch.bool)
    assert data.model_facts() == {"image_shape": (3, 24, 32)}


def test_splits_are_cut_from_columns_without_a_pixel_in_common():
    used = {
        split: {column for a, b in spans for column in range(a, b)}
        for split, spans in shadows.COLUMNS.items()
    }
    assert max(max(columns) for columns in used.values()) < shadows.photographs().shape[2]
    for left in used:
        for right in used:
            if left != right:
                assert min(abs(a - b) for a in used[left] for b in used[right]) > 8
    assert min(b - a for spans in shadows.COLUMNS.values() for a, b in spans) >= shadows.WIDTH


def test_crops_lie_within_the_columns_of_their_split(source, monkeypatch):
    # A photograph whose pixels say where they are.
    columns = torch.arange(640)[None, None, :, None].expand(2, 427, 640, 3)
    place = torch.cat([columns[..., :1] // 256, columns[..., :2] % 256], -1).byte()
    place[..., 1] = torch.arange(427)[:, None] % 256
    monkeypatch.setattr(shadows, "photographs", lambda: place)
    for split, spans in shadows.COLUMNS.items():
        found = (shadows.crops(split, 200, 20, 30, source) * 255).round().long()
        x = found[:, 0] * 256 + found[:, 2]
        step = x[:, :, 1:] - x[:, :, :-1]
        assert set(step.unique().tolist()) == {-1, 1}
        assert (step == step[:, :1, :1]).all()
        assert ((found[:, 1, 1:] - found[:, 1, :-1]) % 256 == 1).all()
        allowed = {column for a, b in spans for column in range(a, b)}
        assert set(x.unique().tolist()) <= allowed
        assert len(x.unique()) > 0.8 * len(allowed)


@pytest.mark.parametrize("size", [(16, 16), (13, 31)])
def test_outlines_have_the_share_of_pixels_that_was_asked_for(size, source):
    region = synthesis.outlines(300, *size, (0.1, 0.5), source)
    share = region.float().mean((1, 2))
    one = 1 / math.prod(size)
    assert share.min() >= 0.1 - one
    assert share.max() <= 0.5 + one
    assert share.std() > 0.08
    exact = synthesis.outlines(50, *size, (0.3, 0.3), source).flatten(1).sum(1)
    assert (exact == round(0.3 * math.prod(size))).all()


def test_a_sharp_shadow_changes_nothing_outside_and_is_bluish_inside(build, source):
    data = build(penumbra=0.0, noise=0.0, mask_error=0)
    batch = data.draw(64, source)
    inside = batch["region"].expand_as(batch["image"])
    assert torch.equal(batch["image"][~inside], batch["target"][~inside])
    assert torch.equal(batch["mask"], batch["region"])
    bright = inside & (batch["target"] > 0.5)
    ratio = to_linear(batch["image"]) / to_linear(batch["target"])
    assert ratio[bright].min() > 0.2
    assert ratio[bright].max() < 0.9
    means = ratio.where(bright, 0.0).sum((0, 2, 3)) / bright.sum((0, 2, 3))
    assert means[0] + 0.05 < means[1]
    assert means[1] + 0.05 < means[2]


def test_the_shadow_by_hand(source):
    """Half as much light, no noise, stray light of at most a twentieth."""
    target = torch.full((1, 3, 2, 2), 0.5019608)  # 128 of 255, 0.2158605 in linear light
    strength = torch.tensor([[[0.0, 0.5], [1.0, 1.0]]])
    image = synthesis.cast(target, strength, (0.5, 0.5), 0.0, source)
    light = to_linear(image)[0, 0] / 0.2158605
    assert image[0, 0, 0, 0] == target[0, 0, 0, 0]
    assert 0.745 < light[0, 1] < 0.78
    assert 0.495 < light[1, 0] < 0.555
    assert light[1, 0] == light[1, 1]


def test_noise_is_in_the_shadow_only(source):
    target = torch.full((1, 3, 40, 40), 0.4)
    strength = torch.zeros(1, 40, 40)
    strength[:, :20] = 1
    image = synthesis.cast((target * 255).round() / 255, strength, (0.5, 0.5), 0.05, source)
    assert image[..., :20, :].std() > 0.01
    assert image[..., 20:, :].unique().numel() == 1


def test_edges_are_soft_and_of_varying_width(source):
    region = torch.zeros(40, 32, 32, dtype=torch.bool)
    region[:, :, 16:] = True
    assert torch.equal(synthesis.penumbra(region, 0.0, source), region.float())
    soft = synthesis.penumbra(region, 3.0, source)
    assert soft.min() >= 0
    assert soft.max() <= 1
    assert soft[..., :5].max() < 1e-3
    assert soft[..., -5:].min() > 1 - 1e-3
    between = ((soft > 0.05) & (soft < 0.95)).sum(-1)  # pixels of the edge in each row
    assert between.min() == 0
    assert between.max() >= 7


def test_blur_by_hand():
    image = torch.zeros(1, 9, 9)
    image[0, 4, 4] = 1
    found = synthesis.blurred(image, 1.0)[0]
    row = torch.exp(-torch.arange(-3, 4).square() / 2)
    row = row / row.sum()
    torch.testing.assert_close(found[1:8, 1:8], row[:, None] * row)
    assert torch.equal(synthesis.blurred(torch.ones(1, 5, 5), 2.0).round(decimals=5),
                       torch.ones(1, 5, 5))  # fmt: skip


def test_masks_grow_and_shrink_by_pixels():
    mask = torch.zeros(1, 7, 7, dtype=torch.bool)
    mask[0, 2:5, 2:5] = True
    assert synthesis.grown(mask, 1).sum() == 25
    assert synthesis.grown(mask, -1).nonzero().tolist() == [[0, 3, 3]]
    assert torch.equal(synthesis.grown(mask, 0), mask)
    full = torch.ones(1, 3, 3, dtype=torch.bool)
    assert synthesis.grown(full, -1).all()  # the edge of an image is no edge of a shadow


def test_masks_are_off_by_up_to_so_many_pixels(build, source):
    batch = build(mask_error=2).draw(64, source)
    mask, region = batch["mask"][:, 0], batch["region"][:, 0]
    which = [
        [torch.equal(mask[i], synthesis.grown(region[i : i + 1], n)[0]) for n in range(-2, 3)]
        for i in range(64)
    ]
    assert all(any(row) for row in which)
    assert all(any(column) for column in zip(*which, strict=True))


def test_examples_depend_on_index_seed_and_split_alone(build, first, whole, same):
    large = first(build(batch_size=70), 1)[0]
    small = first(build(batch_size=7), 10)
    same({k: torch.cat([b[k] for b in small]) for k in small[0]}, large)
    a, b = build(seed=1), build(seed=2)
    same(whole(a.val_dataloader()), whole(b.val_dataloader()))
    assert not torch.equal(first(a, 1)[0]["image"], first(b, 1)[0]["image"])
    val, test = whole(a.val_dataloader()), whole(a.test_dataloader()[0])
    assert (len(val["image"]), len(test["image"])) == (9, 5)
    assert not torch.equal(val["region"][:5], test["region"])
    resumed = build()
    resumed.start_step = 3
    same(first(resumed, 1)[0], first(build(), 4)[3])


def test_a_finite_training_set_is_the_beginning_of_the_stream(build, first):
    batches = first(build(train_size=12), 2)
    (stream,) = first(build(batch_size=12), 1)
    rows = [tuple(row.flatten().tolist()) for batch in batches for row in batch["image"]]
    assert sorted(rows) == sorted(tuple(row.flatten().tolist()) for row in stream["image"])


def test_worker_processes_give_the_same_batches(build, first, same):
    workers = build(num_workers=1)
    workers.total_steps = 2
    for left, right in zip(first(build(), 2), workers.train_dataloader(), strict=True):
        same(left, right)


def test_fingerprints_notice_options_and_not_the_seed(build):
    def fingerprint(**options: object) -> str:
        data = build(**options)
        data.setup()
        return data.fingerprint

    changes = [{}, {"height": 25}, {"area": [0.2, 0.5]}, {"attenuation": [0.3, 0.7]}]
    changes += [{"penumbra": 2.0}, {"noise": 0.0}, {"mask_error": 1}, {"val_size": 3}]
    assert len({fingerprint(**change) for change in changes}) == len(changes)
    assert fingerprint() == fingerprint(seed=9, batch_size=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 7}, "height=7 must be a whole number from 8 to 427"),
        ({"width": 121}, "width=121 must be a whole number from 8 to 120"),
        ({"area": [0.5, 0.1]}, r"area=\[0.5, 0.1\] must be two numbers, the first not above"),
        ({"area": [0.5]}, r"area=\[0\.5\] must be two numbers"),
        ({"area": 0.5}, "area=0.5 must be a list"),
        ({"attenuation": [0.5, 1.5]}, r"attenuation\[1\]=1.5 must be a number in \[0, 1\]"),
        ({"penumbra": -1}, r"penumbra=-1 must be a number in \[0, 10\]"),
        ({"noise": math.nan}, "noise=nan must be a number"),
        ({"mask_error": 1.5}, "mask_error=1.5 must be a whole number"),
    ],
)
def test_impossible_options_are_refused(build, options, message):
    with pytest.raises(ZooError, match=message):
        build(**options)
