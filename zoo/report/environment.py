"""Where a run happened: versions, device and commit, as a record keeps them.

Nothing here fails for want of a program, a package or a checkout: what cannot be known is null or
says so.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).parents[1]
_DISTRIBUTIONS = {
    "torch": "torch",
    "lightning": "lightning",
    "timm": "timm",
    "zoo": "attention-zoo",
}


def versions() -> dict[str, str]:
    """Return the versions of Python, torch, lightning, timm and zoo."""
    found = {"python": platform.python_version()}
    for name, distribution in _DISTRIBUTIONS.items():
        try:
            found[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def device(name: str | torch.device = "cpu") -> dict[str, Any]:
    """Describe a device as its type, its model and the processor threads that torch uses.

    Args:
        name: The device, such as `"cpu"` or `"cuda:0"`.
    """
    kind = torch.device(name)
    model = torch.cuda.get_device_name(kind) if kind.type == "cuda" else processor()
    return {"type": kind.type, "name": model, "threads": torch.get_num_threads()}


def processor(cpuinfo: str | Path = "/proc/cpuinfo") -> str:
    """Return the model of the processor.

    Args:
        cpuinfo: Where Linux describes it; elsewhere the platform's own word is taken.
    """
    try:
        text = Path(cpuinfo).read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name[ \t]*:[ \t]*(\S.*)$", text, re.MULTILINE)
    model = found[1] if found else platform.processor() or platform.machine() or "unknown"
    return " ".join(model.split())


def commit(folder: str | Path = _PACKAGE) -> str | None:
    """Return the commit of a folder of source, with `-dirty` if a tracked file was changed.

    A folder whose files the checkout around it does not track (an installed package inside
    somebody's project) has no commit.

    Args:
        folder: A folder of Python files under version control.
    """
    if not _git(folder, "ls-files", "--", "*.py"):
        return None
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None


def _git(folder: str | Path, *arguments: str) -> str:
    """Return what git prints about a folder; nothing if it cannot be asked."""
    # A hook runs with variables that point git at another index or folder.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            env={**environment, "GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
