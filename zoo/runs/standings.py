"""One table of the leaderboard: what it reports, who stands where, and what to know about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from zoo.runs import stats
from zoo.runs.markdown import NONE, code, figures, milliseconds, quantity, size, table
from zoo.runs.stats import Row, Spread, Table

SEEDS = 3
FLOOR = "no_mixing"  # what the host reaches when no position learns of another
DIGITS = 12  # of a hash; more tell a reader nothing


def section(key: Table, rows: list[Row], settings: Mapping[str, str]) -> str:
    """Return the heading, the table and the notes of one table.

    Args:
        key: What the runs of the table share.
        rows: Its rows, in any order.
        settings: What tells it from the other tables of its recipe, by name.
    """
    return "\n".join([_introduction(key, rows, settings), _standings(key, rows), _notes(rows)])


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


def arrow(key: Table) -> str:
    """Return an arrow towards better figures."""
    return "↑" if key.mode == "max" else "↓"


def _introduction(key: Table, rows: list[Row], settings: Mapping[str, str]) -> str:
    better = "higher" if key.mode == "max" else "lower"
    text = f"{code(key.report)}, {better} is better; chosen by {code(key.select)}"
    if key.solved is not None:
        text += f"; solved at {'≥' if key.mode == 'max' else '≤'} {key.solved:g}"
    runs = [run for row in rows for run in row.records]
    if runs:
        text += f"; {_distinct(str(run.steps) for run in runs)} steps"
        text += f", {_distinct(str(run.examples) for run in runs)} examples"
    text += ".\n"
    if settings:
        listed = ", ".join(code(f"{name}={value}") for name, value in settings.items())
        text += f"\nUnlike other groups of this recipe: {listed}.\n"
    return f"### {code(key.recipe)}, group {code(key.group[:DIGITS])}\n\n{text}"


def _standings(key: Table, rows: list[Row]) -> str:
    softmax = stats.baseline(rows)
    extra = sorted({name for row in rows for name in row.extra})
    header = ["rank", "attention", f"{code(key.report)} {arrow(key)}"]
    header += ["solved"] * (key.solved is not None)
    header += ["vs softmax", "differs", *map(code, extra), "lr (tried)", "parameters", "FLOPs"]
    header += ["state", "step CPU / wall, ms", "peak memory", "conv", "runs", "failures"]
    lines = []
    for rank, row in _ranked(key, rows):
        cells = [rank, code(row.attention), spread(row.spread, row.attempts)]
        if row.solved is not None:
            cells.append(f"{row.solved}/{row.attempts}")
        cells += _difference(row, softmax)
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
            _failures(row),
        ]
        lines.append(cells)
    return table(header, lines, left=2)


def _ranked(key: Table, rows: list[Row]) -> list[tuple[str, Row]]:
    """Order rows by the rounded mean, give equal ones one rank, and put those without one last."""
    sign = -1 if key.mode == "max" else 1
    means = {id(row): row.spread and figures(row.spread.mean)[0] for row in rows}
    ranked = sorted(
        rows,
        key=lambda row: (
            means[id(row)] is None,
            sign * float(means[id(row)] or 0),
            row.attention,
        ),
    )
    order = [means[id(row)] for row in ranked]
    return [
        (NONE if mean is None else str(order.index(mean) + 1), row)
        for mean, row in zip(order, ranked, strict=True)
    ]


def _difference(row: Row, softmax: Row | None) -> list[str]:
    if softmax is None:
        return [NONE, NONE]
    if row is softmax:
        return ["baseline", NONE]
    found = stats.paired(row.values, softmax.values)
    if found is None:
        return ["no shared seed", NONE]
    if found.low is None or found.high is None:
        return [f"{figures(found.mean, sign=True)[0]} ({found.n})", "one seed"]
    mean, low, high = figures(found.mean, found.low, found.high, sign=True)
    return [f"{mean} [{low}, {high}] ({found.n})", "yes" if found.excludes_zero else "no"]


def _failures(row: Row) -> str:
    counted = sorted(Counter((status, lr) for lr, _, status in row.failures).items())
    return ", ".join(f"{n} {status} at lr {lr:g}" for (status, lr), n in counted) or NONE


def _distinct(texts: Iterable[str]) -> str:
    return ", ".join(sorted(set(texts)))


def _notes(rows: list[Row]) -> str:
    """Return what a reader has to know before believing the table, and where it was made."""
    notes = []
    softmax = stats.baseline(rows)
    if softmax is None or not softmax.values:
        notes.append("**No softmax baseline**: this table has no run of `mha` with a figure.")
    if not any(row.attention == FLOOR and row.values for row in rows):
        notes.append(f"**No floor**: this table has no run of {code(FLOOR)} with a figure.")
    if few := [row.attention for row in rows if len(row.values) < SEEDS]:
        notes.append(f"**Fewer than {SEEDS} seeds** with a figure: {_distinct(map(code, few))}.")
    if len({row.lrs for row in rows}) > 1:
        tried = _distinct(f"[{', '.join(f'{lr:g}' for lr in row.lrs)}]" for row in rows)
        notes.append(
            f"**Unequal tuning**: learning rates tried are not the same in each row ({tried})."
        )
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


def _short(commit: str | None) -> str:
    """Return a commit by its first digits; a mark of unsaved changes stays."""
    if commit is None:
        return "unknown"
    digits, dash, mark = commit.partition("-")
    return f"{digits[:DIGITS]}{dash}{mark}"
