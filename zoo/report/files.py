"""Text files that are whole at every moment."""

from __future__ import annotations

import contextlib
import os
import secrets
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
    draft = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(draft, "x", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except BaseException:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise
    except OSError as error:
        why = error.strerror or error
        raise ZooError(f"cannot write {path.name} in the folder {path.parent}: {why}") from None
    return path
