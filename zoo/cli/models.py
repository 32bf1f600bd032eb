"""Models for the commands that look into one: those of recipes and those of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo import checks
from zoo.errors import ZooError, unknown
from zoo.host.spec import canonical
from zoo.pictures.show import maps, save_figure, visible
from zoo.runs.build import CONFIG, Restored, build_task, restore
from zoo.runs.config import data_module, load
from zoo.runs.training import task_pictures


def run_folder(name: str, runs: Path) -> Path:
    """Folder of a run.

    Args:
        name: Its path, or its id.
        runs: Folder of the runs.

    Raises:
        ZooError: No such run; the nearest id is named.
    """
    for folder in (Path(name), runs / name):
        if folder.is_dir():
            return folder
    known = [path.parent.name for path in runs.glob(f"*/{CONFIG}")]
    raise unknown(f"run in the folder {str(runs)!r}", name, known)


def opened(
    spec: str | None,
    run: str | None,
    recipe: str | None,
    runs: Path,
    seed: int,
    overrides: Sequence[str] = (),
) -> tuple[Restored, str]:
    """Open a recipe's untrained model or a trained run.

    Args:
        spec: Attention of the recipe's model, or None for the recipe's own.
        run: Folder or id of a run, or None.
        recipe: Name or path of a recipe, or None.
        runs: Folder of the runs.
        seed: Of the weights of an untrained model.
        overrides: Changes of a recipe as ``key=value``.

    Returns:
        The model with its data, and a title.

    Raises:
        ZooError: There is no such run or recipe, or it is another than `spec` says.
    """
    if run is not None:
        if overrides:
            raise ZooError(f"--set {overrides[0]}: changes belong to --recipe")
        found = restore(run_folder(run, runs))
        held = found.config.attention
        if spec is not None and canonical(spec) != held:
            raise ZooError(f"the run {run!r} has attention {held!r}, not {spec!r}")
        state = f"after {found.step} steps"
    else:
        asked = [] if spec is None else [f"attention={spec}"]
        config = load(str(recipe), [*asked, *overrides])
        data = data_module(config)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            found = Restored(config, data, build_task(config, data), 0)
        held, state = config.attention, "untrained"
    return found, f"{held} on {found.config.name}, {state}"


def attention_maps(
    found: Restored, length: int | None
) -> tuple[dict[str, Tensor], list[str] | None]:
    """Maps of a model on its first validation example.

    Args:
        found: The model with its data.
        length: Longest piece of the example, or None for all of it.

    Returns:
        The maps, and the tokens as text (None where there is no text).
    """
    tokens, inputs = _example(found.data, length)
    return maps(found.task.model, inputs), tokens


def saved_pictures(found: Restored, output: Path) -> list[Path]:
    """Save what the task draws of its first validation batch.

    Args:
        found: The model with its data.
        output: The file; with several pictures, each has its name before the ending.

    Returns:
        The files, none of a task that draws nothing for this model.
    """
    figures = task_pictures(found.task, found.data)
    if len(figures) == 1:
        return [save_figure(figure, output) for figure in figures.values()]
    return [
        save_figure(figure, output.with_stem(f"{output.stem}-{name}"))
        for name, figure in figures.items()
    ]


def _example(data: Any, length: int | None) -> tuple[list[str] | None, Tensor]:
    checks.optional(checks.whole)("length", length)
    data.setup()
    batch = next(iter(data.val_dataloader()))
    if "image" in batch:
        if length is not None:
            raise ZooError("--length cuts sequences; an image is shown whole")
        return None, batch["image"][:1]
    tokens = batch["tokens"][:1, :length]
    if data.task == "language":
        return [visible(data.decode([token])) for token in tokens[0].tolist()], tokens
    return [str(token) for token in tokens[0].tolist()], tokens


def continuation(
    run: Path,
    prompt: str,
    steps: int,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> str:
    """Text that a trained language model writes after a prompt.

    Args:
        run: Folder of the run.
        prompt: Beginning of the text, at least one token.
        steps: Tokens to add.
        temperature: Of the softmax; 0 takes the likeliest token.
        top_k: Sample among this many likeliest tokens, or None.
        top_p: Sample among the likeliest tokens of together this probability, or None.
        seed: Of the sampling.

    Raises:
        ZooError: The run is no language model, has no checkpoint, or an argument is out of range.
    """
    found = restore(run)
    if found.config.task != "language":
        raise ZooError(
            f"the run {run.name!r} was trained for {found.config.task}; only language models "
            "write text"
        )
    if not prompt:
        raise ZooError("the prompt is empty; give at least one character")
    data: Any = found.data
    tokens = torch.tensor([data.encode(prompt)])
    model: Any = found.task.model
    generator = torch.Generator().manual_seed(seed)
    try:
        written = model.generate(
            tokens, steps, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
        )
    except ZooError as error:
        sizes = f"the prompt has {tokens.shape[1]} tokens, {steps} more were asked for"
        raise ZooError(f"{error} ({sizes})") from None
    return data.decode(written[0].tolist())
