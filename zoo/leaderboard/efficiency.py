"""The track of efficiency: time and memory against length, from the measurements of `zoo bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zoo.bench.pages import tables
from zoo.errors import ZooError

FOLDER = "bench"
"""Name of the folder of measurements, beside that of the records."""

_ABOUT = """\
## Track: Efficiency

What a whole layer costs in time and memory, and how that grows with the length. Each table is one
run of `zoo bench` in one process, in which the contenders took turns. Parameters, FLOPs and the
state of decoding stand in the tables of the other tracks.
"""


def measurements(records: str | Path) -> dict[str, Any]:
    """Read the measurements that are published beside records, by the names of their files.

    Args:
        records: Folder of the records.

    Raises:
        ZooError: A file is no measurement.
    """
    found = {}
    for path in sorted((Path(records).resolve().parent / FOLDER).glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            tables(content)
        except OSError as error:
            raise ZooError(f"{path}: {error.strerror or error}") from None
        except (ValueError, LookupError, TypeError) as error:
            raise ZooError(f"{path} is no measurement of 'zoo bench': {error!r}") from None
        found[path.stem] = content
    return found


def section(found: dict[str, Any]) -> str:
    """Return the section of the leaderboard.

    Args:
        found: Measurements by name.
    """
    parts = [_ABOUT]
    for name, content in found.items():
        parts.append(f"### `{name}`\n\n{tables(content)}\n")
    return "\n".join(parts)
