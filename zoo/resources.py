"""Where recipes/ and data/ are: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from zoo.errors import ZooError


def folder(name: str) -> Path:
    """Folder of the YAML files.

    Args:
        name: ``"recipes"`` or ``"data"``.

    Raises:
        ZooError: The installation lacks the folder.
    """
    package = Path(str(resources.files("zoo")))
    for path in (package / f"_{name}", package.parent / name):
        if path.is_dir():
            return path
    raise ZooError(f"folder {name!r} is missing from this installation of attention-zoo")
