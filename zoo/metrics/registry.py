"""The registry of metrics: a decorator on the class; modules are found by walking the package.

Torchmetrics is imported when a metric is first asked for.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from zoo.errors import ZooError, unknown

if TYPE_CHECKING:
    from torchmetrics import Metric

_registered: dict[str, type[Metric]] = {}
M = TypeVar("M", bound="type[Metric]")


@dataclass(frozen=True)
class Info:
    """What is known of a metric without building it.

    Args:
        name: Registered name.
        cls: Its class.
        summary: First line of the docstring.
        options: Every option with its default.
        required: Options without a default.
    """

    name: str
    cls: type[Metric]
    summary: str
    options: Mapping[str, Any]
    required: tuple[str, ...]


def metric(name: str) -> Callable[[M], M]:
    """Class decorator that adds a metric to the registry.

    Args:
        name: Unique snake_case name.

    Raises:
        ZooError: The name is taken or malformed.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ZooError(f"metric name {name!r} is not snake_case, e.g. 'matched_iou'")

    def add(cls: M) -> M:
        if name in _registered:
            owner = _registered[name]
            raise ZooError(
                f"metric name {name!r} is taken by {owner.__module__}.{owner.__qualname__}"
            )
        _registered[name] = cls
        return cls

    return add


@functools.cache
def _discover() -> None:
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")


def names() -> list[str]:
    """Names of all metrics in alphabetical order."""
    _discover()
    return sorted(_registered)


def classes() -> dict[str, type[Metric]]:
    """Classes of all metrics by their own names, such as ``"ForegroundARI"``."""
    _discover()
    return {cls.__name__: cls for cls in _registered.values()}


def info(name: str) -> Info:
    """Describe a metric by its class, summary and options.

    Raises:
        ZooError: Unknown name.
    """
    _discover()
    if name not in _registered:
        raise unknown("metric", name, _registered)
    cls = _registered[name]
    options = {key: item.default for key, item in inspect.signature(cls).parameters.items()}
    missing = inspect.Parameter.empty
    return Info(
        name=name,
        cls=cls,
        summary=(inspect.getdoc(cls) or "").split("\n")[0],
        options={key: value for key, value in options.items() if value is not missing},
        required=tuple(key for key, value in options.items() if value is missing),
    )


def create(name: str, /, **options: Any) -> Metric:
    """Build the metric of that name.

    Args:
        name: Registered name, see :func:`names`.
        options: Options of the metric, see :func:`info`.

    Raises:
        ZooError: Unknown name or option, a missing option, or an impossible value.
    """
    known = info(name)
    allowed = [*known.required, *known.options]
    for option in options:
        if option not in allowed:
            raise unknown(f"option of metric {name!r}", option, allowed)
    for option in known.required:
        if option not in options:
            raise ZooError(f"metric {name!r} needs the option {option!r}; it has no default")
    return known.cls(**options)
