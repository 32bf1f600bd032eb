"""`zoo claim`: train what a paper's claim needs, and say whether it was reproduced."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zoo.cli.output import console, notes, table
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.runs.claim_schema import Claim
    from zoo.runs.claims import Found
    from zoo.runs.verdicts import Verdict


def claim(
    name: Annotated[
        str | None, typer.Argument(help="Name or YAML file of the claim; all are listed without.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", "--jobs", help="Runs at once.")] = 1,
    records: Annotated[
        Path, typer.Option(help="Folder with a folder of records for each claim.")
    ] = Path("runs/records/claims"),
    runs: Annotated[Path, typer.Option(help="Folder of the run folders.")] = Path("runs"),
    verdict_only: Annotated[
        bool, typer.Option("--verdict-only", help="Train nothing; judge the records there are.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Train every variant of a claim that has no record yet, and judge the claim."""
    from zoo.runs import claims

    if name is None:
        _list(records)
        return
    if workers < 1:
        raise ZooError(f"workers is {workers}; it must be at least 1")
    found = claims.find(name)
    folder = records / found.name
    claims.refuse_changed(found, folder)
    _introduce(found, folder)
    failed = 0
    if not verdict_only and not _out_of_reach(found.claim):
        result = claims.carry_out(found, folder, runs=runs, jobs=workers, progress=not quiet)
        notes().print(result.report(), markup=False, soft_wrap=True)
        failed = result.exit_code
        if result.pending:
            raise typer.Exit(failed)
    _conclude(claims.conclude(found, folder), folder)
    if failed:
        raise typer.Exit(failed)


def _out_of_reach(stated: Claim) -> bool:
    """Whether the runs need a device that this machine lacks."""
    import torch

    return stated.needs == "gpu" and not torch.cuda.is_available()


def _list(records: Path) -> None:
    """Show every claim that ships, with its verdict if there is one."""
    from zoo.runs import claims, config, verdicts

    rows = []
    for name in claims.names():
        stated = config.claim(name)
        if stated is None:
            raise ZooError(f"recipe {name!r} stands among the claims but states none")
        judged = verdicts.stated(records / name)
        outcome = "" if judged is None else judged.outcome
        if judged is not None and judged.hash != stated.hash:
            outcome = f"stale ({outcome})"
        rows.append([name, stated.mechanism, outcome, stated.statement])
    if not rows:
        notes().print("no claims ship with this installation", soft_wrap=True)
        return
    console().print(table("claim", "mechanism", "verdict", "statement", rows=rows))


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
    from zoo.runs.claim_table import figure_text
    from zoo.runs.verdicts import FILE

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
