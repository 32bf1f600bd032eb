"""One table of the leaderboard: what it reports, who stands where, and what to know about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from zoo.leaderboard.board import SEEDS, Standing, TableBoard
from zoo.leaderboard.tracks import Track
from zoo.report.markdown import NONE, code, figures, milliseconds, quantity, size, table, words
from zoo.statistics import spread as stats
from zoo.statistics.spread import Row, Spread, Table

DIGITS = 12  # of a hash; more tell a reader nothing
_REPEATED = ("loss", "perplexity")  # what says the same as the reported figure in other units


def section(board: TableBoard, track: Track) -> str:
    """Return the heading, the table and the notes of one table.

    Args:
        board: The table.
        track: Its track.
    """
    title = f"### {code(board.key.recipe)}, group {code(board.key.group[:DIGITS])}\n"
    return "\n".join([title, about(board), _standings(board, track), remarks(board, track)])


def spread(found: Spread | None, attempts: int) -> str:
    """Write mean, deviation and number of seeds.

    Args:
        found: The figures; None if no seed gave one.
        attempts: Number of seeds tried.
    """
    if found is None:
        return f"no figure (0 of {attempts})"
    seeds = str(found.n) if found.n == attempts else f"{found.n} of {attempts}"
    if found.std is None:
        return f"{figures(found.mean)[0]} ({seeds})"
    mean, std = figures(found.mean, found.std)
    return f"{mean} ± {std} ({seeds})"


def place(found: Spread) -> str:
    """Write a mean place, its deviation and the number of places.

    Args:
        found: The places.
    """
    deviation = "" if found.std is None else f" ± {found.std:.1f}"
    return f"{found.mean:.1f}{deviation} ({found.n})"


def arrow(key: Table) -> str:
    """Return an arrow towards better figures."""
    return "↑" if key.mode == "max" else "↓"


def about(board: TableBoard) -> str:
    """Return what a table reports and what its runs had in common.

    Args:
        board: The table.
    """
    key = board.key
    better = "higher" if key.mode == "max" else "lower"
    text = f"{code(key.report)}, {better} is better; chosen by {code(key.select)}"
    if key.solved is not None:
        text += f"; solved at {'≥' if key.mode == 'max' else '≤'} {key.solved:g}"
    runs = [run for row in board.rows for run in row.records]
    if runs:
        text += f"; {_distinct(str(run.steps) for run in runs)} steps"
        text += f", {_distinct(str(run.examples) for run in runs)} examples"
    text += f"; learning rates {', '.join(f'{rate:g}' for rate in board.rates)}.\n"
    listed = ", ".join(code(f"{name}={value}") for name, value in board.settings.items())
    if board.stale:
        text += (
            "\n**Stale**: not the recipe as it is now, which was changed since, or by these runs: "
        )
        text += f"{listed or 'another'}.\n"
    elif listed:
        text += f"\nUnlike other groups of this recipe: {listed}.\n"
    return text


def _standings(board: TableBoard, track: Track) -> str:
    key = board.key
    extra = extra_figures(board)
    marks = any(one.faults for one in board.standings)
    header = ["rank", "attention", f"{code(key.report)} {arrow(key)}"]
    header += ["solved"] * (key.solved is not None)
    header += [f"vs {_name(track)}", "outcome", *map(code, extra), "lr (tried)", "parameters"]
    header += ["FLOPs", "state", "step CPU / wall, ms", "peak memory", "conv", "runs", "failures"]
    header += ["no place because of"] * marks
    lines = []
    for one in board.standings:
        row = one.row
        rank = NONE if one.rank is None else str(one.rank)
        cells = [rank, _row_name(row, track), spread(row.spread, row.attempts)]
        if row.solved is not None:
            cells.append(f"{row.solved}/{row.attempts}")
        cells += _difference(one, board.baseline)
        cells += [spread(row.extra.get(name), row.attempts) for name in extra]
        cells += [
            f"{NONE if row.lr is None else f'{row.lr:g}'} ({len(row.lrs)})",
            quantity(row.median("parameters")),
            quantity(row.median("flops")),
            size(row.median("state_bytes")),
            " / ".join(milliseconds(row.median(f"step_time_{kind}")) for kind in ("cpu", "wall")),
            size(row.median("peak_memory_bytes")),
            _distinct("on" if run.conv else "off" for run in row.runs),
            str(len(row.runs)),
            failures(row),
        ]
        cells += ["; ".join(one.faults) or NONE] * marks
        lines.append(cells)
    return table(header, lines, left=2)


def extra_figures(board: TableBoard) -> list[str]:
    """Return the further figures of a table that say more than the reported one in other units.

    Those that are the same in every row say nothing of the rows, and stand in a remark.

    Args:
        board: The table.
    """
    return [name for name in _further(board) if _constant(board, name) is None]


def _further(board: TableBoard) -> list[str]:
    names = sorted({name for row in board.rows for name in row.extra})
    return [name for name in names if name.rpartition("/")[2] not in _REPEATED]


def _constant(board: TableBoard, name: str) -> float | None:
    """Return what a figure is at every seed of every row, if it is one number."""
    if len(board.rows) < 2:
        return None
    values = [row.extra.get(name) for row in board.rows]
    means = {None if one is None or one.std != 0 else one.mean for one in values}
    return means.pop() if len(means) == 1 else None


def _name(track: Track) -> str:
    return "softmax" if stats.is_softmax(track.baseline) else code(track.baseline)


def _row_name(row: Row, track: Track) -> str:
    """Return a specification, with its part in the track if it has one."""
    parts = {track.baseline: "baseline", **dict.fromkeys(track.floors, "floor")}
    if track.ceiling is not None:
        parts[track.ceiling] = "recurrent"
    part = parts.get(row.attention)
    return code(row.attention) + (f" ({part})" if part in ("floor", "recurrent") else "")


def _difference(one: Standing, baseline: Row | None) -> list[str]:
    if baseline is None:
        return [NONE, NONE]
    if one.row is baseline:
        return ["baseline", NONE]
    found = one.difference
    if found is None:
        return ["no shared seed", NONE]
    if found.low is None or found.high is None:
        return [f"{figures(found.mean, sign=True)[0]} ({found.n})", "one seed"]
    mean, low, high = figures(found.mean, found.low, found.high, sign=True)
    return [f"{mean} [{low}, {high}] ({found.n})", one.outcome or NONE]


def failures(row: Row) -> str:
    """Return what became of the runs without a figure, at any rate.

    Args:
        row: The row.
    """
    counted = sorted(Counter((status, lr) for lr, _, status in row.failures).items())
    return ", ".join(f"{n} {status} at lr {lr:g}" for (status, lr), n in counted) or NONE


def _distinct(texts: Iterable[str]) -> str:
    return ", ".join(sorted(set(texts)))


def remarks(board: TableBoard, track: Track) -> str:
    """Return what a reader has to know before believing the table, and where it was made.

    Args:
        board: The table.
        track: Its track.
    """
    notes = []
    rows = board.rows
    if board.baseline is None or not board.baseline.values:
        notes.append(
            f"**No {_name(track)} baseline**: this table has no run of {code(track.baseline)} "
            "with a figure."
        )
    held = {row.attention for row in rows if row.values}
    ceilings = () if track.ceiling is None else (track.ceiling,)
    for part, wanted in (("floor", track.floors), ("recurrent layer", ceilings)):
        gone = [name for name in wanted if name not in held and not _absent(board, name)]
        if gone:
            shown = _distinct(map(code, gone))
            notes.append(f"**No {part}**: this table has no run of {shown} with a figure.")
    if few := [row.attention for row in rows if len(row.values) < SEEDS]:
        notes.append(f"**Fewer than {SEEDS} seeds** with a figure: {_distinct(map(code, few))}.")
    if len({row.lrs for row in rows}) > 1:
        tried = _distinct(f"[{', '.join(f'{lr:g}' for lr in row.lrs)}]" for row in rows)
        notes.append(
            f"**Unequal tuning**: learning rates tried are not the same in each row ({tried})."
        )
    notes += _edges(board)
    same = {name: _constant(board, name) for name in _further(board)}
    if fixed := [f"{code(k)} {figures(v)[0]}" for k, v in same.items() if v is not None]:
        notes.append(f"The same in every row: {', '.join(fixed)}.")
    if board.missing:
        notes.append(f"Not run yet: {', '.join(map(code, board.missing))}.")
    for reason in sorted({str(one.reason) for one in board.absent}):
        names = ", ".join(code(one.name) for one in board.absent if one.reason == reason)
        notes.append(f"Not in this table: {names} ({words(reason)}).")
    runs = [run for row in rows for run in row.runs]
    devices = {
        f"{code(r.device['name'])} ({r.device['type']}, threads {r.device['threads']})"
        for r in runs
    }
    if len(devices) > 1:
        notes.append("**Several devices**: times and memory do not compare across them.")
    data = {code(f"{r.data['name']} {(r.data['fingerprint'] or 'unknown')[:DIGITS]}") for r in runs}
    if len(data) > 1:
        notes.append("**Several data**: the runs of this table did not all see the same data.")
    if repeats := sum(row.repeats for row in rows):
        notes.append(
            f"{repeats} older runs of a learning rate and seed that was run again are left out."
        )
    programs = sorted({name for run in runs for name in run.versions})
    versions = (f"{n} {_distinct(r.versions.get(n, 'unknown') for r in runs)}" for n in programs)
    notes += [
        f"Data: {_distinct(data)}.",
        f"Devices: {'; '.join(sorted(devices))}.",
        f"Versions: {'; '.join(versions)}.",
        f"Commits: {_distinct(code(_short(run.commit)) for run in runs)}.",
    ]
    return "".join(f"- {note}\n" for note in notes)


def _edges(board: TableBoard) -> list[str]:
    """Say which rows do best at an end of the grid, so that a rate beyond might serve them more."""
    if len(board.rates) < 3:  # of two rates each is an end
        return []
    notes = []
    for kind, end in (("largest", max(board.rates)), ("smallest", min(board.rates))):
        if names := [row.attention for row in board.rows if row.lr == end]:
            shown = ", ".join(map(code, sorted(names)))
            notes.append(
                f"At the end of the grid: {len(names)} of {len(board.rows)} rows chose the {kind} "
                f"rate, {end:g}, and might have done better beyond it ({shown})."
            )
    return notes


def _absent(board: TableBoard, name: str) -> bool:
    return any(one.spec == name for one in board.absent)


def _short(commit: str | None) -> str:
    """Return a commit by its first digits; a mark of unsaved changes stays."""
    if commit is None:
        return "unknown"
    digits, dash, mark = commit.partition("-")
    return f"{digits[:DIGITS]}{dash}{mark}"
