"""Whether records, verdicts and the leaderboard are whole, current, and agree with one another."""

from __future__ import annotations

import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from zoo.claims import verdicts
from zoo.claims.trials import FOLDER, is_stale
from zoo.doctor.lines import Line, note, ok, problem, reason
from zoo.errors import ZooError
from zoo.leaderboard.current import group_now
from zoo.leaderboard.page import markdown_page as leaderboard
from zoo.runs.records import SCHEMA, Record, RecordWarning, read
from zoo.statistics import spread as stats

SHOWN = 5
"""Files of one fault that are named one by one."""


def records(folder: Path, *, strict: bool) -> Iterator[Line]:
    """Say which records cannot be read, stand twice, or are not of what their recipe says now.

    Args:
        folder: Folder of the records.
        strict: Whether they are published, so that a record out of date is a problem.
    """
    if not folder.is_dir():
        yield _absent(folder, strict)
        return
    found: dict[str, list[tuple[Path, Record]]] = defaultdict(list)
    broken: list[Line] = []
    other: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.rglob("*.json")):
        try:
            record = read(path)
        except ZooError as error:
            if (schema := _schema(path)) is not None:
                other[schema].append(path)
                continue
            todo = f"restore or remove it: {path}"
            broken.append(problem(path.name, f"not a record: {reason(error)}", todo))
            continue
        found[record.id].append((path, record))
    known = [max((r for _, r in same), key=lambda r: r.created) for same in found.values()]
    if known:
        yield ok("records", f"{len(known)} records in {folder}", count=len(known))
    else:
        yield note("records", f"there is no record in {folder}", "zoo sweep makes some", count=0)
    yield from _some(broken, "files that are no record")
    for schema, paths in sorted(other.items()):
        yield problem(
            f"schema {schema}",
            f"{_first(paths)} of schema {schema}, which this version (schema {SCHEMA}) cannot "
            "read: left alone, and in no table",
            "run them again, or keep them elsewhere",
            files=[str(path) for path in paths],
        )
    for name, same in sorted(found.items()):
        if len(same) > 1:
            equal = all(record == same[0][1] for _, record in same)
            text = f"{name} is there {len(same)} times: {', '.join(str(path) for path, _ in same)}"
            if equal:
                yield note(name, f"{text}; all are equal")
            else:
                yield problem(name, f"{text}; only the latest counts", "remove the others")
    outside = [r for r in known if not _of_a_claim(found[r.id], folder)]
    yield from _repeats(outside)
    yield from _stale(outside, strict)


def _absent(folder: Path, strict: bool) -> Line:
    text = f"there is no folder of records {folder}"
    if strict:
        todo = "call it from the root of the repository, or give --records FOLDER"
        return note("records", text, todo)
    return problem("records", text, "correct --records, or make records with zoo sweep")


