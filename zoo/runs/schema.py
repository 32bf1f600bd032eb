"""What a recipe may say: its keys, their types and the values they may take."""

from __future__ import annotations

import copy
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from typing import Any

import torch
from omegaconf import MISSING, DictConfig, OmegaConf

from zoo import checks, datasets, models
from zoo.errors import ZooError, unknown
from zoo.tasks import Optim
from zoo.tasks import find as find_task

ACCELERATORS = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")
MODES = ("max", "min")
_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")
# Those under which a run gives the record that one process would give.
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")
# What the recipe says elsewhere.
_NOT_OPTIONS = ("name", "attention", "max_len", "device", "dtype")


@dataclass
class Trainer:
    """How long to train, and on what.

    Args:
        max_steps: Optimiser steps.
        eval_every: Steps between two validations; the last step is always followed by one.
        checkpoint_every: Steps between two checkpoints beside those of the validations.
        stop_at: Stop once the selecting metric is this good.
        max_minutes: Stop after so many minutes of training.
        accelerator: cpu, cuda, mps, or auto for the best there is.
        devices: Number of devices (or processes on a CPU).
        strategy: Lightning's strategy for several devices: ddp or a form of it; auto is ddp.
        precision: Lightning's precision, such as 32-true or bf16-mixed.
    """

    max_steps: int = MISSING
    eval_every: int = MISSING
    checkpoint_every: int | None = None
    stop_at: float | None = None
    max_minutes: float | None = None
    accelerator: str = "cpu"
    devices: int = 1
    strategy: str = "auto"
    precision: str = "32-true"


@dataclass
class Metrics:
    """What counts.

    Args:
        select: Validation figure that chooses the checkpoint and the learning rate.
        report: Test figure of the leaderboard.
        mode: Whether the best is the max or the min.
        solved: Threshold of the reported figure from which a run counts as solved.
    """

    select: str = MISSING
    report: str = MISSING
    mode: str = "max"
    solved: float | None = None


@dataclass
class Budget:
    """The same tuning effort for every mechanism of a table.

    Args:
        lrs: Learning rates to try.
        seeds: Number of seeds.
        needs: gpu if a run takes hours without one; a sweep over the leaderboard then leaves the
            recipe out where there is none.
    """

    lrs: list[float] = MISSING
    seeds: int = 3
    needs: str = ""


@dataclass
class Recipe:
    """What to train: one YAML file, perhaps with a `Claim` in a section of its own.

    Args:
        name: Name of the recipe and, with .yaml, of its file.
        track: Group of tables of the leaderboard.
        task: Name of the task, the same as the data's.
        attention: Specification of the attention.
        seed: Seed of the weights and of the order of the data.
        data: `name` of the data set and its options.
        model: `name` of the model and its options.
        optim: How the weights are updated.
        trainer: How long to train, and on what.
        metrics: What counts.
        budget: Learning rates and seeds of a fair comparison.
        description: What it is about, in one line.
    """

    name: str = MISSING
    track: str = MISSING
    task: str = MISSING
    attention: str = "mha"
    seed: int = 0
    data: dict[str, Any] = MISSING
    model: dict[str, Any] = MISSING
    optim: Optim = MISSING
    trainer: Trainer = field(default_factory=Trainer)
    metrics: Metrics = field(default_factory=Metrics)
    budget: Budget = field(default_factory=Budget)
    description: str = ""


def data_defaults(name: str) -> dict[str, Any]:
    """Options of a data set with their defaults; one that must be given is "???".

    Args:
        name: Registered name.

    Raises:
        ZooError: Unknown name.
    """
    info = datasets.info(name)
    options = {**dict.fromkeys(info.required, MISSING), **info.options}
    return {
        key: list(value) if isinstance(value, tuple) else value  # as a file gives it back
        for key, value in options.items()
        if key not in ("seed", "name")
    }


def model_options(name: str) -> DictConfig:
    """Options of a model with their types and defaults.

    Args:
        name: Registered name.

    Raises:
        ZooError: Unknown name.
    """
    known = models.info(name)
    return copy.deepcopy(_options_of(name, known.make, known.facts))


def blank() -> DictConfig:
    """A recipe without content, with the types of its keys."""
    return copy.deepcopy(_blank())


# OmegaConf takes long to look at a class, and less to copy what it has found.
@functools.cache
def _blank() -> DictConfig:
    return OmegaConf.structured(Recipe)


