"""What all tasks share: the training step, evaluation on every split, and the optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from zoo.host.collect import auxiliary_losses
from zoo.tasks.optim import Optim, parameter_groups, schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Batch = dict[str, Tensor]


class Figures(nn.Module):
    """The metrics of one split."""

    def update(self, logits: Any, batch: Batch) -> None:
        """Take in a batch."""
        raise NotImplementedError

    def compute(self) -> dict[str, Tensor]:
        """Return the figures over all batches by name, summed over processes."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget all batches."""
        for metric in self.children():
            assert isinstance(metric, Metric)
            metric.reset()


def mean() -> MeanMetric:
    """Return a metric that averages numbers; one that is not a number shows in the average."""
    return MeanMetric(nan_strategy="disable")


class Task(LightningModule):
    """A model with a loss, an optimiser and figures by split.

    Validation figures are named ``val/...``, those of the first test set ``test/...`` and those
    of a further test set ``test_NAME/...``. Auxiliary losses of the model's parts are added to
    the training loss and logged as ``train/aux_NAME``; ``train/loss`` is the task's loss alone.

    Args:
        model: From batches to logits.
        optim: How the weights are updated.
        max_steps: Steps of the schedule.
        test_names: Names of the test sets, the first of which is "test".
    """

    names: ClassVar[tuple[str, ...]]
    """What the figures are called, without the split."""

    def __init__(
        self, model: nn.Module, optim: Optim, *, max_steps: int, test_names: Sequence[str]
    ) -> None:
        super().__init__()
        self.model = model
        self.optim = optim
        self.warmup = optim.warmup_steps(max_steps)
        self.max_steps = max_steps
        tests = [name if name == "test" else f"test_{name}" for name in test_names]
        self.splits = ["val", *tests]
        self.figures = nn.ModuleList(self.make_figures() for _ in self.splits)

    # What a task provides.

    def make_figures(self) -> Figures:
        """Return fresh metrics for a split."""
        raise NotImplementedError

    def logits(self, batch: Batch) -> Any:
        """Run the model."""
        raise NotImplementedError

    def loss(self, logits: Any, batch: Batch) -> Tensor:
        """Return the mean loss of a batch."""
        raise NotImplementedError

    def targets(self, batch: Batch) -> int | Tensor:
        """Return over how many numbers the loss is a mean, up to a factor.

        Args:
            batch: The batch.
        """
        return len(next(iter(batch.values())))

    def pictures(self, batch: Batch) -> dict[str, Figure]:
        """Draw what the model does on a batch, by name; a run saves them at its end.

        Args:
            batch: A batch of validation, in evaluation mode and without gradients.
        """
        return {}

    def take(self, index: int, batch: Batch) -> None:
        """Take a batch into the figures of a split.

        Args:
            index: Number of the split, 0 for validation.
            batch: The batch.
        """
        self.split(index).update(self.logits(batch), batch)

    def split(self, index: int) -> Figures:
        """Return the figures of a split.

        Args:
            index: Number of the split, 0 for validation.
        """
        figures = self.figures[index]
        assert isinstance(figures, Figures)
        return figures

    # What Lightning calls.

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss to minimise.

        Args:
            batch: The batch.
            batch_idx: Its number.
        """
        loss = self.loss(self.logits(batch), batch)
        if (share := self._share(batch)) is not None:
            loss = loss * share
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=1, sync_dist=True)
        for name, value in auxiliary_losses(self.model).items():
            self.log(f"train/aux_{name}", value.detach(), batch_size=1, sync_dist=True)
            loss = loss + value
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Take a validation batch into the figures.

        Args:
            batch: The batch.
            batch_idx: Its number.
        """
        self.take(0, batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take a test batch into the figures.

        Args:
            batch: The batch.
            batch_idx: Its number.
            dataloader_idx: Number of the test set.
        """
        self.take(1 + dataloader_idx, batch)

    def on_validation_epoch_end(self) -> None:
        """Log the validation figures."""
        self._finish(0)

    def on_test_epoch_end(self) -> None:
        """Log the figures of all test sets."""
        for index in range(1, len(self.splits)):
            self._finish(index)

    def configure_optimizers(self) -> Any:
        """Return AdamW and its schedule, stepped at every step."""
        optim = self.optim
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, optim.weight_decay),
            lr=optim.lr,
            betas=(optim.betas[0], optim.betas[1]),
            # One kernel for all parameters; elsewhere torch's own choice is as quick.
            fused=True if self.device.type == "cpu" else None,
        )
        factor = schedule(optim.schedule, self.warmup, self.max_steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _share(self, batch: Batch) -> Tensor | None:
        """Return the weight of this process's loss in the mean over processes, if there are more.

        With it that mean is the loss of the whole batch, whoever has how many of its targets.
        """
        group = torch.distributed
        if not (group.is_available() and group.is_initialized() and group.get_world_size() > 1):
            return None
        own = torch.as_tensor(self.targets(batch), dtype=torch.float32, device=self.device)
        every = own.clone()
        group.all_reduce(every)
        return own * group.get_world_size() / every

    def _finish(self, index: int) -> None:
        figures = self.split(index)
        for name, value in figures.compute().items():
            shown = index == 0 and name == self.names[0]
            self.log(
                f"{self.splits[index]}/{name}", value, prog_bar=shown, batch_size=1, sync_dist=True
            )
        figures.reset()
