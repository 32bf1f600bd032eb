"""The registry of data sets: a decorator on the class, everything else reads from it."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from zoo.datasets.base import DataModule
from zoo.errors import ZooError, unknown

_registered: dict[str, type[DataModule]] = {}
D = TypeVar("D", bound=type[DataModule])


@dataclass(frozen=True)
class Info:
    """What is known of a data set without building it.

    Args:
        name: Registered name.
        task: Name of the task, see `zoo.tasks`.
        summary: First line of the docstring.
        options: Every option with its default.
        required: Options without a default.
        needs: What it takes beside this library, such as files; empty if nothing.
    """

    name: str
    task: str
    summary: str
    options: Mapping[str, Any]
    required: tuple[str, ...]
    needs: str = ""


def dataset(name: str) -> Callable[[D], D]:
    """Class decorator that adds a data module to the registry.

    Args:
        name: Unique snake_case name.

    Raises:
        ZooError: The name is taken or malformed.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ZooError(f"data set name {name!r} is not snake_case, e.g. 'selective_copy'")

    def add(cls: D) -> D:
        if name in _registered:
            owner = _registered[name]
            raise ZooError(
                f"data set name {name!r} is taken by {owner.__module__}.{owner.__qualname__}; "
                "choose another name"
            )
        cls.name = name
        _registered[name] = cls
        return cls

    return add


@functools.cache
def _discover() -> None:
    package = importlib.import_module(__package__)
    for module in pkgutil.walk_packages(package.__path__, f"{__package__}."):
        importlib.import_module(module.name)


def _find(name: str) -> type[DataModule]:
    _discover()
    if name not in _registered:
        raise unknown("data set", name, _registered)
    return _registered[name]


def names() -> list[str]:
    """Names of all data sets in alphabetical order."""
    _discover()
    return sorted(_registered)


def info(name: str) -> Info:
    """Describe a data set by its task, summary and options.

    Raises:
        ZooError: Unknown name.
    """
    cls = _find(name)
    options = {f.name: f.default for f in fields(cls) if f.init}
    return Info(
        name=name,
        task=cls.task,
        summary=(inspect.getdoc(cls) or "").split("\n")[0],
        options={key: value for key, value in options.items() if value is not MISSING},
        required=tuple(key for key, value in options.items() if value is MISSING),
        needs=cls.needs,
    )


def create(name: str, **options: Any) -> DataModule:
    """Build the data module of that name.

    Args:
        name: Registered name, see :func:`names`.
        options: Options of the data set, see :func:`info`.

    Raises:
        ZooError: Unknown name or option, a missing option, or an impossible value.
    """
    known = info(name)
    for option in options:
        if option not in known.options and option not in known.required:
            raise unknown(f"option of data set {name!r}", option, [*known.options, *known.required])
    for option in known.required:
        if option not in options:
            raise ZooError(f"data set {name!r} needs the option {option!r}; it has no default")
    return _find(name)(**options)


def from_yaml(path: str | Path, **overrides: Any) -> DataModule:
    """Build the data module that a YAML file under ``data/`` describes.

    Args:
        path: File with the keys ``name``, ``description`` and ``options``.
        overrides: Options that replace those of the file.

    Raises:
        ZooError: The file is missing, is not such a mapping, or asks for something impossible.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise ZooError(f"data file {str(path)!r} cannot be read: {error}") from error
    if not isinstance(content, dict) or "name" not in content:
        raise ZooError(f"data file {str(path)!r} needs the key 'name', the registered data set")
    allowed = ("name", "description", "options")
    for key in content:
        if key not in allowed:
            raise unknown(f"key in data file {str(path)!r}", key, allowed)
    options = content.get("options") or {}
    if not isinstance(options, dict):
        raise ZooError(f"options in data file {str(path)!r} is {options!r}; allowed: a mapping")
    return create(str(content["name"]), **{**{str(k): v for k, v in options.items()}, **overrides})
