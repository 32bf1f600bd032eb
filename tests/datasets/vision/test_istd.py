"""Folders of shadows, written by the tests: what is found, paired, cropped, skipped and refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from zoo import datasets
from zoo.datasets.vision.istd_files import read
from zoo.errors import ZooError

SMALL = {"height": 8, "width": 8, "batch_size": 3, "mask_error": 0}


def save(array: np.ndarray, path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)


def triplet(number: int, size=(12, 16)):
    """A target whose pixels say row, column and number; half of it under a shadow."""
    height, width = size
    target = np.zeros((height, width, 3))
    target[..., 0] = np.arange(height)[:, None] * 10
    target[..., 1] = np.arange(width) * 10
    target[..., 2] = number
    mask = np.zeros((height, width))
    mask[:, : width // 2] = 255
    image = np.where(mask[..., None] > 0, target // 2, target)
    return image, mask, target


def pixels(array: np.ndarray) -> torch.Tensor:
    return torch.tensor(array).permute(2, 0, 1).float() / 255


def write(root, split: str, name: str, number: int, size=(12, 16), inside: bool = True) -> None:
    base = root / split if inside else root
    for letter, array in zip("ABC", triplet(number, size), strict=True):
        save(array, base / f"{split}_{letter}" / f"{name}.png")


@pytest.fixture
def folder(tmp_path):
    """Ten scenes of two images for training, three images for test."""
    for scene in range(10):
        for view in range(2):
            write(tmp_path, "train", f"{scene + 1}-{view + 1}", 10 * scene + view)
    for number in range(3):
        write(tmp_path, "test", f"{number}-1", 200 + number)
    return tmp_path


def build(root, **options: object):
    return datasets.create("istd", root=str(root), **{**SMALL, **options})


def numbers(batch) -> list[int]:
    return (batch["target"][:, 2].amax((1, 2)) * 255).round().int().tolist()


def test_images_masks_and_targets_are_paired_by_name(folder, whole):
    data = build(folder)
    batch = whole(data.test_dataloader()[0])
    assert numbers(batch) == [200, 201, 202]
    for row, number in enumerate((200, 201, 202)):
        image, mask, target = triplet(number)
        assert torch.equal(batch["image"][row], pixels(image))
        assert torch.equal(batch["target"][row], pixels(target))
        assert torch.equal(batch["mask"][row, 0], torch.tensor(mask > 0))
    assert batch["image"].dtype == torch.float32
    assert not data.skipped


def test_validation_sets_whole_scenes_aside(folder, first, whole):
    data = build(folder, val_share=0.3, batch_size=14)
    val = {n // 10 for n in numbers(whole(data.val_dataloader()))}
    epoch = numbers(first(data, 1)[0])
    assert (data.size("train"), data.size("val"), data.size("test")) == (14, 6, 3)
    assert sorted(epoch) == sorted(set(epoch))
    assert len(val) == 3
    assert not val & {n // 10 for n in epoch}


def test_training_crops_are_cut_mirrored_and_turned_alike(folder, first):
    data = build(folder, batch_size=60)
    (batch,) = first(data, 1)
    assert batch["image"].shape == (60, 3, 8, 8)
    assert batch["mask"].shape == (60, 1, 8, 8)
    inside = batch["mask"].expand_as(batch["image"])
    target = (batch["target"] * 255).round()
    assert torch.equal((batch["image"] * 255).round()[inside], (target // 2)[inside])
    assert torch.equal(batch["image"][~inside], batch["target"][~inside])
    # Which way rows and columns of the image run in the crop: eight ways, all of which occur.
    ways = set()
    for crop in target:
        steps = [(crop[c, 1, 0] - crop[c, 0, 0], crop[c, 0, 1] - crop[c, 0, 0]) for c in (0, 1)]
        ways.add(tuple(int(x) for pair in steps for x in pair))
    assert len(ways) == 8
    corners = {tuple(crop[:2].amin((1, 2)).tolist()) for crop in target}
    assert len(corners) > 15
    (plain,) = first(build(folder, batch_size=60, augment=False), 1)
    rows = plain["target"][:, 0]
    assert (rows[:, 1:] > rows[:, :-1]).all()


def test_crops_that_are_not_square_are_not_turned(folder, first):
    (batch,) = first(build(folder, height=8, width=12, batch_size=30), 1)
    rows = batch["target"][:, 0]
    assert batch["image"].shape[2:] == (8, 12)
    assert torch.equal(rows, rows[..., :1].expand_as(rows))


def test_masks_of_training_are_misdrawn_and_those_of_test_are_not(folder, first, whole):
    (batch,) = first(build(folder, mask_error=2, batch_size=60), 1)
    target = (batch["target"] * 255).round()
    true = ((batch["image"] * 255).round() != target).any(1)
    assert not torch.equal(batch["mask"][:, 0], true)
    data = build(folder, mask_error=2)
    assert torch.equal(
        whole(data.val_dataloader())["mask"], whole(build(folder).val_dataloader())["mask"]
    )


def test_batches_are_a_function_of_seed_and_step(folder, first, same):
    left, right, other = first(build(folder), 5), first(build(folder), 5), build(folder, seed=1)
    for a, b in zip(left, right, strict=True):
        same(a, b)
    assert not torch.equal(left[0]["image"], first(other, 1)[0]["image"])
    resumed = build(folder)
    resumed.start_step = 3
    same(first(resumed, 1)[0], left[3])
    assert not torch.equal(left[0]["image"], left[1]["image"])


def test_images_smaller_than_a_crop_are_continued(folder, first):
    (batch,) = first(build(folder, height=20, width=24, augment=False), 1)
    assert batch["image"].shape[2:] == (20, 24)
    last = batch["target"][:, :, 11:12, 15:16]
    assert torch.equal(batch["target"][:, :, 12:, 16:], last.expand(-1, -1, 8, 8))


def test_reading_again_gives_the_same_as_holding(folder, first, whole, same):
    held, again = build(folder), build(folder, hold=False)
    same(first(held, 1)[0], first(again, 1)[0])
    same(whole(held.val_dataloader()), whole(again.val_dataloader()))
    assert again._splits["train"].held is None
    assert held.fingerprint == again.fingerprint
    save(triplet(99)[2], folder / "test" / "test_C" / "0-1.png")
    changed = build(folder)
    changed.setup()
    assert changed.fingerprint != held.fingerprint


def test_folders_may_lie_at_the_root(tmp_path, whole):
    for n in range(4):
        write(tmp_path, "train", f"{n}-1", n, inside=False)
        write(tmp_path, "test", f"{n}-1", 100 + n, inside=False)
    assert numbers(whole(build(tmp_path).test_dataloader()[0])) == [100, 101, 102, 103]


def test_corrected_targets_are_taken_if_they_are_there(folder, whole):
    for number in range(3):
        corrected = triplet(220 + number)[2]
        save(corrected, folder / "test_C_fixed_official" / f"{number}-1.png")
    for scene in range(10):
        for view in range(2):
            save(triplet(150)[2], folder / "train_C_fixed_ours" / f"{scene + 1}-{view + 1}.png")
    assert numbers(whole(build(folder).test_dataloader()[0])) == [220, 221, 222]
    assert set(numbers(whole(build(folder).val_dataloader()))) == {150}
    original = build(folder, targets="original")
    assert numbers(whole(original.test_dataloader()[0])) == [200, 201, 202]
    only = build(folder, targets="corrected")
    assert numbers(whole(only.test_dataloader()[0])) == [220, 221, 222]


def test_images_of_different_size_are_evaluated_one_by_one(folder):
    write(folder, "test", "9-1", 209, size=(8, 20))
    data = build(folder)
    shapes = [tuple(batch["image"].shape) for batch in data.test_dataloader()[0]]
    assert shapes == [(1, 3, 12, 16)] * 3 + [(1, 3, 8, 20)]
    assert len(list(data.val_dataloader())) == 1


def test_missing_partners_and_broken_files_are_skipped_named_and_counted(folder):
    (folder / "train" / "train_B" / "1-1.png").unlink()
    (folder / "train" / "train_C" / "2-1.png").write_bytes(b"no picture")
    full = (folder / "test" / "test_A" / "1-1.png").read_bytes()
    (folder / "test" / "test_A" / "1-1.png").write_bytes(full[: len(full) // 2])
    save(triplet(0)[1], folder / "test" / "test_B" / "77-1.png")
    data = build(folder)
    with pytest.warns(UserWarning, match=r"4 files of .* are left out: .*1-1\.png \(no mask") as w:
        data.setup()
    assert w[0].message.args[0].endswith(" ...")
    assert len(w) == 1
    names = {name.rsplit("/", 2)[-2] + "/" + name.rsplit("/", 1)[-1] for name in data.skipped}
    assert names == {"train_A/1-1.png", "train_C/2-1.png", "test_A/1-1.png", "test_B/77-1.png"}
    assert (
        "no mask of its name in train_B"
        in data.skipped[str(folder / "train" / "train_A" / "1-1.png")]
    )
    assert data.size("train") + data.size("val") == 18
    assert data.size("test") == 2


@pytest.mark.parametrize(("letter", "what"), [("B", "mask"), ("C", "target")])
def test_another_size_of_mask_or_target_names_both_files(folder, letter, what):
    _, mask, target = triplet(3, (11, 16))
    save(mask if letter == "B" else target, folder / "train" / f"train_{letter}" / "3-1.png")
    with pytest.raises(ZooError, match=rf"{what} '.*train_{letter}.3-1.png' has 11x16 .* image "
                       r"'.*train_A.3-1.png' has 12x16"):  # fmt: skip
        build(folder).setup()


@pytest.mark.parametrize("prepare", ["nothing", "empty", "no test", "one scene"])
def test_too_few_images_name_the_embedded_alternative(tmp_path, prepare):
    if prepare == "nothing":
        tmp_path = tmp_path / "absent"
    if prepare == "no test":
        for n in range(3):
            write(tmp_path, "train", f"{n}-1", n)
    if prepare == "one scene":
        write(tmp_path, "train", "1-1", 1)
        write(tmp_path, "train", "1-2", 2)
        write(tmp_path, "test", "1-1", 3)
    with pytest.raises(ZooError, match=r"root=FOLDER.*'shadows'"):
        build(tmp_path).setup()


def test_what_the_model_and_the_task_are_told(folder):
    data = build(folder, height=16, width=24, tiles=True, compare_at=256, white="D50")
    assert data.model_facts() == {"image_shape": (3, 16, 24)}
    assert data.task_facts() == {
        "tile": (16, 24), "compare_at": 256, "white": "D50", "perceptual": False,
    }  # fmt: skip
    assert build(folder).task_facts()["tile"] is None
    assert [tuple(x.shape) for x in data.example()] == [(1, 3, 16, 24), (1, 1, 16, 24)]


def test_limit_takes_the_first_in_natural_order(folder):
    data = build(folder, limit=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.setup()
    names = {files[0].stem for split in ("train", "val") for files in data._splits[split].files}
    assert names == {"1-1", "1-2", "2-1", "2-2"}


def test_colours_and_palettes_are_read_alike(tmp_path):
    image, mask, target = triplet(5)
    for letter, array in zip("ABC", (image, mask, target), strict=True):
        save(array, tmp_path / f"{letter}.png")
    grey = tuple(tmp_path / f"{letter}.png" for letter in "ABC")
    save(np.repeat(mask[..., None], 3, 2), tmp_path / "coloured.png")
    Image.open(grey[0]).convert("RGBA").save(tmp_path / "alpha.png")
    other = (tmp_path / "alpha.png", tmp_path / "coloured.png", grey[2])
    for a, b in zip(read(grey), read(other), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "fixed"}, "unknown targets 'fixed'"),
        ({"white": "D60"}, "unknown white 'D60'"),
        ({"height": 4}, "height=4 must be a whole number of at least 8"),
        ({"mask_error": -1}, "mask_error=-1 must be a whole number of at least 0"),
        ({"augment": 1}, "augment=1 must be True or False"),
        ({"tiles": "no"}, "tiles='no' must be True or False"),
        ({"val_share": 1.0}, r"val_share=1.0 must be a number in \[0, 0.9\]"),
        ({"limit": 1}, "limit=1 must be a whole number of at least 2"),
        ({"compare_at": 0}, "compare_at=0 must be a whole number of at least 8, or None"),
    ],
)
def test_impossible_options_are_refused(tmp_path, options, message):
    with pytest.raises(ZooError, match=message):
        build(tmp_path, **options)
