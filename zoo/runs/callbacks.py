"""What watches a training: the keeper of checkpoints and history, the clock, the progress bar."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, RichProgressBar
from torch import Tensor

from zoo.parts import advance
from zoo.runs.checkpoints import KEEPER, LAST, best_path, random_state, set_random_state


class Diverged(Exception):
    """The loss is no longer a finite number."""

    def __init__(self, what: str, value: float, step: int) -> None:
        super().__init__(f"{what} is {value} after {step} steps")


class Keeper(Checkpoint):
    """Keeps history, the best checkpoint and the last one, and decides when training is over.

    Everything needed to go on exactly as if nothing had happened is in `last.ckpt`, written at
    every validation: weights, optimiser, schedule, random state, history, and which checkpoint is
    the best. That one has its step in its name and older ones are removed only after `last.ckpt`
    names the new one, so that the two agree whenever the run is killed.

    Args:
        folder: Where the checkpoints go.
        config_hash: Hash of the configuration they belong to.
        select: Validation figure that chooses the best.
        mode: max or min.
        max_steps: Number of steps.
        eval_every: Steps between validations.
        checkpoint_every: Steps between further checkpoints, or None.
        stop_at: Figure at which training is over, or None.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config_hash: str,
        select: str,
        mode: str,
        max_steps: int,
        eval_every: int,
        checkpoint_every: int | None = None,
        stop_at: float | None = None,
    ) -> None:
        self.folder = folder
        self.config_hash = config_hash
        self.select, self.sign = select, 1 if mode == "max" else -1
        self.max_steps, self.eval_every = max_steps, eval_every
        self.checkpoint_every, self.stop_at = checkpoint_every, stop_at
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] = {}
        self.step = 0
        self.over = False
        self._random: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """Where the state is in a checkpoint."""
        return KEEPER

    @property
    def best_path(self) -> Path:
        """The checkpoint that was best on validation."""
        return best_path(self.folder, self.best)

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Put the random state back, once, right before the first step after a resume."""
        if self._random is not None:
            set_random_state(self._random)
            self._random = None

    def on_before_backward(self, trainer: Trainer, task: LightningModule, loss: Tensor) -> None:
        """Stop before a loss that is no number spoils the weights."""
        value = float(loss.detach())
        finite = math.isfinite(value)
        if not trainer.strategy.reduce_boolean_decision(finite):
            self.step = trainer.global_step
            raise Diverged("training loss", value, self.step)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Ask for the last validation, and write the checkpoints between validations."""
        self.step = trainer.global_step
        if self.step >= self.max_steps:
            trainer.should_stop = True
        elif (
            self.checkpoint_every is not None
            and self.step % self.checkpoint_every == 0
            and self.step % self.eval_every
        ):
            trainer.save_checkpoint(self.folder / LAST)

    def on_validation_end(self, trainer: Trainer, task: LightningModule) -> None:
        """Note the figures, and write the checkpoints."""
        figures = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/") or name == "train/loss"
        }
        row = {"step": self.step, **figures}
        self.history.append(row)
        if not math.isfinite(figures["val/loss"]):
            raise Diverged("validation loss", figures["val/loss"], self.step)
        value = figures[self.select]
        improved = not self.best or self.sign * (value - self.best[self.select]) > 0
        if improved:
            self.best = row
        reached = self.stop_at is not None and self.sign * (value - self.stop_at) >= 0
        trainer.should_stop = trainer.should_stop or reached
        self.over = trainer.should_stop
        if improved:
            trainer.save_checkpoint(self.best_path, weights_only=True)
        trainer.save_checkpoint(self.folder / LAST)
        if trainer.is_global_zero:
            for path in self.folder.glob("best-*.ckpt"):
                if path != self.best_path:
                    path.unlink()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {
            "config_hash": self.config_hash,
            "history": self.history,
            "best": self.best,
            "step": self.step,
            "over": self.over,
            "random": random_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: What `state_dict` returned.
        """
        self.history, self.best = list(state["history"]), dict(state["best"])
        self.step, self.over = state["step"], state["over"]
        self._random = state["random"]


class Progress(Callback):
    """Tells the parts of the model how much of the training is done."""

    def on_train_batch_start(self, trainer: Trainer, task: LightningModule, *args: Any) -> None:
        """Tell them before every step."""
        advance(task, trainer.global_step / trainer.max_steps)


class Clock(Callback):
    """Measures processor time and elapsed time of the training steps.

    A step is what happens between a batch and the next one being asked for: forward, backward and
    update. The first steps of a session warm up and do not count.

    Args:
        skip: Steps that do not count.
        window: Number of latest steps that do.
    """

    def __init__(self, skip: int = 3, window: int = 1000) -> None:
        self.skip = skip
        self._seen = 0
        self._times: deque[tuple[float, float]] = deque(maxlen=window)
        self._start = (0.0, 0.0)

    @property
    def median(self) -> tuple[float, float] | tuple[None, None]:
        """Median processor and elapsed seconds of a step, if any counted."""
        if not self._times:
            return None, None
        cpu, wall = zip(*self._times, strict=True)
        return statistics.median(cpu), statistics.median(wall)

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Start."""
        self._start = self._now(trainer)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Stop."""
        end = self._now(trainer)
        self._seen += 1
        if self._seen > self.skip:
            self._times.append((end[0] - self._start[0], end[1] - self._start[1]))

    @staticmethod
    def _now(trainer: Trainer) -> tuple[float, float]:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(trainer.strategy.root_device)
        return time.process_time(), time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Return the times."""
        return {"times": list(self._times)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: What `state_dict` returned.
        """
        self._times.extend((cpu, wall) for cpu, wall in state["times"])


class Bar(RichProgressBar):
    """Lightning's bar on standard error, over all steps instead of an epoch without end.

    Args:
        name: What stands beside it.
    """

    def __init__(self, name: str) -> None:
        super().__init__(console_kwargs={"stderr": True})
        self.name = name

    @property
    def total_train_batches(self) -> int:
        """Number of steps."""
        return self.trainer.max_steps

    def _get_train_description(self, current_epoch: int) -> str:
        return self.name

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return what stands beside the bar, without the number of the log."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
