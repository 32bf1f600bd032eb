"""What every data module does: loaders, resuming, sharing between processes, refusals."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from zoo import datasets
from zoo.datasets import IGNORE, DataModule
from zoo.datasets.base import content_hash
from zoo.errors import ZooError

# One data set for each order of training: stream, finite generated set, text windows, images.
KINDS = {
    "stream": ("mqar", {"vocab_size": 64, "seq_len": 16, "pairs": 2}),
    "finite": ("flip_flop", {"seq_len": 8, "train_size": 50}),
    "text": ("bytes_stdlib", {"seq_len": 16, "max_bytes": 20_000}),
    "images": ("digits", {"few_shot": 50}),
}


@pytest.fixture(params=KINDS)
def build(request: pytest.FixtureRequest):
    name, options = KINDS[request.param]

    def make(**more: object) -> DataModule:
        return datasets.create(name, **{"batch_size": 12, **options, **more})

    return make


def test_a_resumed_run_sees_the_batches_that_were_left(build, first, same):
    through = first(build(), 9)
    resumed = build()
    resumed.start_step = 5
    for expected, batch in zip(through[5:], first(resumed, 4), strict=True):
        same(expected, batch)


def test_training_batches_depend_on_the_seed_and_on_nothing_else(build, first, same):
    a, b, other = first(build(seed=3), 4), first(build(seed=3), 4), first(build(seed=4), 4)
    for left, right in zip(a, b, strict=True):
        same(left, right)
    assert any(not torch.equal(x[key], y[key]) for x, y in zip(a, other, strict=True) for key in x)


def test_validation_and_test_do_not_depend_on_the_seed(build, same):
    left, right = build(seed=0), build(seed=1)
    assert left.test_names == right.test_names
    pairs = [(left.val_dataloader(), right.val_dataloader())]
    pairs += list(zip(left.test_dataloader(), right.test_dataloader(), strict=True))
    for mine, yours in pairs:
        for a, b in zip(mine, yours, strict=True):
            same(a, b)


def test_every_test_set_is_named_and_the_first_is_test(build):
    data = build()
    assert data.test_names[0] == "test"
    assert len(data.test_dataloader()) == len(data.test_names)
    assert len(set(data.test_names)) == len(data.test_names)


def test_evaluation_goes_through_the_whole_set_whatever_the_batch(build, whole, same):
    for split in ["val", *build().test_names]:
        small, large = build(eval_batch_size=7), build(eval_batch_size=10_000)
        loader = small.eval_dataloader(split)
        assert len(loader) == -(-small.size(split) // 7)
        same(whole(loader), whole(large.eval_dataloader(split)))


def test_looking_at_data_leaves_the_global_random_state_alone(build, first):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    data = build()
    first(data, 2)
    list(data.val_dataloader())
    assert torch.equal(before, torch.get_rng_state())


def test_processes_share_a_batch_without_overlap(build, first):
    together = first(build(), 3)
    parts = []
    for rank in range(3):
        data = build()
        data.trainer = SimpleNamespace(global_rank=rank, world_size=3)
        parts.append(first(data, 3))
    for step, batch in enumerate(together):
        for key, value in batch.items():
            for rank in range(3):
                assert torch.equal(parts[rank][step][key], value[rank::3])


def test_a_batch_that_processes_cannot_share_is_refused(build):
    data = build()
    data.trainer = SimpleNamespace(global_rank=0, world_size=5)
    with pytest.raises(ZooError, match="batch_size 12 cannot be shared by 5"):
        data.train_dataloader()


def test_the_length_counts_down_from_the_start(build):
    data = build()
    assert len(data.train_dataloader()) == 10**9
    data.total_steps, data.start_step = 20, 15
    assert len(data.train_dataloader()) == len(list(data.train_dataloader())) == 5


@pytest.mark.parametrize(("start", "total"), [(-1, 10), (11, 10), (1.0, 10), (0, 0)])
def test_impossible_steps_are_refused(build, start, total):
    data = build()
    data.start_step, data.total_steps = start, total
    with pytest.raises(ZooError, match="_step"):
        data.train_dataloader()


def test_the_fingerprint_is_stable_and_known_after_setup(build):
    data = build()
    with pytest.raises(ZooError, match=r"setup\(\)"):
        _ = data.fingerprint
    data.setup("fit")
    other = build(seed=7, batch_size=3, eval_batch_size=5)
    other.setup()
    assert data.fingerprint == other.fingerprint
    assert len(data.fingerprint) == 64
    assert int(data.fingerprint, 16) >= 0


def test_setup_reads_once(build, monkeypatch):
    data = build()
    data.setup("fit")
    monkeypatch.setattr(type(data), "load", lambda self: pytest.fail("loaded twice"))
    data.setup("test")
    data.train_dataloader()


@pytest.mark.parametrize("option", ["batch_size", "eval_batch_size"])
@pytest.mark.parametrize("value", [0, -3, 2.0, "8", True, None])
def test_impossible_batch_sizes_are_refused(build, option, value):
    message = f"{option}={value!r} must be a whole number of at least 1"
    with pytest.raises(ZooError, match=f"^{re.escape(message)}"):
        build(**{option: value})


def test_numbers_of_numpy_are_taken_like_others():
    plain = datasets.create("flip_flop", seq_len=8, p_ignore=0.5, val_size=4)
    other = datasets.create(
        "flip_flop", seq_len=np.int64(8), p_ignore=np.float32(0.5), val_size=np.int8(4)
    )
    for data in (plain, other):
        data.setup()
    assert other.fingerprint == plain.fingerprint
    assert (type(other.seq_len), type(other.p_ignore)) == (int, float)


@pytest.mark.parametrize("option", ["seed", "num_workers"])
def test_negative_seed_or_workers_are_refused(build, option):
    with pytest.raises(ZooError, match=f"^{option}=-1 must be a whole number of at least 0$"):
        build(**{option: -1})


def test_unknown_splits_are_refused(build):
    with pytest.raises(ZooError, match=r"unknown split of data set .*did you mean 'test'"):
        build().eval_dataloader("tests")


def test_worker_processes_give_the_same_batches(first, same):
    name, options = KINDS["stream"]
    plain = datasets.create(name, **options, batch_size=100)
    workers = datasets.create(name, **options, batch_size=100, num_workers=2)
    workers.total_steps = 6
    for left, right in zip(first(plain, 6), workers.train_dataloader(), strict=True):
        same(left, right)


class Recorder(LightningModule):
    """A model that remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []
        self.evaluated: dict[int, int] = {}

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        self.seen.append(batch["tokens"])
        return self.weight * (batch["targets"] != IGNORE).sum()

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        pass

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        rows = self.evaluated.get(dataloader_idx, 0)
        self.evaluated[dataloader_idx] = rows + len(batch["tokens"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


# Lightning's own: a deprecated call of its own, and advice that depends on the machine.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:GPU available but not used:UserWarning")
def test_lightning_trains_on_the_batches_in_order(tmp_path, first):
    name, options = KINDS["stream"]
    model = Recorder()
    data = datasets.create(name, **options, val_size=30, test_size=20, test_sizes=[(8, 1)])
    data.start_step = 3
    trainer = Trainer(
        accelerator="cpu",
        max_steps=4,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, datamodule=data)
    expected = first(datasets.create(name, **options), 7)[3:]
    assert len(model.seen) == 4
    for seen, batch in zip(model.seen, expected, strict=True):
        assert torch.equal(seen, batch["tokens"])
    trainer.test(model, datamodule=data, verbose=False)
    assert model.evaluated == {0: 20, 1: 20}


def test_content_hash_depends_on_type_shape_values_and_boundaries():
    items = [
        (torch.arange(6),),
        (torch.arange(6).float(),),
        (torch.arange(6).reshape(2, 3),),
        (torch.arange(1, 7),),
        (b"ab", b"c"),
        (b"a", b"bc"),
        ("abc",),
    ]
    assert len({content_hash(*item) for item in items}) == len(items)
    transposed = torch.arange(6).reshape(2, 3).T
    assert content_hash(transposed) == content_hash(transposed.contiguous())
