"""Models that host attention, by name: a decoder for sequences, timm's ViT and ResNet.

A model registers itself where it is written, with ``@model("name")``; modules are found by walking
this package when a model is first asked for, since some of them bring in timm.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from zoo.errors import ZooError, unknown

_models: dict[str, Callable[..., nn.Module]] = {}
F = TypeVar("F", bound=Callable[..., nn.Module])


def model(name: str) -> Callable[[F], F]:
    """Decorator that registers a class or function that builds a model.

    Raises:
        ZooError: The name is taken.
    """

    def add(make: F) -> F:
        if name in _models:
            raise ZooError(f"model name {name!r} is taken by {_models[name].__module__}")
        _models[name] = make
        return make

    return add


def _discover() -> None:
    for item in pkgutil.iter_modules(__path__, __name__ + "."):
        importlib.import_module(item.name)


def names() -> list[str]:
    """Names of the models."""
    _discover()
    return sorted(_models)


def factory(name: str) -> Callable[..., nn.Module]:
    """Class or function that builds a model.

    Raises:
        ZooError: Unknown name.
    """
    own = f"{__name__}.{name}"
    if name not in _models and name.isidentifier() and importlib.util.find_spec(own):
        importlib.import_module(own)  # spares a decoder the import of timm
    if name not in _models:
        _discover()
    if name not in _models:
        raise unknown("model", name, _models)
    return _models[name]


def create(name: str, /, **options: Any) -> nn.Module:
    """Build a model by name.

    Raises:
        ZooError: Unknown name or option, or a missing one.
    """
    make = factory(name)
    signature = inspect.signature(make)
    for option in options:
        if option not in signature.parameters:
            raise unknown(f"option of model {name!r}", option, signature.parameters)
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ZooError(f"model {name!r}: {error}") from None
    return make(**options)
