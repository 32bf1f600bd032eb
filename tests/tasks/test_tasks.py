"""The tasks: their figures against a plain computation, their losses, and training itself."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader

from zoo.datasets import IGNORE
from zoo.errors import ZooError
from zoo.tasks import (
    ImageClassification,
    LanguageModelling,
    Optim,
    TokenTagging,
    find,
)


class Fixed(nn.Module):
    """Gives the logits it was told to give, batch after batch."""

    def __init__(self, *logits):
        super().__init__()
        self.queue = list(logits)
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.queue.pop(0) + self.weight


def evaluate(task, batches, split=0):
    for batch in batches:
        if split == 0:
            task.validation_step(batch, 0)
        else:
            task.test_step(batch, 0, split - 1)
    return {name: float(value) for name, value in task.figures[split].compute().items()}


def tagging(*logits, tests=("test",)):
    return TokenTagging(Fixed(*logits), Optim(lr=1.0), max_steps=10, test_names=tests)


def test_tagging_counts_positions_and_whole_examples():
    logits = [torch.randn(2, 3, 4), torch.randn(1, 3, 4)]
    targets = [
        torch.tensor([[0, IGNORE, 3], [IGNORE, IGNORE, 1]]),
        torch.tensor([[2, 1, IGNORE]]),
    ]
    # The second and third examples are right everywhere they are asked, the first nowhere.
    logits[0][0] = -10 * F.one_hot(torch.tensor([0, 0, 3]), 4)
    logits[0][1, 2, 1] = 10
    logits[1][0, 0, 2] = logits[1][0, 1, 1] = 10
    batches = [{"tokens": torch.zeros_like(t), "targets": t} for t in targets]
    found = evaluate(tagging(*logits), batches)

    flat, wanted = (
        torch.cat([x.flatten(0, 1) for x in logits]),
        torch.cat([t.flatten() for t in targets]),
    )
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["exact"] == pytest.approx(2 / 3)
    assert found["loss"] == pytest.approx(float(F.cross_entropy(flat, wanted)))


def test_unmarked_positions_change_neither_loss_nor_figures():
    logits = torch.randn(2, 5, 7)
    targets = torch.full((2, 5), IGNORE)
    targets[:, 3] = torch.tensor([2, 6])
    other = logits.clone()
    other[:, :3] += torch.randn(2, 3, 7)
    batch = {"tokens": torch.zeros(2, 5), "targets": targets}
    a, b = tagging(logits), tagging(other)
    assert a.loss(a.logits(batch), batch) == b.loss(b.logits(batch), batch)
    assert evaluate(tagging(logits), [batch]) == evaluate(tagging(other), [batch])


def test_language_figures_weigh_every_token_alike():
    logits = [torch.randn(2, 4, 6), torch.randn(1, 4, 6)]
    targets = [torch.randint(6, (2, 4)), torch.randint(6, (1, 4))]
    task = LanguageModelling(
        Fixed(*logits), Optim(lr=1.0), max_steps=10, test_names=["test"], bytes_per_token=2.0
    )
    batches = [{"tokens": torch.zeros_like(t), "targets": t} for t in targets]
    found = evaluate(task, batches)
    nats = float(
        F.cross_entropy(
            torch.cat([x.flatten(0, 1) for x in logits]), torch.cat([t.flatten() for t in targets])
        )
    )
    assert found["loss"] == pytest.approx(nats)
    assert found["perplexity"] == pytest.approx(math.exp(nats), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / 2)


def test_uniform_logits_cost_eight_bits_a_byte():
    task = LanguageModelling(
        Fixed(torch.zeros(1, 5, 256)), Optim(lr=1.0), max_steps=10, test_names=["test"]
    )
    batch = {"tokens": torch.zeros(1, 5), "targets": torch.arange(5)[None]}
    found = evaluate(task, [batch])
    assert found["bits_per_byte"] == pytest.approx(8)
    assert found["perplexity"] == pytest.approx(256, rel=1e-4)


def test_classification_figures():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0], [0.0, 1.0, 0.5], [4.0, 0.0, 0.0]])
    label = torch.tensor([0, 2, 2, 1])
    task = ImageClassification(Fixed(logits), Optim(lr=1.0), max_steps=10, test_names=["test"])
    found = evaluate(task, [{"image": torch.zeros(4, 1, 2, 2), "label": label}])
    assert found == pytest.approx({"accuracy": 0.5, "loss": float(F.cross_entropy(logits, label))})


def test_a_loss_that_is_no_number_shows_in_the_figures():
    batch = {"tokens": torch.zeros(1, 2), "targets": torch.tensor([[0, 1]])}
    assert math.isnan(evaluate(tagging(torch.full((1, 2, 3), torch.nan)), [batch])["loss"])


def test_splits_are_named_and_kept_apart():
    task = tagging(torch.eye(2)[None], -torch.eye(2)[None], tests=("test", "sparse"))
    assert task.splits == ["val", "test", "test_sparse"]
    batch = {"tokens": torch.zeros(1, 2), "targets": torch.tensor([[0, 1]])}
    assert evaluate(task, [batch], 1)["accuracy"] == 1
    assert evaluate(task, [batch], 2)["accuracy"] == 0


@pytest.mark.parametrize(
    "name", ["classification", "collapse", "language", "regression", "tagging"]
)
def test_every_task_declares_the_figures_it_gives(name):
    task = find(name)(Fixed(), Optim(lr=1.0), max_steps=10, test_names=["test"])
    figures = task.make_figures()
    targets = torch.eye(2)[None] if name == "regression" else torch.tensor([[0, 1]])
    batch = {"targets": targets, "label": torch.tensor([0, 1]), "gap": torch.ones(1)}
    figures.update(torch.eye(2) if name == "classification" else torch.eye(2)[None], batch)
    assert tuple(figures.compute()) == find(name).names
    assert "loss" in find(name).names


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ZooError, match="did you mean 'tagging'"):
        find("taging")


class Tiny(nn.Module):
    """An embedding and a layer, with an auxiliary loss if wanted."""

    def __init__(self, auxiliary=None):
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.out = nn.Linear(8, 5)
        self.auxiliary = auxiliary
        self.aux_losses = {}

    def forward(self, tokens):
        if self.auxiliary is not None:
            self.aux_losses = {"balance": self.auxiliary * self.embedding.weight.square().sum()}
        return self.out(self.embedding(tokens))


def batches(count):
    source = torch.Generator().manual_seed(0)
    for _ in range(count):
        tokens = torch.randint(5, (4, 3), generator=source)
        yield {"tokens": tokens, "targets": (tokens + 1) % 5}


def fit(task, steps):
    from lightning.pytorch.callbacks import Callback

    rates, logged = [], []

    class Note(Callback):
        def on_train_batch_start(self, trainer, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        def on_train_batch_end(self, trainer, *args):
            logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Note()],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*many workers.*|.*LeafSpec.*|.*no `val_dataloader`.*"
        )
        trainer.fit(task, DataLoader(list(batches(steps)), batch_size=None))
    return rates, logged


def test_the_learning_rate_moves_at_every_step():
    optim = Optim(lr=0.5, warmup=0.2, schedule="linear")
    task = TokenTagging(Tiny(), optim, max_steps=10, test_names=["test"])
    rates, _ = fit(task, 10)
    assert rates == pytest.approx([0.25, 0.5, 0.5, *(0.5 * (1 - i / 8) for i in range(1, 8))])


def test_training_lowers_the_loss():
    task = TokenTagging(Tiny(), Optim(lr=0.1, weight_decay=0.0), max_steps=60, test_names=["test"])
    _, logged = fit(task, 60)
    assert logged[-1]["train/loss"] < 0.2 * logged[0]["train/loss"]


def test_auxiliary_losses_are_minimised_and_logged_apart():
    def after(auxiliary):
        torch.manual_seed(0)
        model = Tiny(auxiliary)
        task = TokenTagging(
            model, Optim(lr=0.01, weight_decay=0.0), max_steps=20, test_names=["test"]
        )
        return model.embedding.weight.square().sum().item(), fit(task, 20)[1], model

    _, plain, _ = after(None)
    start, pulled, model = after(10.0)
    assert "train/aux_balance" not in plain[0]
    assert pulled[0]["train/aux_balance"] == pytest.approx(10 * start, rel=1e-5)
    # The task's own loss is logged without it, so the first steps agree.
    assert pulled[0]["train/loss"] == pytest.approx(plain[0]["train/loss"])
    assert model.embedding.weight.square().sum().item() < 0.9 * start
