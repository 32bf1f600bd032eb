"""From a configuration to data, model and task, and back from a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from zoo import models
from zoo.datasets import DataModule
from zoo.errors import ZooError
from zoo.parts import advance
from zoo.runs.checkpoints import LAST, best_path, keeper_state, read_checkpoint
from zoo.runs.config import contents, data_module, identify, load
from zoo.tasks import Task
from zoo.tasks import find as find_task

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"


def build_task(config: DictConfig, data: DataModule) -> Task:
    """Build the model for the data, and the task around it.

    A model of sequences is told the length of training as its `max_len`, which is what positions
    such as FoPE go by; test sets may be longer. A table of positions ends there, so that a model
    that has one is refused beside longer test sets unless `model.max_len` makes room for them.

    Args:
        config: What `load` returned.
        data: Its data module.

    Raises:
        ZooError: The model is impossible, or cannot run the longest test set.
    """
    options = contents(config.model)
    name = options.pop("name")
    facts, taken = data.model_facts(), models.facts_of(name)
    for fact in facts:
        if fact not in taken:
            raise ZooError(
                f"model {name!r} has no use for the {fact} of data set {config.data.name!r}, whose "
                f"task is {data.task!r}"
            )
    options |= facts
    trained = getattr(data, "seq_len", None)
    if trained is not None:
        options["max_len"] = trained if options.get("max_len") is None else options["max_len"]
        if options["max_len"] < trained:
            raise ZooError(
                f"model.max_len={options['max_len']} is shorter than the data's sequences; "
                f"allowed: at least {trained}"
            )
    model = models.create(name, attention=config.attention, **options)
    longest = getattr(data, "max_seq_len", trained)
    if longest is not None and longest > options["max_len"]:
        _try_length(model, longest, options["max_len"], config.attention)
    return find_task(config.task)(
        model,
        OmegaConf.to_object(config.optim),  # type: ignore[arg-type]
        max_steps=config.trainer.max_steps,
        test_names=data.test_names,
        **data.task_facts(),
    )


@torch.no_grad()
def _try_length(model: nn.Module, length: int, max_len: int, attention: str) -> None:
    """Run a model at the length of the longest test set, before it is trained for nothing."""
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            model(torch.zeros(1, length, dtype=torch.int64))
    except ZooError as error:
        raise ZooError(
            f"attention={attention!r} cannot run the longest test set, of {length} tokens, with "
            f"model.max_len={max_len}: {error}; set model.max_len={length}, or take a position "
            "without a table, such as rope"
        ) from None
    finally:
        model.train(was_training)


@dataclass
class Restored:
    """A run as it was left.

    Args:
        config: Its configuration.
        data: Its data module, not yet set up.
        task: Its task, whose `model` has the weights of the best checkpoint, in evaluation mode.
        step: Step of that checkpoint.
    """

    config: DictConfig
    data: DataModule
    task: Task
    step: int


def read_config(run: str | Path) -> DictConfig:
    """Read the configuration of a run.

    Args:
        run: Its folder.

    Raises:
        ZooError: The folder or its configuration is missing or cannot be read.
    """
    run = Path(run)
    if not run.is_dir():
        raise ZooError(f"the run folder {run} does not exist")
    if not (run / CONFIG).is_file():
        raise ZooError(f"{run} is not a run folder: it has no {CONFIG}")
    return load(run / CONFIG)


def restore(run: str | Path) -> Restored:
    """Build the model of a run with its best weights.

    Args:
        run: Folder of the run, finished or not.

    Raises:
        ZooError: There is no such run, or it has no checkpoint yet.
    """
    config = read_config(run)
    folder = Path(run) / CHECKPOINTS
    best = keeper_state(folder / LAST, identify(config).config_hash)["best"]
    if not best:
        raise ZooError(f"{run} has no best checkpoint yet: it was never validated")
    data = data_module(config)
    task = build_task(config, data)
    path = best_path(folder, best)
    try:
        task.load_state_dict(read_checkpoint(path)["state_dict"])
    except RuntimeError as error:
        raise ZooError(f"{path} does not fit the model: {' '.join(str(error).split())}") from None
    advance(task, best["step"] / config.trainer.max_steps)
    return Restored(config, data, task.eval(), int(best["step"]))
