"""Fashion-MNIST and CIFAR-10: local files, hub rows, validation split, standardising."""

from __future__ import annotations

import struct
from pathlib import Path

import datasets as hf
import pytest
import torch
from PIL import Image
from torch import Tensor

from zoo import datasets
from zoo.datasets import hub
from zoo.datasets.vision import fashion_mnist
from zoo.datasets.vision.images import ImageData, LargeImageData, permutation
from zoo.errors import ZooError

TRAIN, TEST = 60, 20
SHAPES = {"fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
COLUMNS = {"fashion_mnist": "image", "cifar10": "img"}
REPOSITORIES = {"fashion_mnist": "zalando-datasets/fashion_mnist", "cifar10": "uoft-cs/cifar10"}

Parts = dict[str, tuple[Tensor, Tensor]]


def random_parts(name: str) -> Parts:
    generator = torch.Generator().manual_seed(0)
    return {
        split: (
            torch.randint(256, (size, *SHAPES[name]), generator=generator).to(torch.uint8),
            torch.arange(size) % 10,
        )
        for split, size in (("train", TRAIN), ("test", TEST))
    }


def write_idx(file: Path, values: Tensor) -> None:
    head = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    file.write_bytes(head + values.to(torch.uint8).numpy().tobytes())


def write_native(name: str, parts: Parts, folder: Path) -> None:
    """Write the files in which the data set is distributed."""
    for split, (images, labels) in parts.items():
        if name == "fashion_mnist":
            stem = {"train": "train", "test": "t10k"}[split]
            write_idx(folder / f"{stem}-images-idx3-ubyte", images[:, 0])
            write_idx(folder / f"{stem}-labels-idx1-ubyte", labels)
            continue
        records = torch.cat((labels.to(torch.uint8)[:, None], images.flatten(1)), dim=1)
        pieces = records.chunk(5) if split == "train" else [records]
        for number, piece in enumerate(pieces, 1):
            file = f"data_batch_{number}.bin" if split == "train" else "test_batch.bin"
            (folder / file).write_bytes(piece.numpy().tobytes())


def rows(name: str, images: Tensor, labels: Tensor) -> hf.Dataset:
    pictures = [
        Image.fromarray((i[0] if len(i) == 1 else i.permute(1, 2, 0)).numpy()) for i in images
    ]
    features = hf.Features({COLUMNS[name]: hf.Image(), "label": hf.Value("int64")})
    return hf.Dataset.from_dict(
        {COLUMNS[name]: pictures, "label": labels.tolist()}, features=features
    )


@pytest.fixture(params=SHAPES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def parts(name: str) -> Parts:
    return random_parts(name)


def build(name: str, **options: object) -> LargeImageData:
    return datasets.create(name, **{"val_size": 10, "standardize": False, **options})


def check(data: LargeImageData, name: str, parts: Parts, whole) -> None:
    """Require the data set to hold exactly these images, split as documented."""
    data.setup()
    order = permutation(TRAIN, name)
    images, labels = parts["train"]
    expected = {
        "train": (images[order[:50]], labels[order[:50]]),
        "val": (images[order[50:]], labels[order[50:]]),
        "test": parts["test"],
    }
    train = data.source("train").take(torch.arange(50))
    val, test = whole(data.val_dataloader()), whole(data.test_dataloader()[0])
    for split, batch in (("train", train), ("val", val), ("test", test)):
        assert batch["image"].dtype == torch.float32
        assert torch.equal((batch["image"] * 255).round().to(torch.uint8), expected[split][0])
        assert torch.equal(batch["label"], expected[split][1])


def test_native_files(name: str, parts: Parts, tmp_path: Path, whole):
    write_native(name, parts, tmp_path)
    check(build(name, root=str(tmp_path)), name, parts, whole)


def test_parquet_files(name: str, parts: Parts, tmp_path: Path, whole):
    (tmp_path / "data").mkdir()
    for split, part in parts.items():
        table = rows(name, *part)
        half = len(table) // 2
        for number, piece in enumerate((range(half), range(half, len(table)))):
            file = tmp_path / "data" / f"{split}-0000{number}-of-00002.parquet"
            table.select(piece).to_parquet(file)
    check(build(name, root=str(tmp_path)), name, parts, whole)


def test_rows_of_the_hub(name: str, parts: Parts, tmp_path: Path, whole, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "PACKAGE_FOLDER", tmp_path / "none")
    loaded = hf.DatasetDict({split: rows(name, *part) for split, part in parts.items()})
    monkeypatch.setattr(hub, "load", lambda *_, **__: loaded)
    check(build(name), name, parts, whole)


def test_what_is_asked_of_the_hub(name: str, parts: Parts, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "PACKAGE_FOLDER", tmp_path / "none")
    asked = []

    def load(repository, **told):
        asked.append((repository, told["name"], told["instead"]))
        return hf.DatasetDict({split: rows(name, *part) for split, part in parts.items()})

    monkeypatch.setattr(hub, "load", load)
    build(name).setup()
    assert asked == [(REPOSITORIES[name], name, "digits")]


def test_own_files_are_read_where_the_parquet_files_lie_too(name, parts, tmp_path, whole):
    write_native(name, parts, tmp_path)
    for split, (images, labels) in parts.items():
        rows(name, images ^ 1, labels).to_parquet(tmp_path / f"{split}-0.parquet")
    check(build(name, root=str(tmp_path)), name, parts, whole)


def test_the_folder_of_the_package_is_used_where_there_is_one(tmp_path: Path, monkeypatch, whole):
    parts = random_parts("fashion_mnist")
    write_native("fashion_mnist", parts, tmp_path)
    monkeypatch.setattr(fashion_mnist, "PACKAGE_FOLDER", tmp_path)
    monkeypatch.setattr(hub, "load", lambda *_, **__: pytest.fail("asked the hub"))
    check(build("fashion_mnist"), "fashion_mnist", parts, whole)


def test_standardising_makes_training_channels_mean_0_deviation_1(name, parts, tmp_path, whole):
    images = parts["train"][0]
    parts["train"] = (images // torch.tensor([1, 2, 4])[: images.shape[1], None, None], None)
    parts["train"] = (parts["train"][0].to(torch.uint8), torch.arange(TRAIN) % 10)
    write_native(name, parts, tmp_path)
    plain, data = build(name, root=str(tmp_path)), build(name, root=str(tmp_path), standardize=True)
    data.setup()
    plain.setup()
    train = data.source("train").take(torch.arange(50))["image"].double()
    channels = train.transpose(0, 1).flatten(1)
    zero, one = torch.zeros(len(channels)).double(), torch.ones(len(channels)).double()
    torch.testing.assert_close(channels.mean(dim=1), zero, rtol=0, atol=1e-5)
    torch.testing.assert_close(channels.std(dim=1, correction=0), one, rtol=0, atol=1e-5)
    # The other splits get the same shift and scale, not their own.
    unit = plain.source("train").take(torch.arange(50))["image"].transpose(0, 1).flatten(1)
    mean, spread = (x.view(-1, 1, 1) for x in (unit.mean(1), unit.std(1, correction=0)))
    for split in ("val", "test"):
        raw = whole(plain.eval_dataloader(split))["image"]
        found = whole(data.eval_dataloader(split))["image"]
        torch.testing.assert_close(found, (raw - mean) / spread, rtol=1e-4, atol=1e-4)
    assert data.fingerprint != plain.fingerprint


def test_images_of_one_grey_are_standardised_to_zero(tmp_path: Path):
    parts = random_parts("fashion_mnist")
    parts["train"] = (torch.full_like(parts["train"][0], 7), parts["train"][1])
    write_native("fashion_mnist", parts, tmp_path)
    data = build("fashion_mnist", root=str(tmp_path), standardize=True)
    data.setup()
    assert not data.source("train").take(torch.arange(50))["image"].any()


def test_few_shot_takes_the_first_training_images(name, parts, tmp_path):
    write_native(name, parts, tmp_path)
    full, few = build(name, root=str(tmp_path)), build(name, root=str(tmp_path), few_shot=7)
    full.setup()
    few.setup()
    assert few.size("train") == 7
    assert torch.equal(few.source("train").images, full.source("train").images[:7])
    too_many = build(name, root=str(tmp_path), few_shot=51)
    with pytest.raises(ZooError, match="few_shot=51 must be at most 50, the training images"):
        too_many.setup()


def test_the_fingerprint_notices_one_pixel_and_one_label(name, parts, tmp_path):
    def fingerprint() -> str:
        write_native(name, parts, tmp_path)
        data = build(name, root=str(tmp_path))
        data.setup()
        return data.fingerprint

    before = fingerprint()
    assert fingerprint() == before
    images, labels = parts["test"]
    images[3, 0, 5, 5] ^= 1
    changed = fingerprint()
    labels[3] = (labels[3] + 1) % 10
    assert len({before, changed, fingerprint()}) == 3


def test_missing_folders_and_files_are_refused(name, tmp_path):
    title = {"fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}[name]
    with pytest.raises(ZooError, match=rf"root .*none' is not a folder; .* with {title}"):
        build(name, root=str(tmp_path / "none"))
    data = build(name, root=str(tmp_path))
    message = rf"no {title} train part; allowed: .*(idx3-ubyte|_1\.bin).*, or with train\*\.parquet"
    with pytest.raises(ZooError, match=message):
        data.setup()


def test_wrong_content_is_refused(tmp_path: Path):
    parts = random_parts("fashion_mnist")
    write_native("fashion_mnist", parts, tmp_path)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", torch.arange(TEST) % 11)
    with pytest.raises(ZooError, match="has 10 classes; its test split has labels from 0 to 10"):
        build("fashion_mnist", root=str(tmp_path)).setup()
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", torch.zeros(TEST - 1))
    with pytest.raises(ZooError, match=r"its test split has \(20, 1, 28, 28\) and 19 labels"):
        build("fashion_mnist", root=str(tmp_path)).setup()
    write_idx(tmp_path / "t10k-images-idx3-ubyte", torch.zeros(TEST - 1, 27, 28))
    with pytest.raises(ZooError, match=r"needs images of shape \(1, 28, 28\)"):
        build("fashion_mnist", root=str(tmp_path)).setup()
    write_idx(tmp_path / "t10k-images-idx3-ubyte", torch.zeros(TEST))
    with pytest.raises(ZooError, match="has 1 dimensions; needed: 3"):
        build("fashion_mnist", root=str(tmp_path)).setup()


def test_a_cut_binary_file_is_refused(tmp_path: Path):
    write_native("cifar10", random_parts("cifar10"), tmp_path)
    file = tmp_path / "data_batch_3.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ZooError, match=r"'data_batch_3.bin' has .* a multiple of 3073"):
        build("cifar10", root=str(tmp_path)).setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_size": 0}, "val_size=0 must be a whole number of at least 1"),
        ({"standardize": 1}, "standardize=1 must be True or False"),
        ({"few_shot": 0}, "few_shot=0 must be a whole number of at least 1"),
    ],
)
def test_impossible_options_are_refused(name, options, message):
    with pytest.raises(ZooError, match=message):
        build(name, **options)


def test_a_validation_set_larger_than_the_data_is_refused(name, parts, tmp_path):
    write_native(name, parts, tmp_path)
    with pytest.raises(ZooError, match="val_size=60 must be below 60, the training images"):
        build(name, root=str(tmp_path), val_size=60).setup()


def test_the_base_classes_have_no_images():
    for base in (ImageData, LargeImageData):
        with pytest.raises(NotImplementedError):
            base().setup()


@pytest.mark.skipif(
    not fashion_mnist.PACKAGE_FOLDER.is_dir(),
    reason="needs the Debian package dataset-fashion-mnist",
)
def test_the_packaged_fashion_mnist_is_complete():
    data = datasets.create("fashion_mnist", val_size=6000)
    data.setup()
    assert [data.size(split) for split in ("train", "val", "test")] == [54_000, 6000, 10_000]
    counts = sum(
        data.source(split).labels.bincount(minlength=10) for split in ("train", "val", "test")
    )
    assert counts.tolist() == [7000] * 10
