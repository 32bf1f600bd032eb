"""One JSON file per training run: what was run, where, and what came out.

A record is the only thing that statistics and the leaderboard read, so it is checked when it is
made and again when it is read: every field has one type, nothing is missing, nothing is unknown.
Files are replaced atomically, so a killed run leaves its record whole or not at all, and any number
of runs may write at once. A reader names and skips a file that is no record; it never removes one.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from zoo.errors import ZooError, unknown
from zoo.report.files import replace_text
from zoo.runs import record_fields as fields

SCHEMA = 1


class RecordWarning(UserWarning):
    """A file among the records is not a record, or is the second one of a run."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """The outcome of one training run, with everything needed to compare and repeat it.

    Args:
        id: Name of the run and, with `.json`, of its file.
        recipe: Name of the recipe.
        track: Table group of the leaderboard.
        group: Hash of everything that two runs must share to be compared.
        config_hash: Hash of the whole resolved configuration.
        attention: Canonical specification of the attention.
        seed: Seed of the run.
        lr: Peak learning rate.
        status: `finished`, `nan` (the loss diverged) or `failed` (an error).
        metric: `select` (chooses on validation), `report` (the test figure), `mode` (`max` or
            `min`) and `solved` (threshold of the report, or null).
        steps: Optimiser steps taken.
        examples: Sequences or images seen.
        conv: Whether the host had its short convolution.
        data: `name` and `fingerprint` of the data.
        versions: Version by program.
        device: `type`, `name` and `threads`.
        created: End of the run, ISO with a zone; kept in UTC.
        config: The resolved configuration.
        metrics: Validation figures of the selected checkpoint and all test figures, by name.
        history: Figures during training, each with its `step`.
        error: What went wrong, in one line; null for a finished run.
        parameters: Number of trained parameters.
        flops: Floating point operations of a forward pass over one sequence or image.
        state_bytes: Decoding state of one sequence at full length in bytes, null without one.
        step_time_cpu: Median processor time of a step in seconds.
        step_time_wall: Median elapsed time of a step in seconds.
        peak_memory_bytes: Highest memory use in bytes.
        commit: Commit of the source, with `-dirty` where it was changed; null outside a checkout.
        schema: Version of this list of fields.

    Raises:
        ZooError: A value is of the wrong kind, or a finished run lacks the figures it is about.
    """

    id: Annotated[str, fields.identifier]
    recipe: Annotated[str, fields.text]
    track: Annotated[str, fields.text]
    group: Annotated[str, fields.text]
    config_hash: Annotated[str, fields.text]
    attention: Annotated[str, fields.text]
    seed: Annotated[int, fields.count]
    lr: Annotated[float, fields.positive]
    status: Annotated[str, fields.one_of("finished", "nan", "failed")]
    metric: Annotated[dict[str, Any], fields.metric]
    steps: Annotated[int, fields.count]
    examples: Annotated[int, fields.count]
    conv: Annotated[bool, fields.flag]
    data: Annotated[dict[str, Any], fields.data]
    versions: Annotated[dict[str, str], fields.mapping(fields.text)]
    device: Annotated[dict[str, Any], fields.device]
    created: Annotated[str, fields.moment]
    config: Annotated[dict[str, Any], fields.tree]
    metrics: Annotated[dict[str, float], fields.mapping(fields.number)] = field(
        default_factory=dict
    )
    history: Annotated[list[dict[str, float]], fields.history] = field(default_factory=list)
    error: Annotated[str | None, fields.optional(fields.text)] = None
    parameters: Annotated[int | None, fields.optional(fields.count)] = None
    flops: Annotated[int | None, fields.optional(fields.count)] = None
    state_bytes: Annotated[int | None, fields.optional(fields.count)] = None
    step_time_cpu: Annotated[float | None, fields.optional(fields.seconds)] = None
    step_time_wall: Annotated[float | None, fields.optional(fields.seconds)] = None
    peak_memory_bytes: Annotated[int | None, fields.optional(fields.count)] = None
    commit: Annotated[str | None, fields.optional(fields.text)] = None
    schema: Annotated[int, fields.one_of(SCHEMA)] = SCHEMA

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(f"record field {name}", getattr(self, name)))
        if self.status == "finished":
            if self.error is not None:
                raise fields.wrong("record field error", self.error, "None for a finished run")
            figures = self.metric["select"], self.metric["report"]
            fields.require("record field metrics", self.metrics, figures)
        elif self.status == "failed" and self.error is None:
            raise fields.wrong("record field error", self.error, "the reason why the run failed")

    def to_json(self) -> str:
        """Return the record as JSON text, the same text for equal records."""
        named = {name: _named(getattr(self, name)) for name in _CHECKS}
        return json.dumps(named, sort_keys=True, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Build a record from JSON text.

        Args:
            text: What `to_json` returned.

        Raises:
            ZooError: The text is not JSON, lacks a field, has an unknown one or a wrong value.
        """
        try:
            loaded = json.loads(text, parse_constant=_refuse)
            if not isinstance(loaded, dict):
                raise ZooError(f"not a record but a JSON {type(loaded).__name__}")
            if "schema" in loaded:  # another version explains every other difference
                fields.one_of(SCHEMA)("record field schema", loaded["schema"])
            if missing := sorted(set(_CHECKS) - set(loaded)):
                raise ZooError(f"a record without {', '.join(map(repr, missing))}")
            if extra := sorted(set(loaded) - set(_CHECKS)):
                raise unknown("record field", extra[0], _CHECKS)
            return cls(**loaded)
        except ZooError:
            raise
        except (ValueError, RecursionError) as error:
            raise ZooError(f"not valid JSON: {error}") from None


