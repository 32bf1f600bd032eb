"""Text files that are whole at every moment."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from zoo.errors import ZooError


def replace_text(path: str | Path, text: str) -> Path:
    """Put a text file in place in one step, so that a reader sees the old or the new one whole.

    Args:
        path: The file; its folder is created.
        text: All of its content, written as UTF-8.

    Raises:
        ZooError: The folder or the file cannot be written.
    """
    path = Path(path)
    replace_texts({path: text})
    return path


def replace_texts(texts: Mapping[Path, str]) -> None:
    """Put text files in place, each in one step, and none before all of them lie on the disk.

    Args:
        texts: All of their contents by path, in the order in which they take their places; their
            folders are created.

    Raises:
        ZooError: A folder or a file cannot be written; drafts and new folders are taken away.
    """
    drafts: dict[Path, Path] = {}
    made: list[Path] = []
    path = Path()
    try:
        try:
            for path, text in texts.items():
                if path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                made += [one for one in (path.parent, *path.parent.parents) if not one.exists()]
                path.parent.mkdir(parents=True, exist_ok=True)
                drafts[path] = path.with_name(f".{secrets.token_hex(8)}.tmp")
                with open(drafts[path], "x", encoding="utf-8", newline="\n") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
            for path, draft in drafts.items():
                os.replace(draft, path)
        except BaseException:
            for draft in drafts.values():
                with contextlib.suppress(OSError):
                    draft.unlink()
            # The innermost first; one that somebody else has put something into stays.
            for folder in sorted(made, key=lambda one: -len(one.parts)):
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
    except OSError as error:
        why = error.strerror or error
        raise ZooError(f"cannot write {path.name} in the folder {path.parent}: {why}") from None