@functools.cache
def _options_of(name: str, make: Callable[..., Any], facts: tuple[str, ...]) -> DictConfig:
    hidden = (*facts, *_NOT_OPTIONS)
    target = make.__init__ if inspect.isclass(make) else make
    hints = typing.get_type_hints(target)
    fields: list[Any] = [("name", str, name)]
    for key, parameter in inspect.signature(make).parameters.items():
        if key == "max_len":
            fields.append((key, int | None, None))
        elif key not in hidden:
            default = MISSING if parameter.default is parameter.empty else parameter.default
            fields.append((key, _plain(hints.get(key, Any)), default))
    return OmegaConf.structured(make_dataclass(f"{name}_options", fields))


def _plain(hint: Any) -> Any:
    """Return a type that OmegaConf can check, `Any` where it cannot."""
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    simple = [member for member in members if member is not types.NoneType]
    if len(simple) == 1 and simple[0] in (int, float, bool, str):
        return hint
    return Any


def check(config: DictConfig, tests: list[str], task: str) -> None:
    """Check the values that types alone leave open.

    Args:
        config: The resolved recipe.
        tests: Names of the data's test sets.
        task: The data's task.

    Raises:
        ZooError: A value is out of range.
    """
    for key in ("name", "track"):
        if not _NAME.fullmatch(config[key]):
            raise checks.wrong(key, config[key], "snake_case, such as 'selective_copy'")
    if config.seed >= 2**32:
        raise checks.wrong("seed", config.seed, "below 2**32")
    if config.task != task:
        raise ZooError(
            f"task={config.task!r} does not fit the data set {config.data.name!r}, "
            f"whose task is {task!r}"
        )
    trainer = config.trainer
    for key in ("max_steps", "eval_every", "checkpoint_every", "devices"):
        checks.optional(checks.whole)(f"trainer.{key}", trainer[key])
    checks.optional(checks.number)("trainer.max_minutes", trainer.max_minutes, above=0)
    for key, allowed in (("accelerator", ACCELERATORS), ("precision", PRECISIONS)):
        checks.choice(f"trainer.{key}", trainer[key], allowed)
    _check_strategy(trainer.strategy)
    if (batch := config.data.batch_size) % trainer.devices:
        raise ZooError(
            f"data.batch_size={batch} cannot be shared by trainer.devices={trainer.devices}; "
            f"allowed: multiples of {trainer.devices}"
        )
    _check_metrics(config.metrics, metric_names(task, tests))
    checks.whole("budget.seeds", config.budget.seeds)
    if config.budget.needs not in ("", "gpu"):
        raise unknown("budget.needs", config.budget.needs, ("gpu",))
    checks.each(checks.number, distinct=False)("budget.lrs", config.budget.lrs, above=0)


def _check_strategy(name: str) -> None:
    from lightning.pytorch.strategies import StrategyRegistry

    if name in STRATEGIES:
        return
    if name not in StrategyRegistry.available_strategies():
        raise unknown("trainer.strategy", name, STRATEGIES)
    why = "needs its own code for clipping, checkpoints and costs, which the zoo has not"
    if any(word in name for word in ("spawn", "fork", "notebook")):
        why = "trains in processes whose outcome never comes back"
    allowed = ", ".join(STRATEGIES)
    raise ZooError(f"trainer.strategy={name!r} {why}; allowed: {allowed}")


def metric_names(task: str, tests: list[str]) -> list[str]:
    """Names of the metrics that the record of a finished run holds.

    Args:
        task: Name of the task.
        tests: Names of the data's test sets.
    """
    splits = ["val", *(test if test == "test" else f"test_{test}" for test in tests)]
    return [f"{split}/{name}" for split in splits for name in find_task(task).names]


def _check_metrics(metrics: DictConfig, names: list[str]) -> None:
    choices = {
        "select": [name for name in names if name.startswith("val/")],
        "report": [name for name in names if not name.startswith("val/")],
        "mode": list(MODES),
    }
    for key, allowed in choices.items():
        if metrics[key] not in allowed:
            raise unknown(f"metrics.{key}", metrics[key], allowed)


def accelerator(name: str) -> str:
    """Return the accelerator to train on.

    Args:
        name: cpu, cuda, mps, or auto for the best there is.

    Raises:
        ZooError: This machine has no such device.
    """
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        return next(kind for kind in ("cuda", "mps", "cpu") if present[kind])
    if not present[name]:
        found = ", ".join(kind for kind in present if present[kind])
        raise ZooError(f"trainer.accelerator={name!r}: this machine has none; it has {found}")
    return name
