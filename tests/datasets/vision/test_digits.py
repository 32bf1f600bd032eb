"""Digits: the split, the corruptions, few-shot subsets."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from zoo import datasets
from zoo.datasets.vision.digits import add_noise, occlude, shift
from zoo.errors import ZooError


@pytest.fixture
def data():
    made = datasets.create("digits")
    made.setup()
    return made


@pytest.fixture
def sets(data, whole):
    loaders = zip(data.test_names, data.test_dataloader(), strict=True)
    found = {name: whole(loader) for name, loader in loaders}
    train = data.source("train").take(torch.arange(data.size("train")))
    return {"train": train, "val": whole(data.val_dataloader()), **found}


def test_sizes_shapes_and_types(data, sets):
    sizes = {name: len(batch["label"]) for name, batch in sets.items()}
    assert sizes == {
        "train": 1197,
        "val": 240,
        **dict.fromkeys(("test", "occlusion", "noise", "shift"), 360),
    }
    for batch in sets.values():
        assert batch["image"].shape[1:] == data.image_shape == (1, 8, 8)
        assert batch["image"].dtype == torch.float32
        assert batch["label"].dtype == torch.int64
    assert data.num_classes == 10
    assert data.task == "classification"


def test_the_splits_are_the_whole_set_once(sets):
    bunch = load_digits()
    expected = sorted(
        (*image.flatten().tolist(), int(label))
        for image, label in zip(bunch.images / 16, bunch.target, strict=True)
    )
    found = sorted(
        (*image.flatten().tolist(), int(label))
        for name in ("train", "val", "test")
        for image, label in zip(sets[name]["image"], sets[name]["label"], strict=True)
    )
    assert found == expected


def test_every_class_is_in_every_split(sets):
    for name in ("train", "val", "test"):
        counts = sets[name]["label"].bincount(minlength=10)
        assert (counts > 0.05 * counts.sum()).all()


def test_corrupted_sets_are_the_test_set_changed(sets):
    clean = sets["test"]["image"]
    for name in ("occlusion", "noise", "shift"):
        assert torch.equal(sets[name]["label"], sets["test"]["label"])
        assert not torch.equal(sets[name]["image"], clean)
    noise = sets["noise"]["image"] - clean
    assert noise.std().item() == pytest.approx(0.3, abs=0.01)
    assert noise.mean().item() == pytest.approx(0, abs=0.01)


def places(mask: torch.Tensor) -> set[tuple[int, int]]:
    return {tuple(pair) for pair in mask.nonzero().tolist()}


def test_occlusion_is_one_square_of_three_pixels_anywhere():
    images = occlude(torch.ones(600, 1, 8, 8), torch.Generator().manual_seed(0))
    corners = set()
    for image in images[:, 0]:
        gone = places(image == 0)
        top, left = min(gone)
        assert gone == {(top + y, left + x) for y in range(3) for x in range(3)}
        corners.add((top, left))
    assert corners == {(y, x) for y in range(6) for x in range(6)}


def test_shift_moves_by_one_pixel_in_each_of_eight_directions():
    image = torch.zeros(400, 1, 8, 8)
    image[:, 0, 4, 4] = 1
    moved = shift(image, torch.Generator().manual_seed(0))
    found = [places(one[0] == 1) for one in moved]
    assert all(len(one) == 1 for one in found)
    around = {(y, x) for y in (3, 4, 5) for x in (3, 4, 5)} - {(4, 4)}
    assert set.union(*found) == around


def test_what_is_shifted_out_is_gone_and_zeros_come_in():
    moved = shift(torch.ones(100, 1, 8, 8), torch.Generator().manual_seed(0))
    kept = set(moved.sum(dim=(1, 2, 3)).tolist())
    assert kept == {56.0, 49.0}


def test_noise_leaves_the_images_themselves_alone():
    images = torch.zeros(3, 1, 8, 8)
    add_noise(images, torch.Generator().manual_seed(0))
    assert not images.any()


def test_few_shot_subsets_are_nested_and_leave_the_rest_alone(data, whole, same):
    few = datasets.create("digits", few_shot=100, batch_size=100)
    fewer = datasets.create("digits", few_shot=30, seed=4, batch_size=30)
    (hundred,), (thirty,) = (
        [next(iter(made.train_dataloader()))["image"]] for made in (few, fewer)
    )
    train = data.source("train").images
    assert {tuple(i.flatten().tolist()) for i in hundred} == {
        tuple(i.flatten().tolist()) for i in train[:100]
    }
    assert {tuple(i.flatten().tolist()) for i in thirty} == {
        tuple(i.flatten().tolist()) for i in train[:30]
    }
    same(whole(few.test_dataloader()[0]), whole(data.test_dataloader()[0]))
    assert few.fingerprint != data.fingerprint


def test_an_epoch_shows_every_image_once(first):
    made = datasets.create("digits", few_shot=48, batch_size=16)
    batches = first(made, 6)
    pixels = made.source("train").images.sum(dim=(1, 2, 3)).sort().values
    for epoch in (batches[:3], batches[3:]):
        seen = torch.cat([batch["image"] for batch in epoch]).sum(dim=(1, 2, 3)).sort().values
        torch.testing.assert_close(seen, pixels)


@pytest.mark.parametrize("few_shot", [0, -1, 1198, 10.0])
def test_impossible_few_shot_is_refused(few_shot):
    with pytest.raises(ZooError) as caught:
        datasets.create("digits", few_shot=few_shot)
    assert str(caught.value).startswith(f"few_shot={few_shot} must be a whole number ")
    assert str(caught.value).endswith(", or None")
    if few_shot == 1198:
        assert " from 1 to 1197 (nearest: 1197)" in str(caught.value)
