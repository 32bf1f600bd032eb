"""Folders of images and videos of objects, written by the tests: what is read, skipped, refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from zoo import datasets
from zoo.datasets.vision.object_files import natural, nearest, pictures
from zoo.errors import ZooError

EIGHT = {"height": 8, "width": 12, "max_objects": 4}


def labels(number: int) -> np.ndarray:
    """Labels (8, 12) of picture `number`: two objects, the second of them wider each time."""
    found = np.zeros((8, 12), dtype=np.uint8)
    found[1:4, 1:4] = 1
    found[4:8, 5 : 7 + number % 5] = 2
    return found


def pixels(number: int) -> np.ndarray:
    """Colour picture (8, 12, 3) that says its number."""
    found = np.zeros((8, 12, 3), dtype=np.uint8)
    found[..., 0] = labels(number) * 60
    found[..., 1] = number * 10
    return found


def save(array: np.ndarray, path, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette:
        image.putpalette([c for n in range(256) for c in (n * 37 % 256, n * 91 % 256, n)])
    image.save(path)


@pytest.fixture
def clevr(tmp_path):
    """Write twelve images with labels and scenes.json."""
    scenes = []
    for number in range(12):
        name = f"img_{number}.png"
        save(pixels(number), tmp_path / "images" / name)
        save(labels(number), tmp_path / "masks" / name)
        objects = [
            {"shape": "cube", "color": "red", "size": "large", "pixel_coords": [2, 2, 9.0]},
            {"shape": "ball", "color": "blue", "size": "small", "pixel_coords": [6, 6, 8.0]},
        ]
        scenes.append({"image_filename": name, "objects": objects[: 1 + (number > 0)]})
    (tmp_path / "scenes.json").write_text(json.dumps({"scenes": scenes}))
    return tmp_path


@pytest.fixture
def movi(tmp_path):
    """Write five videos of four frames; the second object comes in the second frame."""
    for video in range(5):
        for frame in range(4):
            shown = labels(frame)
            if frame == 0:
                shown[shown == 2] = 0
            folder = tmp_path / f"video_{video}"
            save(pixels(10 * video // 4 + frame), folder / f"rgba_{frame:05d}.png")
            save(shown, folder / f"segmentation_{frame:05d}.png", palette=True)
    return tmp_path


def everything(data, whole):
    data.setup()
    parts = [data.source("train").take(torch.arange(data.size("train")))]
    parts += [whole(data.val_dataloader()), whole(data.test_dataloader()[0])]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def number_of(image: torch.Tensor) -> int:
    return round(float(image[1, 0, 0]) * 255) // 10


def test_images_masks_and_properties(clevr, whole):
    data = datasets.create("object_folders", root=str(clevr), **EIGHT)
    assert data.model_facts() == {"image_shape": (3, 8, 12), "max_objects": 4}
    assert data.example()[0].shape == (1, 3, 8, 12)
    batch = everything(data, whole)
    assert {n: data.size(n) for n in ("train", "val", "test")} == {"train": 10, "val": 1, "test": 1}
    assert batch["image"].shape == (12, 3, 8, 12)
    assert batch["masks"].shape == (12, 4, 8, 12)
    assert sorted(number_of(image) for image in batch["image"]) == list(range(12))
    for row, image in enumerate(batch["image"]):
        number = number_of(image)
        assert torch.equal(
            (image * 255).round().byte(), torch.tensor(pixels(number)).permute(2, 0, 1)
        )
        for index in range(4):
            wanted = torch.tensor(labels(number) == index + 1)
            assert torch.equal(batch["masks"][row, index], wanted)
        count = 1 + (number > 0)
        assert batch["count"][row] == count
        assert batch["present"][row].tolist() == [index < count for index in range(4)]
        # Names are numbered in order: ball, cube; blue, red; large, small.
        assert batch["shape"][row].tolist() == [1, 0, 0, 0]
        assert batch["colour"][row].tolist() == [1, 0, 0, 0]
        assert batch["size"][row].tolist() == [0.0, float(count == 2), 0.0, 0.0]
        place = torch.tensor([[2 / 12, 2 / 8], [6 / 12, 6 / 8], [0, 0], [0, 0]])
        torch.testing.assert_close(batch["position"][row, :count], place[:count])
    assert "material" not in batch
    assert not data.skipped


def test_one_picture_per_object_beside_each_other_or_in_a_folder(tmp_path, whole):
    for number in range(4):
        save(pixels(number), tmp_path / "images" / "a" / f"{number}.png")
        for index in range(2):
            layer = (labels(number) == index + 1).astype(np.uint8) * 255
            name = f"{number}_{index}.png" if number % 2 else f"{number}/{index}.png"
            save(layer, tmp_path / "masks" / "a" / name)
    batch = everything(datasets.create("object_folders", root=str(tmp_path), **EIGHT), whole)
    assert batch.keys() == {"image", "masks", "present", "count"}
    for image, masks in zip(batch["image"], batch["masks"], strict=True):
        for index in range(2):
            assert torch.equal(masks[index], torch.tensor(labels(number_of(image)) == index + 1))
    assert batch["count"].tolist() == [2] * 4


def test_colours_are_labels_in_order(tmp_path, whole):
    colours = np.array([(0, 0, 0), (9, 0, 0), (0, 200, 7)], dtype=np.uint8)
    for number in range(3):
        save(pixels(number), tmp_path / "images" / f"{number}.png")
        save(colours[labels(number)], tmp_path / "masks" / f"{number}.png")
    batch = everything(datasets.create("object_folders", root=str(tmp_path), **EIGHT), whole)
    for image, masks in zip(batch["image"], batch["masks"], strict=True):
        # 200 green is the smaller number, so it comes first.
        assert torch.equal(masks[0], torch.tensor(labels(number_of(image)) == 2))
        assert torch.equal(masks[1], torch.tensor(labels(number_of(image)) == 1))


def test_videos(movi, whole):
    data = datasets.create("object_folders", root=str(movi), frames=3, **EIGHT)
    assert data.example()[0].shape == (1, 3, 3, 8, 12)
    batch = everything(data, whole)
    assert batch.keys() == {"video", "masks", "present", "count"}
    assert batch["video"].shape == (5, 3, 3, 8, 12)
    assert batch["masks"].shape == (5, 3, 4, 8, 12)
    assert batch["count"].tolist() == [2] * 5
    present = torch.tensor([[True, False], [True, True], [True, True]])
    assert torch.equal(batch["present"][:, :, :2], present.expand(5, 3, 2))
    for frame in (1, 2):
        assert torch.equal(batch["masks"][0, frame, 1], torch.tensor(labels(frame) == 2))


def test_scaling_keeps_labels_whole(clevr, whole):
    data = datasets.create("object_folders", root=str(clevr), height=16, width=6, max_objects=2)
    batch = everything(data, whole)
    assert batch["image"].shape == (12, 3, 16, 6)
    for image, masks in zip(batch["image"], batch["masks"], strict=True):
        expected = torch.tensor(labels(number_of(image)))[:, 1::2].repeat_interleave(2, 0)
        assert torch.equal(masks[0], expected == 1)
        assert torch.equal(masks[1], expected == 2)


def test_nearest_takes_the_pixel_around_the_middle():
    grid = np.arange(12).reshape(3, 4)
    assert nearest(grid, (3, 4)).tolist() == grid.tolist()
    assert nearest(grid, (1, 2)).tolist() == [[5, 7]]
    assert nearest(grid, (6, 4))[::2].tolist() == grid.tolist()


def test_images_without_masks(tmp_path, whole):
    for number in range(5):
        save(pixels(number), tmp_path / "images" / f"{number}.png")
    batch = everything(datasets.create("object_folders", root=str(tmp_path), **EIGHT), whole)
    assert batch.keys() == {"image"}


def test_what_cannot_be_read_is_named_skipped_and_counted(clevr):
    (clevr / "images" / "img_3.png").write_bytes(b"no picture")
    broken = clevr / "masks" / "img_5.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (clevr / "masks" / "img_7.png").unlink()
    data = datasets.create("object_folders", root=str(clevr), **EIGHT)
    with pytest.warns(UserWarning, match=r"3 of 12 examples of .*img_3\.png .*img_5\.png .*img_7"):
        data.setup()
    assert [name.rsplit("/", 1)[1] for name in data.skipped] == [
        "img_3.png", "img_5.png", "img_7.png",
    ]  # fmt: skip
    assert "masks" in list(data.skipped)[1]
    assert sum(data.size(split) for split in ("train", "val", "test")) == 9


def test_a_broken_or_short_video_is_skipped(movi):
    (movi / "video_1" / "rgba_00002.png").write_bytes(b"")
    (movi / "video_3" / "rgba_00003.png").unlink()
    data = datasets.create("object_folders", root=str(movi), frames=4, **EIGHT)
    with pytest.warns(UserWarning, match=r"2 of 5 .*video_1.rgba_00002.*video_3 \(3 frames, not 4"):
        data.setup()
    assert len(data.skipped) == 2


def test_a_mask_of_another_size_is_refused(clevr):
    save(labels(0)[:, :10], clevr / "masks" / "img_2.png")
    data = datasets.create("object_folders", root=str(clevr), **EIGHT)
    with pytest.raises(
        ZooError, match=r"img_2.png' has 8x10 pixels, but image '.*img_2.png' has 8x12"
    ):
        data.setup()


def test_more_objects_than_allowed_are_refused(clevr):
    options = {**EIGHT, "max_objects": 1}
    with pytest.raises(ZooError, match=r"img_0.png' show 2 objects; max_objects=1"):
        datasets.create("object_folders", root=str(clevr), **options).setup()
    for mask in (clevr / "masks").iterdir():
        mask.unlink()
    (clevr / "masks").rmdir()
    with pytest.raises(ZooError, match=r"gives 'img_1.png' 2 objects; max_objects=1"):
        datasets.create("object_folders", root=str(clevr), **options).setup()


def test_labels_beyond_the_limit_are_numbered_in_order(clevr, whole):
    for number in range(12):
        save(labels(number) * 100, clevr / "masks" / f"img_{number}.png")
    batch = everything(datasets.create("object_folders", root=str(clevr), **EIGHT), whole)
    assert batch["masks"].flatten(2).any(-1).tolist() == [[True, True, False, False]] * 12


@pytest.mark.parametrize("layout", ["auto", "images", "videos"])
def test_an_empty_folder_names_the_embedded_alternative(tmp_path, layout):
    for root in (tmp_path, tmp_path / "missing"):
        data = datasets.create("object_folders", root=str(root), layout=layout)
        with pytest.raises(ZooError, match=r"holds neither pictures .*data set 'scenes' draws"):
            data.setup()
        with pytest.raises(ZooError, match="'scenes'"):
            data.example()


def test_too_few_examples_are_refused(clevr):
    for number in range(2, 12):
        (clevr / "images" / f"img_{number}.png").unlink()
    with pytest.raises(ZooError, match=r"holds 2 readable examples and 0 others; .*'scenes'"):
        datasets.create("object_folders", root=str(clevr)).setup()


def test_scenes_that_are_no_scenes_are_refused(clevr):
    (clevr / "scenes.json").write_text(json.dumps({"scenes": [{"image_filename": "img_0.png"}]}))
    with pytest.raises(
        ZooError, match=r"scenes.json' is not a file of scenes.*KeyError: 'objects'"
    ):
        datasets.create("object_folders", root=str(clevr)).setup()
    (clevr / "scenes.json").write_text(json.dumps({"scenes": []}))
    with pytest.raises(ZooError, match=r"do not describe 'img_0.png'"):
        datasets.create("object_folders", root=str(clevr), **EIGHT).setup()


def test_the_split_is_fixed_and_the_fingerprint_notices_pixels_and_masks(clevr, first, same):
    def make(**options):
        data = datasets.create("object_folders", root=str(clevr), **EIGHT, **options)
        data.setup()
        return data

    a, b = make(seed=1), make(seed=2)
    assert torch.equal(a.source("val").pixels, b.source("val").pixels)
    assert a.fingerprint == b.fingerprint
    assert make(limit=6).size("train") == 4
    same(first(a, 2)[1], first(make(seed=1), 2)[1])
    save(labels(4), clevr / "masks" / "img_2.png")
    assert make().fingerprint != a.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "video"}, "unknown layout 'video'; did you mean 'videos'"),
        ({"max_objects": 0}, "max_objects=0 must be a whole number from 1 to 255"),
        ({"frames": 0}, "frames=0 must be a whole number of at least 1"),
        ({"height": 0}, "height=0 must be a whole number of at least 1"),
        ({"val_share": 1.2}, r"val_share=1.2 must be a number in \[0, 1\]"),
        ({"val_share": 0.5, "test_share": 0.5}, "leave nothing to train on"),
        ({"limit": 2}, "limit=2 must be a whole number of at least 3"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        datasets.create("object_folders", root="x", **options)


def test_natural_order(tmp_path):
    for name in ("rgba_10.png", "rgba_9.png", "rgba_9.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in pictures(tmp_path, "*")] == ["rgba_9.png", "rgba_10.png"]
    names = ["b2", "a10", "a9", "a"]
    assert sorted(names, key=natural) == ["a", "a9", "a10", "b2"]
