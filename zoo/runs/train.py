"""One training run: from a recipe to a record, resumable after a kill at any moment.

    record = run("mqar", ["attention=linear", "seed=1"])
    record = resume("runs/mqar-linear-s1-0123abcd")

A run lives in `<runs>/<id>/`: `config.yaml` (resolved), `log/` (CSV, one version for each time the
run was started or resumed) and `checkpoints/`. Its outcome is `<records>/<id>.json`. A run whose
record says `finished` or `nan` is not repeated: its record is returned. On a CPU a resumed run ends
with the same figures, bit for bit, as one that was never interrupted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from zoo.errors import ZooError
from zoo.runs.build import CHECKPOINTS, read_config
from zoo.runs.callbacks import Diverged
from zoo.runs.checkpoints import LAST
from zoo.runs.config import identify, load
from zoo.runs.records import Record, read
from zoo.runs.training import Training

_DONE = ("finished", "nan")


def run(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    records: str | Path = "runs/records",
    runs: str | Path = "runs",
    resume: bool = False,
    resume_if_possible: bool = False,
    quiet: bool = False,
    progress: bool = True,
) -> Record:
    """Train by a recipe and write the record; a run that has one already returns it.

    Args:
        recipe: Name of a recipe, or path of a YAML file.
        overrides: Changes as ``key=value``.
        records: Folder of the records.
        runs: Folder of the run folders.
        resume: Go on with a run that was interrupted, which must exist.
        resume_if_possible: Go on with it if it exists, else start.
        quiet: Print nothing.
        progress: Show a progress bar, unless quiet.

    Raises:
        ZooError: The recipe, its values or the folders are wrong, or an interrupted run of the
            same configuration is in the way.
    """
    config = load(recipe, overrides)
    folder = Path(runs) / identify(config).id
    last = folder / CHECKPOINTS / LAST
    if done := _done(config, records):
        return done
    if resume and not last.is_file():
        raise ZooError(f"{folder} holds no interrupted run to resume")
    if last.is_file() and not (resume or resume_if_possible):
        raise ZooError(
            f"{folder} holds an interrupted run: go on with --resume {folder}, or remove the "
            "folder to start again"
        )
    return _go(config, folder, records, bar=progress and not quiet)


def resume(
    folder: str | Path,
    *,
    records: str | Path = "runs/records",
    quiet: bool = False,
    progress: bool = True,
) -> Record:
    """Go on with an interrupted run; a finished one returns its record.

    Args:
        folder: Folder of the run.
        records: Folder of the records.
        quiet: Print nothing.
        progress: Show a progress bar, unless quiet.

    Raises:
        ZooError: There is no such run, or its checkpoint is missing, cannot be read or belongs
            to another configuration.
    """
    config = read_config(folder)
    if done := _done(config, records):
        return done
    if not (Path(folder) / CHECKPOINTS / LAST).is_file():
        raise ZooError(f"{folder} has no checkpoint yet; start the run again without --resume")
    return _go(config, Path(folder), records, bar=progress and not quiet)


def fail(
    recipe: str | Path,
    overrides: Sequence[str],
    error: str,
    *,
    records: str | Path = "runs/records",
    runs: str | Path = "runs",
) -> Record:
    """Write the record of a run that was ended before it could write one itself.

    Args:
        recipe: Name of a recipe, or path of a YAML file.
        overrides: Changes as ``key=value``.
        error: What ended it, in one line.
        records: Folder of the records.
        runs: Folder of the run folders.

    Raises:
        ZooError: The recipe, its values or the folders are wrong.
    """
    config = load(recipe, overrides)
    training = Training(config, Path(runs) / identify(config).id)
    training.remember()
    return training.leave(records, "failed", error)


def _done(config: DictConfig, folder: str | Path) -> Record | None:
    """Return the record of a configuration if there is one that needs no repetition."""
    identity = identify(config)
    path = Path(folder) / f"{identity.id}.json"
    if not path.is_file():
        return None
    record = read(path)
    if record.config_hash != identity.config_hash:
        raise ZooError(f"{path} is the record of another configuration; move it away")
    return record if record.status in _DONE else None


def _go(config: DictConfig, folder: Path, records: str | Path, *, bar: bool) -> Record:
    """Train, and write the record whatever comes of it."""
    training = Training(config, folder)
    status, message = "finished", None
    try:
        training.run(bar=bar)
    except Diverged as error:
        status, message = "nan", str(error)
    except Exception as error:
        with contextlib.suppress(ZooError):  # the error itself matters more than its record
            training.leave(records, "failed", " ".join(str(error).split()) or repr(error))
        if isinstance(error, OSError):
            where = error.filename or folder
            raise ZooError(f"{where}: {error.strerror or error}") from error
        raise
    record = training.leave(records, status, message)
    if status == "finished":  # after the record, which no picture can cost
        training.draw()
    return record
