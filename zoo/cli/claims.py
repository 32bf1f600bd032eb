"""`zoo claims`: list the papers' claims, train what one needs, and say whether it holds here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from zoo import checks
from zoo.cli.output import console, notes, table
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.claims.schema import Claim
    from zoo.claims.trials import Found
    from zoo.claims.verdicts import Verdict

RECORDS = Path("runs/records/claims")
WIDE = 120
"""Columns from which on a terminal has room for statements in a table."""


def claims(
    name: Annotated[
        str | None, typer.Argument(help="Name or YAML file of the claim; all are listed without.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", "--jobs", help="Runs at once.")] = 1,
    records: Annotated[
        Path, typer.Option(help="Folder with a folder of records for each claim.")
    ] = RECORDS,
    runs: Annotated[Path, typer.Option(help="Folder of the run folders.")] = Path("runs"),
    verdict_only: Annotated[
        bool, typer.Option("--verdict-only", help="Train nothing; judge the records there are.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """List the claims of papers, or train what one of them lacks and judge it."""
    from zoo.claims import trials as claims

    if name is None:
        _list(records)
        return
    checks.whole("workers", workers)
    found = claims.find(name)
    folder = records / found.name
    claims.refuse_changed(found, folder)
    _introduce(found, folder)
    _recall(found.name, folder)
    failed = 0
    if not verdict_only and not _out_of_reach(found.claim):
        result = claims.carry_out(found, folder, runs=runs, jobs=workers, progress=not quiet)
        notes().print(result.report(), markup=False, soft_wrap=True)
        failed = result.exit_code
        if result.pending:
            raise typer.Exit(failed)
    _conclude(claims.conclude(found, folder), folder)
    _offer(found)
    if failed:
        raise typer.Exit(failed)


def _out_of_reach(stated: Claim) -> bool:
    """Whether the runs need a device that this machine lacks."""
    import torch

    return stated.needs == "gpu" and not torch.cuda.is_available()


def _published() -> Path:
    """Return the folder of the claims whose verdicts ship with the library."""
    from zoo.claims.trials import FOLDER
    from zoo.resources import folder

    return folder("data") / "runs" / FOLDER


def _list(records: Path) -> None:
    """Show every claim that ships, with its verdict: one of this place, else the published one."""
    from zoo.claims import recipes, verdicts
    from zoo.claims import trials as claims

    rows, origins = [], set()
    for name in claims.names():
        stated = recipes.claim(name)
        if stated is None:
            raise ZooError(f"recipe {name!r} stands among the claims but states none")
        judged, origin = verdicts.stated(records / name), "here"
        if judged is None and records == RECORDS:
            judged, origin = verdicts.stated(_published() / name), "published"
        outcome = "" if judged is None else judged.outcome
        if judged is not None and judged.hash != stated.hash:
            outcome = f"stale ({outcome})"
        origin = origin if outcome else ""
        origins.add(origin)
        rows.append([name, stated.mechanism, outcome, origin, stated.statement])
    if not rows:
        notes().print("no claims ship with this installation", soft_wrap=True)
        return
    _print(console(), rows)
    texts = {
        "here": f"here: judged in {records}",
        "published": "published: judged in data/runs/claims, which ships with the library; "
        "'zoo claims NAME --jobs 2' runs one again in a folder of its own",
        "": "without a verdict: 'zoo claims NAME --jobs 2' makes one",
    }
    for origin, text in texts.items():
        if origin in origins:
            notes().print(text, markup=False, soft_wrap=True)


def _print(out: Console, rows: list[list[str]]) -> None:
    """Print claims as a table; on a narrow terminal, statements under their names."""
    if not sys.stdout.isatty() or out.width >= WIDE:
        out.print(table("claim", "mechanism", "verdict", "from", "statement", rows=rows))
        return
    for name, mechanism, outcome, origin, statement in rows:
        judged = ": ".join(word for word in (origin, outcome) if word)
        out.print(Text.assemble((name, "bold"), f" ({mechanism}) {judged}"), soft_wrap=True)
        out.print(Padding(Text(statement), (0, 0, 0, 2)))


def _recall(name: str, folder: Path) -> None:
    """Say what was published of a claim, where its records are to be made elsewhere."""
    from zoo.claims import verdicts

    published = _published() / name
    before = verdicts.stated(published)
    if before is not None and published.resolve() != folder.resolve():
        text = f"published verdict: {before.outcome} (data/runs/claims/{name})"
        console().print(text, markup=False, soft_wrap=True)


def _offer(found: Found) -> None:
    """Say how to run a claim anew although it has its records."""
    text = (
        f"to run it anew: zoo claims {found.recipe} --jobs 2 --records runs/anew/claims "
        "--runs runs/anew"
    )
    notes().print(text, markup=False, soft_wrap=True)


def _introduce(found: Found, folder: Path) -> None:
    """Say what is to be shown before anything is known of it."""
    stated, out = found.claim, console()
    lines = [f"claim: {stated.statement}", f"source: {stated.source}"]
    lines += [f"requires: {text}" for text in stated.requires]
    lines += [f"criterion: {text}" for text in stated.criterion]
    every = [run for ids in found.ids.values() for run in ids]
    there = sum((folder / f"{run}.json").is_file() for run in every)
    lines += [
        f"runs: {len(found.ids)} variants ({', '.join(found.ids)}) at {stated.seeds} seeds, "
        f"{there} of {len(every)} done before"
    ]
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)


def _conclude(verdict: Verdict, folder: Path) -> None:
    """Show the figures, what holds on which seed, and the verdict."""
    from zoo.claims.verdicts import FILE
    from zoo.leaderboard.page.claim_table import figure_text

    out, shorts = console(), list(verdict.claim.figures)
    if verdict.ids:
        rows = [
            [variant, *(figure_text(verdict, variant, short) for short in shorts)]
            for variant in verdict.ids
        ]
        out.print(table("variant", *shorts, rows=rows))
        for text, holds in zip(verdict.claim.requires, verdict.requires, strict=True):
            out.print(f"{_word(holds)}: requires {text}", markup=False, soft_wrap=True)
        for text, seeds in zip(verdict.claim.criterion, verdict.criterion, strict=True):
            words = " ".join(map(_word, seeds))
            out.print(f"{words}: {text}", markup=False, soft_wrap=True)
    out.print(f"verdict: {verdict.outcome} ({verdict.why})", markup=False, soft_wrap=True)
    notes().print(f"wrote {folder / FILE}", markup=False, soft_wrap=True)


def _word(holds: bool | None) -> str:
    return {True: "yes", False: "no", None: "open"}[holds]
