"""The command line: `zoo list`, `info`, `run`, `sweep`, `claims`, `leaderboard`, `compare` ...

A command imports what it needs when it is called, so that `zoo list` is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from zoo.cli import browse, claims, cluster, compare, doctor, kernels, measure, training
from zoo.cli.errors import Commands, guarded

app = typer.Typer(
    name="zoo",
    cls=Commands,
    help="The attention zoo: look up mechanisms, train, compare, measure and draw them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        import zoo

        typer.echo(f"zoo {zoo.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error came from; works in any place.")
    ] = False,
) -> None:
    """Declare the options of every command; `Commands` takes `--debug` out of any place."""


for _command in (
    *(browse.list_, browse.info, training.run, training.sweep, claims.claims),
    *(training.leaderboard, compare.compare, training.sample, measure.show, measure.bench),
    *(kernels.kernels, doctor.doctor),
):
    app.command(
        name=_command.__name__.strip("_"),
        cls=cluster.RayCommand if _command is training.sweep else None,
    )(_command)
app.command(name="claim", hidden=True)(claims.claims)  # its former name


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code.

    Args:
        arguments: The words after ``zoo``; default those of the process.
    """
    with guarded():
        sys.exit(app(args=arguments, prog_name="zoo"))
