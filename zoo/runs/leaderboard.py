"""The leaderboard: one Markdown page made from the records alone.

The same set of records gives the same bytes, in whatever order it comes and on whatever day: no
clock, no locale and no list of installed mechanisms has a say. `render` is the page, `write` puts
it in place, and `verify` tells whether a page on disk is still the one that its records give.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.runs import claim_table, stats
from zoo.runs.claims import FOLDER, Published, published
from zoo.runs.markdown import NONE, code, table
from zoo.runs.records import Record, read_all, replace_text
from zoo.runs.standings import DIGITS, FLOOR, SEEDS, arrow, section, spread
from zoo.runs.stats import Row, Table

COMMAND = "zoo leaderboard"

_PROTOCOL = f"""\
# Leaderboard

Made from the run records alone; `{COMMAND}` makes it again, byte for byte.

**Protocol.** Runs share a table only if everything but the attention, the learning rate and the
seed is equal: host, data and their order, optimiser, number of steps. The learning rate is chosen
on validation: the rate with the most usable seeds, then the best mean, then the smaller rate. At
that rate the figures are from the test split: mean ± standard deviation (ddof = 1) and, in
brackets, the number of seeds, of which a comparison needs {SEEDS}; one seed has no deviation. A run
that diverged (nan) or failed has no figure: it shows in the brackets as in "2 of 3", counts as
unsolved, and is listed. "vs softmax" is the mean difference over the shared seeds with its 95 %
Student t interval, each row for itself, and "differs" tells whether that interval excludes zero.
Every table needs softmax attention (`mha`) as its baseline and `{FLOOR}` as its floor. Equal
rounded means share a rank. "lr (tried)" has the rate chosen and the number of rates; "runs"
are those of all rates. Times are medians of one training step; FLOPs and state are those of one
sequence or image, forward.
"""


def render(records: Iterable[Record], claims: Sequence[Published] = ()) -> str:
    """Return the page for a set of records.

    Args:
        records: Records in any order; the same record twice counts once.
        claims: Claims with their verdicts, whose records stand in no other table.
    """
    tables = stats.tables(stats.summarise(records))
    stated = [claim_table.section(claims)] if claims else []
    if not tables:
        return "\n".join([_PROTOCOL, *(stated or ["There are no records yet.\n"])])
    settings = _settings(tables)
    parts = [_PROTOCOL, "## Summary\n", _summary(tables), *stated]
    track = None
    for key, rows in tables.items():
        if key.track != track:
            track = key.track
            parts.append(f"## Track {code(track)}\n")
        parts.append(section(key, rows, settings[key]))
    return "\n".join(parts)


def page(folder: str | Path) -> tuple[str, int]:
    """Render the records of a folder and of the folders in it.

    The records of claims, in the folder `claims` inside it, stand in a section of their own.

    Args:
        folder: Folder of the records.

    Returns:
        The page and the number of records read.

    Raises:
        ZooError: There is no such folder, or a verdict is not what its records give.
    """
    records, claims = read_all(folder, recursive=True, without=FOLDER), published(folder)
    count = sum(len(ids) for one in claims for ids in one.verdict.ids.values())
    return render(records, claims), len(records) + count


def write(folder: str | Path, path: str | Path) -> tuple[Path, int]:
    """Render the records of a folder, and of the folders in it, to a file in one step.

    Args:
        folder: Folder of the records.
        path: The page.

    Returns:
        The path and the number of records read.

    Raises:
        ZooError: There is no such folder, a verdict is not what its records give, or the page
            cannot be written.
    """
    text, count = page(folder)
    return replace_text(path, text), count


def verify(path: str | Path, folder: str | Path) -> str:
    """Compare a page with what its records give, byte for byte.

    Args:
        path: The page.
        folder: Folder of the records.

    Returns:
        What is out of date, in one line; an empty string if nothing is.

    Raises:
        ZooError: There is no such page or folder.
    """
    try:
        found = Path(path).read_bytes()
    except OSError as error:
        raise ZooError(f"cannot read the leaderboard {path}: {error.strerror or error}") from None
    wanted = page(folder)[0].encode()
    if found == wanted:
        return ""
    pairs = zip(found.split(b"\n"), wanted.split(b"\n"), strict=False)
    # Two different texts of which one is the beginning of the other differ after the shorter.
    equal = [old == new for old, new in pairs]
    line = equal.index(False) + 1 if False in equal else len(equal)
    return f"{path} is not what {folder} gives, from line {line} on; run `{COMMAND}`"


def _summary(tables: Mapping[Table, list[Row]]) -> str:
    recipes = Counter(key.recipe for key in tables)
    header = ["attention"]
    cells: dict[str, dict[Table, str]] = defaultdict(dict)
    for key, rows in tables.items():
        group = f" {code(key.group[:DIGITS])}" if recipes[key.recipe] > 1 else ""
        header.append(f"{code(key.recipe)}{group} {arrow(key)}")
        for row in rows:
            cells[row.attention][key] = spread(row.spread, row.attempts)
    order = sorted(cells, key=lambda name: (not stats.is_softmax(name), name))
    return table(
        header, [[code(name), *(cells[name].get(key, NONE) for key in tables)] for name in order]
    )


def _settings(tables: Mapping[Table, list[Row]]) -> dict[Table, dict[str, str]]:
    """Return what tells the tables of one recipe apart: the settings that differ between them."""
    flat: dict[Table, dict[str, set[str]]] = {key: defaultdict(set) for key in tables}
    for key, rows in tables.items():
        for record in (run for row in rows for run in row.runs):
            for name, value in _flatten(record.config):
                flat[key][name].add(json.dumps(value, sort_keys=True))
    differing: dict[Table, dict[str, str]] = {}
    for key, found in flat.items():
        others = [flat[other] for other in tables if other.recipe == key.recipe]
        differing[key] = {
            name: min(values)
            for name, values in sorted(found.items())
            if name not in ("attention", "seed", "optim.lr", "description")
            and not name.startswith("budget.")
            and len(values) == 1
            and any(other.get(name) != values for other in others)
        }
    return differing


def _flatten(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{name}.{key}" if name else key)
    else:
        yield name, value