_CHECKS: dict[str, fields.Check] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(Record, include_extras=True).items()
}


def _refuse(constant: str) -> None:
    raise ValueError(f"the bare word {constant}")


def _named(value: Any) -> Any:
    """Replace numbers that JSON cannot hold by their names."""
    if isinstance(value, dict):
        return {key: _named(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_named(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write(record: Record, folder: str | Path) -> Path:
    """Write a record to `<folder>/<id>.json`, replacing an older one of the same run.

    Args:
        record: The record.
        folder: Folder of the records; it is created.

    Raises:
        ZooError: The folder cannot be written.
    """
    return replace_text(Path(folder) / f"{record.id}.json", record.to_json())


def read(path: str | Path) -> Record:
    """Read one record.

    Args:
        path: The JSON file, named after the record's id.

    Raises:
        ZooError: The file cannot be read or does not hold the record that its name promises.
    """
    path = Path(path)
    try:
        record = Record.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ZooError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:  # a ZooError, or bytes that are no text
        raise ZooError(f"{path}: {error}") from None
    if record.id != path.stem:
        raise ZooError(f"{path}: the record of {record.id!r} under another name")
    return record


def read_all(
    folder: str | Path, *, recursive: bool = False, without: str | None = None
) -> list[Record]:
    """Read every record of a folder, in an order that does not depend on the file system.

    A file that is no record is named in a `RecordWarning` and skipped, and so is the older of two
    records with the same id in different folders.

    Args:
        folder: Folder of the records.
        recursive: Whether to read the folders inside it too.
        without: Name of a folder directly inside it that is left out.

    Raises:
        ZooError: There is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ZooError(f"the records folder {folder} does not exist")
    found: dict[str, Record] = {}
    for path in sorted(folder.rglob("*.json") if recursive else folder.glob("*.json")):
        if path.relative_to(folder).parts[0] == without:
            continue
        try:
            record = read(path)
        except ZooError as error:
            warnings.warn(f"skipped a file that is not a record: {error}", RecordWarning, 2)
            continue
        if record.id in found and record != found[record.id]:
            warnings.warn(f"two records of {record.id!r} under {folder}", RecordWarning, 2)
        found[record.id] = max(found.get(record.id, record), record, key=lambda r: r.created)
    return sorted(found.values(), key=sort_key)


def sort_key(record: Record) -> tuple[Any, ...]:
    """Return what records are ordered by: table, attention, learning rate, seed."""
    return (
        *(record.track, record.recipe, record.group, record.attention),
        *(record.lr, record.seed, record.created, record.id),
    )
