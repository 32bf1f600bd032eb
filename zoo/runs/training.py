"""A training on its way: data, model and trainer, and what is known of them for the record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from zoo.datasets import DataModule
from zoo.parts import advance
from zoo.pictures.show import save_figure
from zoo.report import environment
from zoo.report.files import replace_text
from zoo.runs import cost
from zoo.runs.build import CHECKPOINTS, CONFIG, build_task
from zoo.runs.callbacks import Bar, Clock, Diverged, Keeper, Progress
from zoo.runs.checkpoints import LAST, AtomicCheckpointIO, keeper_state, read_checkpoint
from zoo.runs.config import data_module, identify, settings
from zoo.runs.records import Record, write
from zoo.runs.schema import accelerator
from zoo.runs.setting import setting, shared_cores
from zoo.tasks import Task

PICTURES = "pictures"
_TERMINATED = 128 + 15  # what a shell reports of a process that SIGTERM ended


def _like(item: Tensor, model: nn.Module) -> Tensor:
    """Bring an input to the device of a model, and numbers to its type."""
    weight = next(model.parameters())
    return item.to(weight.device, weight.dtype if item.is_floating_point() else item.dtype)


def task_pictures(task: Task, data: DataModule) -> dict[str, Figure]:
    """Let a task draw its first validation batch.

    Args:
        task: The task with its model.
        data: Its data.
    """
    data.setup()
    batch = next(iter(data.val_dataloader()))
    batch = {key: _like(value, task.model) for key, value in batch.items()}
    was_training = task.training
    task.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return task.pictures(batch)
    finally:
        task.train(was_training)


def is_main() -> bool:
    """Return whether this process is the one of a run that writes its record."""
    return getattr(rank_zero_only, "rank", 0) == 0


@contextmanager
def _endings() -> Iterator[None]:
    """Let interrupts end the process in the usual ways, not in Lightning's."""
    try:
        yield
    except SIGTERMException:
        raise SystemExit(_TERMINATED) from None
    except SystemExit:  # what Lightning makes of an interrupt from the keyboard
        raise KeyboardInterrupt from None