def _schema(path: Path) -> str | None:
    """Return the version that a file names, if it is a JSON object of another version."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(loaded, dict) or loaded.get("schema", SCHEMA) == SCHEMA:
        return None
    return str(loaded["schema"])


def _of_a_claim(same: Iterable[tuple[Path, Record]], folder: Path) -> bool:
    """Whether a record stands among those of claims, whose verdicts say if they are current."""
    return all(path.relative_to(folder).parts[0] == FOLDER for path, _ in same)


def _some(lines: list[Line], what: str) -> Iterator[Line]:
    yield from lines[:SHOWN]
    if (rest := len(lines) - SHOWN) > 0:
        yield problem(what, f"{rest} more {what}", "see to the first ones")


def _first(paths: list[Path]) -> str:
    return paths[0].name if len(paths) == 1 else f"{len(paths)} files, first {paths[0].name},"


def _repeats(found: list[Record]) -> Iterator[Line]:
    rows = stats.summarise(found)
    if repeats := sum(row.repeats for row in rows):
        names = sorted({row.attention for row in rows if row.repeats})
        yield note(
            "repeats",
            f"{repeats} older runs of a rate and seed that was run again: {', '.join(names)}",
            "remove them if they are of no use; tables leave them out",
        )


def _stale(found: list[Record], strict: bool) -> Iterator[Line]:
    """Say which records are not of what their recipe makes now."""
    groups = Counter((record.recipe, record.group) for record in found)
    current = 0
    for recipe in sorted({recipe for recipe, _ in groups}):
        try:
            now = group_now(recipe)
        except ZooError:
            continue  # said among the recipes
        counted = {group: n for (name, group), n in groups.items() if name == recipe}
        if now is None:
            n = sum(counted.values())
            yield note(recipe, f"{n} records of {recipe!r}, a recipe that does not ship", count=n)
            continue
        current += counted.get(now, 0)
        if old := sum(n for group, n in counted.items() if group != now):
            text = (
                f"{old} of {sum(counted.values())} records of {recipe!r} are not of what the "
                "recipe says now: it was changed since, or they were made with overrides"
            )
            todo = f"run them again: zoo sweep leaderboard recipe={recipe}; remove the old ones"
            line = problem(recipe, text, todo, count=old)
            yield line if strict else note(recipe, text, count=old)
    if current:
        yield ok("recipes", f"{current} records are of what their recipes say now", count=current)


def claims(folder: Path, *, strict: bool) -> Iterator[Line]:
    """Say which verdicts do not follow from their records, or judge a claim that was changed.

    Args:
        folder: Folder of the records.
        strict: Whether they are published, so that every claim that ships should have one.
    """
    from zoo.claims.trials import names

    counted: Counter[str] = Counter()
    judged, lines = set(), []
    for path in sorted(p for p in (folder / FOLDER).glob("*") if p.is_dir()):
        again = f"zoo claims {path.name} --records {folder / FOLDER}"
        # A verdict that cannot be read is in the way of a new one.
        todo = f"remove {path / verdicts.FILE}; {again} --verdict-only"
        try:
            stated = verdicts.stated(path)
            todo = f"{again} --verdict-only"
            if stated is None:
                text = f"{path.name} has records and no verdict"
                lines.append(problem(path.name, text, todo))
                continue
            judged.add(stated.name)
            if is_stale(stated.name, stated.claim):
                text = f"{path.name} was changed after its verdict, {stated.outcome!r}"
                todo = f"remove {path / verdicts.FILE}; {again}"
                lines.append(problem(path.name, text, todo))
                continue
            counted[verdicts.read(path).outcome] += 1
        except verdicts.Incomplete as error:
            lines.append(problem(path.name, reason(error), again))
        except Exception as error:  # whatever a file by hand or by accident may hold
            lines.append(problem(path.name, reason(error), todo))
    total = ", ".join(f"{counted[outcome]} {outcome}" for outcome in sorted(counted))
    if counted:
        yield ok("claims", f"{counted.total()} verdicts follow from their records: {total}")
    yield from lines
    if strict and folder.is_dir():
        for name in sorted(set(names()) - judged - {line.name for line in lines}):
            yield note(name, f"{name} has no verdict yet", f"zoo claims {name} --jobs 2")
    if not counted and not lines:
        yield note("claims", f"there are no verdicts in {folder / FOLDER}")


def page(path: Path, folder: Path, *, strict: bool) -> Iterator[Line]:
    """Say whether a leaderboard is what its records give.

    Args:
        path: The page.
        folder: Folder of the records.
        strict: Whether they are those of the repository, which may not be here.
    """
    if strict and not path.exists() and not folder.is_dir():
        yield note("leaderboard", f"there is no {path} here", "call it from the repository's root")
        return
    again = f"zoo leaderboard --records {folder} --output {path}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RecordWarning)  # said among the records
            wrong = leaderboard.verify(path, folder)
    except ZooError as error:
        yield problem("leaderboard", reason(error), f"see to that first; then {again}")
        return
    if wrong:
        yield problem("leaderboard", wrong.partition("; run")[0], again)
    else:
        yield ok("leaderboard", f"{path} is what {folder} gives, byte for byte")
