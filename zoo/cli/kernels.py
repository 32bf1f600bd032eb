"""`zoo kernels`: are the Triton kernels right on this card, and how fast are they."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from zoo.cli.errors import Failed
from zoo.cli.measure import _numbers
from zoo.cli.output import notes


def kernels(
    only: Annotated[
        list[str] | None, typer.Argument(help="Cases, or beginnings of their names; default all.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens N, separated by commas; default 1k to 128k.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    seconds: Annotated[float, typer.Option(help="No new cell is begun after this long.")] = 420.0,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Tiny sizes in Triton's interpreter, without a card.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder of the record.")] = Path("runs/kernels"),
) -> None:
    """Check every Triton kernel against its reference, then time the right ones."""
    if smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
    from zoo.bench import kernel_report as reporting
    from zoo.bench import kernels as measuring

    chosen = {} if lengths is None else {"lengths": _numbers(lengths)}
    plan = measuring.Plan(only=only or [], dtype=dtype, seconds=seconds, smoke=smoke, **chosen)
    report = measuring.measure(plan, lambda line: notes().print(line))
    content = reporting.as_json(report)
    typer.echo(reporting.tables(content))
    notes().print(f"wrote {reporting.save(content, output)}", soft_wrap=True)
    wrong = dict.fromkeys(check.case for check in report.checks if not check.right)
    if wrong:
        raise Failed(f"wrong results: {', '.join(wrong)}; the table says how far off")
