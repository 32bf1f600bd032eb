"""The data module that all data sets share: splits, loaders and reproducible order.

A training batch is a function of (seed, step), so ``start_step`` resumes a killed run exactly.
Validation and test sets do not depend on the seed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from zoo import checks
from zoo.datasets.batches import Batches, EvalBatches, Source, Steps
from zoo.datasets.order import Chunks, Order, Shard
from zoo.errors import ZooError, unknown

IGNORE = -100
"""Target of a position without a target; what ``cross_entropy`` ignores by default."""

Loader = DataLoader[dict[str, Tensor]]


def content_hash(*items: Tensor | bytes | str) -> str:
    """SHA-256 over tensors (type, shape and values), bytes and strings, in this order."""
    digest = hashlib.sha256()
    for item in items:
        if isinstance(item, Tensor):
            data = item.contiguous().numpy()
            head, body = f"{data.dtype}{data.shape}".encode(), data.tobytes()
        else:
            body = item if isinstance(item, bytes) else item.encode()
            head = str(len(body)).encode()
        digest.update(head + b":")
        digest.update(body)
    return digest.hexdigest()


@dataclass(kw_only=True, eq=False, repr=False)
class DataModule(LightningDataModule):
    """What every data set has: its task, splits by name, and loaders of dictionaries of tensors.

    A subclass is a keyword-only dataclass whose fields are its options. It checks them in
    ``__post_init__``, reads its data in ``load`` and hands out ``source`` and ``order``; what a
    model must be told of it is in ``model_facts``, an input for one example in ``example``.

    Args:
        batch_size: Training examples per step, over all processes together.
        eval_batch_size: Examples per validation or test batch; fewer of a set whose sequences are
            longer than those of training.
        seed: Seed of the training order or stream.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.

    Attributes:
        name: Registered name.
        task: Name of the task, see `zoo.tasks`.
        needs: What it takes beside this library, such as files; empty if nothing.
        start_step: Step of the first training batch; set it to resume.
        total_steps: Step after the last training batch.
    """

    batch_size: int = 64
    eval_batch_size: int = 256
    seed: int = 0
    num_workers: int = 0

    task: ClassVar[str]
    needs: ClassVar[str] = ""

    def __post_init__(self) -> None:
        super().__init__()
        self.batch_size = checks.whole("batch_size", self.batch_size, 1)
        self.eval_batch_size = checks.whole("eval_batch_size", self.eval_batch_size, 1)
        self.seed = checks.whole("seed", self.seed, 0)
        self.num_workers = checks.whole("num_workers", self.num_workers, 0)
        self.start_step = 0
        self.total_steps = 10**9
        self._ready = False

    # What a subclass provides.

    def load(self) -> None:
        """Read or generate the data; called once, by ``setup``."""
        raise NotImplementedError

    def source(self, split: str) -> Source:
        """Return the examples of "train", "val" or one of ``test_names``."""
        raise NotImplementedError

    def size(self, split: str) -> int:
        """Return the number of examples in "val" or one of ``test_names``."""
        raise NotImplementedError

    def eval_rows(self, split: str) -> int:
        """Return the number of examples per batch of "val" or one of ``test_names``."""
        return self.eval_batch_size

    def order(self) -> Order:
        """Return the order of training."""
        raise NotImplementedError

    def digest(self) -> str:
        """Return the hash that identifies the data once it is loaded."""
        raise NotImplementedError

    def model_facts(self) -> dict[str, Any]:
        """Return what a model of this data must be told, by the names of its parameters."""
        raise NotImplementedError

    def task_facts(self) -> dict[str, Any]:
        """Return what the task must be told beside the model, by the names of its parameters."""
        return {}

    def example(self) -> tuple[Tensor, ...]:
        """Return what a model takes, for one example of training, all zeros."""
        raise NotImplementedError

    # What a user calls.

    @property
    def test_names(self) -> list[str]:
        """Names of the test sets, "test" first."""
        return ["test"]

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the data; batch size and seed do not change it.

        Raises:
            ZooError: Asked for before ``setup``.
        """
        if not self._ready:
            raise ZooError(f"fingerprint of data set {self.name!r} is known only after setup()")
        return self.digest()

    def setup(self, stage: str | None = None) -> None:
        """Read or generate the data, once.

        Args:
            stage: Lightning's stage; all stages share the data.
        """
        if not self._ready:
            self.load()
            self._ready = True

    def train_dataloader(self) -> Loader:
        """Return the training batches from ``start_step`` to ``total_steps``.

        Raises:
            ZooError: ``start_step`` lies outside, or the processes cannot share a batch evenly.
        """
        self.setup()
        self.total_steps = checks.whole("total_steps", self.total_steps, 1)
        self.start_step = checks.whole("start_step", self.start_step, 0, self.total_steps)
        order = self.order()
        trainer = self.trainer
        if trainer is not None and trainer.world_size > 1:
            if self.batch_size % trainer.world_size:
                raise ZooError(
                    f"batch_size {self.batch_size} cannot be shared by {trainer.world_size} "
                    f"processes; allowed: multiples of {trainer.world_size}"
                )
            order = Shard(order, trainer.global_rank, trainer.world_size)
        batches = Batches(self.source("train"), order)
        return self._loader(batches, Steps(self.start_step, self.total_steps))

    def val_dataloader(self) -> Loader:
        """Return the validation batches."""
        return self.eval_dataloader("val")

    def test_dataloader(self) -> list[Loader]:
        """Return one loader for each of ``test_names``."""
        return [self.eval_dataloader(name) for name in self.test_names]

    def eval_dataloader(self, split: str) -> Loader:
        """Return the batches of a finite split, in its own order.

        Args:
            split: "val" or one of ``test_names``.

        Raises:
            ZooError: No such split.
        """
        splits = ["val", *self.test_names]
        if split not in splits:
            raise unknown(f"split of data set {self.name!r}", split, splits)
        self.setup()
        order = Chunks(self.size(split), self.eval_rows(split))
        return self._loader(EvalBatches(self.source(split), order))

    def _loader(self, batches: Batches, steps: Steps | None = None) -> Loader:
        # A loader draws a seed for its workers; from its own generator, so that looking at data
        # leaves the global random state, and with it dropout, as it was.
        return DataLoader(
            batches,
            batch_size=None,
            sampler=steps,
            num_workers=self.num_workers,
            generator=torch.Generator(),
        )
