"""`zoo compare`: two specifications side by side over all records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from zoo.cli.output import console, print_json, table

if TYPE_CHECKING:
    from zoo.leaderboard.comparison import Comparison, Pairing
    from zoo.statistics.spread import Row, Table


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="Specification, e.g. cog+rope.")],
    second: Annotated[str, typer.Argument(metavar="B", help="What it is compared with.")],
    records: Annotated[
        Path, typer.Option(help="Folder of the records; folders in it count too.")
    ] = Path("data/runs"),
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two specifications in every table of records in which both stand."""
    from zoo.leaderboard import comparison

    made = comparison.read(records)
    found = comparison.compare(made, first, second, comparison.groups_now(made))
    if json:
        print_json(_plain(found))
        return
    out = console()
    _say(out, f"A: {found.first}")
    _say(out, f"B: {found.second}")
    for pairing in found.pairings:
        _show(out, pairing)
    _alone(out, found)
    _total(out, found)


def _say(out: Console, text: str, style: str | None = None) -> None:
    out.print(text, style=style, markup=False, soft_wrap=True)


def _heading(key: Table) -> str:
    from zoo.leaderboard.page.standings import DIGITS

    return f"{key.track}: {key.recipe}, group {key.group[:DIGITS]}"


def _show(out: Console, pairing: Pairing) -> None:
    """Print what is known of the two in one table."""
    from zoo.leaderboard.page import standings
    from zoo.report.markdown import milliseconds, quantity, size

    key, rows = pairing.table, (pairing.first, pairing.second)
    _say(out, "")
    _say(out, _heading(key), "bold")
    figures = (standings.spread(row.spread, row.attempts) for row in rows)
    lines = [[f"{key.report} {standings.arrow(key)}", *figures, ""]]
    if key.solved is not None:
        sign = "≥" if key.mode == "max" else "≤"
        solved = (f"{row.solved} of {row.attempts}" for row in rows)
        lines.append([f"solved ({sign} {key.solved:g})", *solved, ""])
    lines.append(["lr (tried)", *map(_rate, rows), ""])
    for name, label, write in (
        ("parameters", "parameters", quantity),
        ("flops", "FLOPs", quantity),
        ("state_bytes", "state", size),
        ("step_time_cpu", "step CPU, ms", milliseconds),
        ("step_time_wall", "step wall, ms", milliseconds),
    ):
        ratio = pairing.ratio(name)
        shown = "" if ratio is None else f"{ratio:.3g}"
        lines.append([label, *(write(row.median(name)) for row in rows), shown])
    out.print(table("", "A", "B", "A / B", rows=lines))
    _say(out, f"A - B: {_difference(pairing)}")
    if pairing.stale:
        _say(out, "note: stale, the recipe was changed since; this table counts for nothing")
    if len(pairing.devices) > 1:
        listed = "; ".join(pairing.devices)
        _say(out, f"note: step times of several devices do not compare: {listed}")
    if any(row.failures for row in rows):
        _say(out, f"note: runs without a figure: {_failures(pairing)}")


def _rate(row: Row) -> str:
    from zoo.report.markdown import NONE

    return f"{NONE if row.lr is None else f'{row.lr:g}'} ({len(row.lrs)})"


def _failures(pairing: Pairing) -> str:
    return ", ".join(
        f"{name} {failure.status} at lr {failure.lr:g} seed {failure.seed}"
        for name, row in (("A", pairing.first), ("B", pairing.second))
        for failure in sorted(row.failures)
    )


def _difference(pairing: Pairing) -> str:
    """Paired difference, its interval, and what follows."""
    from zoo.report.markdown import figures

    found = pairing.difference
    if found is None:
        return "no shared seed with a figure: undecided"
    if found.low is None or found.high is None:
        return f"{figures(found.mean, sign=True)[0]} on one shared seed: undecided"
    mean, low, high = figures(found.mean, found.low, found.high, sign=True)
    zero = "excludes zero" if found.excludes_zero else "does not exclude zero"
    return f"{mean} [{low}, {high}] over {found.n} seeds {zero}: {pairing.outcome}"


def _alone(out: Console, found: Comparison) -> None:
    """Name the tables in which only one of them stands."""
    for name, spec in (("A", found.first), ("B", found.second)):
        tables = [_heading(key) for key, standing in found.alone if standing == spec]
        if tables:
            _say(out, "")
            _say(out, f"only {name} stands in", "bold")
            for text in tables:
                _say(out, f"  {text}")


def _total(out: Console, found: Comparison) -> None:
    """Count what came of all tables, by track."""
    from zoo.leaderboard import comparison

    _say(out, "")
    if not found.counted:
        text = "stale tables alone hold both" if found.pairings else "no table holds both"
        _say(out, f"{text}, so nothing can be counted")
        return
    groups = found.groups
    if len(groups) > 1:
        groups["all"] = found.counted
    rows = []
    for name, pairings in groups.items():
        results = comparison.outcomes(pairings).values()
        signs = list(comparison.signs(pairings).values())[:3]
        rows.append([name, *map(str, (len(pairings), *results, *signs))])
    head = ("A in", "tables", "win", "tie", "loss", "undecided", "better", "equal", "worse")
    out.print(table(*head, rows=rows))
    _say(out, "win, loss: the 95 % Student t interval of A - B over the shared seeds excludes zero")
    _say(
        out, "better, equal, worse: the rounded mean of A against that of B, whatever the interval"
    )


def _plain(found: Comparison) -> dict[str, Any]:
    """Return all of it as plain data."""
    from zoo.leaderboard import comparison

    return {
        "first": found.first,
        "second": found.second,
        "tables": [_pairing(pairing) for pairing in found.pairings],
        "alone": [{**key._asdict(), "attention": spec} for key, spec in found.alone],
        "outcomes": comparison.outcomes(found.counted),
        "signs": comparison.signs(found.counted),
        "groups": {
            name: {"outcomes": comparison.outcomes(them), "signs": comparison.signs(them)}
            for name, them in found.groups.items()
        },
    }


def _pairing(pairing: Pairing) -> dict[str, Any]:
    from zoo.leaderboard.comparison import COSTS

    found = pairing.difference
    difference = None
    if found is not None:
        difference = {**found._asdict(), "excludes_zero": found.excludes_zero}
    return {
        **pairing.table._asdict(),
        "first": _row(pairing.first),
        "second": _row(pairing.second),
        "difference": difference,
        "outcome": pairing.outcome,
        "sign": pairing.sign,
        "stale": pairing.stale,
        "ratios": {name: pairing.ratio(name) for name in COSTS},
        "devices": pairing.devices,
    }


def _row(row: Row) -> dict[str, Any]:
    from zoo.leaderboard.comparison import COSTS

    return {
        "values": {str(seed): row.values[seed] for seed in sorted(row.values)},
        "mean": row.spread.mean if row.spread else None,
        "std": row.spread.std if row.spread else None,
        "attempts": row.attempts,
        "solved_seeds": row.solved,
        "lr": row.lr,
        "lrs": list(row.lrs),
        **{name: row.median(name) for name in COSTS},
        "failures": [failure._asdict() for failure in sorted(row.failures)],
    }