@dataclass
class Training:
    """One run, new or resumed.

    Args:
        config: Its configuration.
        folder: Its folder; a checkpoint in it is gone on from.

    Raises:
        ZooError: This machine lacks the device, or the checkpoint is not one of this run.
    """

    config: DictConfig
    folder: Path
    _data: DataModule | None = None
    _facts: dict[str, Any] = field(default_factory=dict)
    _main: bool = field(default_factory=is_main)
    _task: Task | None = None

    def __post_init__(self) -> None:
        self.identity = identify(self.config)
        trainer, metrics = self.config.trainer, self.config.metrics
        self.clock = Clock()
        self.keeper = Keeper(
            self.folder / CHECKPOINTS,
            config_hash=self.identity.config_hash,
            select=metrics.select,
            mode=metrics.mode,
            max_steps=trainer.max_steps,
            eval_every=trainer.eval_every,
            checkpoint_every=trainer.checkpoint_every,
            stop_at=trainer.stop_at,
        )
        self._accelerator = accelerator(trainer.accelerator)
        last = self.folder / CHECKPOINTS / LAST
        self._state = keeper_state(last, self.identity.config_hash) if last.is_file() else None

    def run(self, *, bar: bool) -> None:
        """Train from the start or from the last checkpoint, then evaluate the best once.

        Args:
            bar: Show a progress bar.

        Raises:
            Diverged: The loss is no longer a finite number.
            ZooError: The data or the model are not what they should be.
        """
        last = self.folder / CHECKPOINTS / LAST
        for draft in last.parent.glob(".*.tmp"):  # what a kill left of a checkpoint
            draft.unlink()
        if not (self.folder / CONFIG).is_file():
            replace_text(self.folder / CONFIG, OmegaConf.to_yaml(self.config))
        data = data_module(self.config)
        data.setup()
        self._data = data
        processes = self.config.trainer.devices if self._accelerator == "cpu" else 1
        with setting(self.config.seed), shared_cores(processes):
            task = build_task(self.config, data)
            trainer = self._trainer(bar)
            self._main = trainer.is_global_zero
            self._facts["device"] = environment.device(trainer.strategy.root_device)
            try:
                with _endings():
                    self._fit(trainer, task, data)
                    self._test(trainer, task, data)
            except Diverged:
                self._measure(trainer, task, data)
                raise
            self._measure(trainer, task, data)
        self._task = task

    def draw(self) -> list[Path]:
        """Save the pictures of the best checkpoint on validation examples, once it has run.

        Returns:
            The files, none of a task without pictures.
        """
        if self._task is None or self._data is None or not self._main:
            return []
        found = task_pictures(self._task, self._data)
        folder = self.folder / PICTURES
        return [save_figure(figure, folder / f"{name}.png") for name, figure in found.items()]

    def _trainer(self, bar: bool) -> Trainer:
        given = self.config.trainer
        callbacks: list[Callback] = [self.clock, self.keeper, Progress()]
        minutes = given.max_minutes
        return Trainer(
            accelerator=self._accelerator,
            devices=given.devices,
            strategy="ddp" if given.strategy == "auto" and given.devices > 1 else given.strategy,
            precision=given.precision,
            max_steps=given.max_steps,
            max_epochs=-1,
            max_time=None if minutes is None else timedelta(minutes=minutes),
            val_check_interval=given.eval_every,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            gradient_clip_val=self.config.optim.clip,
            deterministic="warn",
            inference_mode=False,  # MESH takes gradients inside its forward pass
            logger=CSVLogger(self.folder, name="log"),
            log_every_n_steps=10,
            callbacks=[*callbacks, Bar(self.identity.id)] if bar else callbacks,
            enable_progress_bar=bar,
            enable_model_summary=False,
            use_distributed_sampler=False,  # the data module shares out every batch itself
            plugins=[AtomicCheckpointIO()],
            default_root_dir=self.folder,
        )

    def _fit(self, trainer: Trainer, task: Task, data: DataModule) -> None:
        root = trainer.strategy.root_device
        if root.type == "cuda":
            torch.cuda.reset_peak_memory_stats(root)
        last = None
        if self._state is not None:
            last = self.folder / CHECKPOINTS / LAST
            data.start_step = self._state["step"]
            if self._state["over"]:
                self.keeper.load_state_dict(self._state)
                self.clock.load_state_dict(read_checkpoint(last)["callbacks"][self.clock.state_key])
                return
        trainer.fit(task, datamodule=data, ckpt_path=last, weights_only=True)

    def _test(self, trainer: Trainer, task: Task, data: DataModule) -> None:
        """Evaluate the checkpoint that was best on validation on every test set, once."""
        advance(task, self.keeper.best["step"] / self.config.trainer.max_steps)
        trainer.test(
            task,
            datamodule=data,
            ckpt_path=self.keeper.best_path,
            verbose=False,
            weights_only=True,
        )
        best = self.keeper.best
        self._facts["metrics"] = {
            **{name: best[name] for name in best if name.startswith("val/")},
            **{name: float(value) for name, value in trainer.callback_metrics.items()},
        }

    def _measure(self, trainer: Trainer, task: Task, data: DataModule) -> None:
        """Note what the model costs, apart from anything that is timed."""
        root = trainer.strategy.root_device
        self._facts["peak_memory_bytes"] = cost.peak_memory(root)
        model = task.model.eval()
        one = [_like(item, model) for item in data.example()]
        self._facts["parameters"] = cost.parameters(model)
        self._facts["flops"] = cost.flops(model, *one)
        self._facts["state_bytes"] = cost.state_bytes(model, one[0])

    def remember(self) -> None:
        """Take over how far an earlier process came, for the record of a run that goes no further.

        Raises:
            ZooError: The checkpoint cannot be read.
        """
        if self._state is not None:
            last = read_checkpoint(self.folder / CHECKPOINTS / LAST)
            self.keeper.load_state_dict(self._state)
            self.clock.load_state_dict(last["callbacks"][self.clock.state_key])

    def leave(self, records: str | Path, status: str, error: str | None) -> Record:
        """Write the record.

        Args:
            records: Folder of the records.
            status: finished, nan or failed.
            error: What went wrong, in one line.

        Raises:
            ZooError: The folder cannot be written.
        """
        config = settings(self.config)
        fingerprint = None if self._data is None else self._data.fingerprint
        cpu, wall = self.clock.median
        facts = {"device": environment.device("cpu"), **self._facts}
        record = Record(
            id=self.identity.id,
            recipe=config["name"],
            track=config["track"],
            group=self.identity.group,
            config_hash=self.identity.config_hash,
            attention=config["attention"],
            seed=config["seed"],
            lr=config["optim"]["lr"],
            status=status,
            error=error,
            metric=config["metrics"],
            history=self.keeper.history,
            steps=self.keeper.step,
            examples=self.keeper.step * config["data"]["batch_size"],
            step_time_cpu=cpu,
            step_time_wall=wall,
            conv=bool(config["model"].get("conv")),
            data={"name": config["data"]["name"], "fingerprint": fingerprint},
            versions=environment.versions(),
            commit=environment.commit(),
            created=datetime.now(UTC).isoformat(),
            config=config,
            **facts,
        )
        if self._main:
            write(record, records)
        return record
