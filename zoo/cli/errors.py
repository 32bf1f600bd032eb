"""What becomes of a mistake: one line on standard error and an exit code.

0    done
1    a run or a contender failed, or a page is out of date
2    the user asked for something impossible, or a file could not be written
130  interrupted
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from zoo.errors import ZooError, unknown

# typer carries its own copy of click from some version on, or brings click itself; both derive
# their errors from the classes around this one.
UsageError: Any = typer.BadParameter.__mro__[1]
ClickError: Any = typer.BadParameter.__mro__[2]

INTERRUPTED = 130


class Failed(Exception):
    """Something that was to run has failed; the message is one readable line."""


class Commands(TyperGroup):
    """The commands, with unknown ones answered by the nearest and errors by one line."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """See `click.Group.resolve_command`.

        Raises:
            ZooError: No such command.
        """
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            shown = [name for name, command in self.commands.items() if not command.hidden]
            raise unknown("command", args[0], shown)
        return super().resolve_command(ctx, args)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """See `click.Command.main`; `--debug` is taken from any place before a ``--``."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        debug = "--debug" in words[:end]
        words = [word for word in words[:end] if word != "--debug"] + words[end:]
        try:
            code = super().main(words, prog_name or "zoo", complete_var, False, **extra) or 0
            if code == INTERRUPTED:
                typer.echo("zoo: error: interrupted", err=True)
        except SystemExit:
            raise
        except BaseException as error:
            code = _answer(error, debug)
        if standalone_mode:
            sys.exit(code)
        return code


def _answer(error: BaseException, debug: bool) -> int:
    """Say what went wrong and return the exit code; what is not the user's doing goes on."""
    code, text = _meaning(error)
    if debug:
        traceback.print_exception(error)
    if text is not None:
        typer.echo(f"zoo: error: {' '.join(text.split())}", err=True)
    return code


def _meaning(error: BaseException) -> tuple[int, str | None]:
    if isinstance(error, Failed):
        return 1, str(error)
    if isinstance(error, ZooError):
        return 2, str(error)
    if isinstance(error, UsageError):
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(error.format_message())
            return 2, None
        path = error.ctx.command_path if error.ctx is not None else "zoo"
        return 2, f"{_lowered(error.format_message()).rstrip('.')}; see '{path} --help'"
    if isinstance(error, ClickError):
        return 2, _lowered(error.format_message())
    if isinstance(error, typer.Abort):
        return INTERRUPTED, "interrupted"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return 2, f"{where}{error.strerror or error}"
    raise error


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Show warnings as one line each, and end quietly when the reader of a pipe has gone."""

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        typer.echo(f"zoo: warning: {' '.join(str(message).split())}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            yield
            sys.stdout.flush()
        except BrokenPipeError:
            # Python flushes once more at its end; that must not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
