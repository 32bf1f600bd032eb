"""Models that host attention, by name: a decoder for sequences, timm's networks, models of slots.

A model registers itself where it is written, with ``@model("name")``; modules are found by walking
this package when a model is first asked for, since some of them bring in timm.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from zoo.errors import CompatibilityError, ZooError, unknown
from zoo.host.spec import parse
from zoo.registry import KINDS, SOCKETS

TOKEN_MIXERS = (*SOCKETS, "mixer")
"""Kinds that make a layer on tokens (B, N, C)."""


@dataclass(frozen=True)
class Registered:
    """What is known of a model without building it.

    Args:
        make: Class or function that builds it.
        kinds: Kinds of mechanism that it hosts.
        facts: Parameters that the data decide, not the user.
        causal: Whether a token sees earlier ones only.
    """

    make: Callable[..., nn.Module]
    kinds: tuple[str, ...]
    facts: tuple[str, ...]
    causal: bool = False


_models: dict[str, Registered] = {}
F = TypeVar("F", bound=Callable[..., nn.Module])


def model(
    name: str,
    *,
    kinds: tuple[str, ...] = TOKEN_MIXERS,
    facts: tuple[str, ...] = ("vocab_size", "num_outputs", "num_classes", "image_shape"),
    causal: bool = False,
) -> Callable[[F], F]:
    """Decorator that registers a class or function that builds a model.

    Args:
        name: Unique name.
        kinds: Kinds of mechanism that its parameter `attention` takes.
        facts: Parameters that the data decide, as their `model_facts` says them; recipes do not
            have them as options.
        causal: Whether a token sees earlier ones only.

    Raises:
        ZooError: The name is taken, or a kind is unknown.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise unknown("kind", kind, KINDS)

    def add(make: F) -> F:
        if name in _models:
            raise ZooError(f"model name {name!r} is taken by {_models[name].make.__module__}")
        _models[name] = Registered(make, kinds, facts, causal)
        return make

    return add


def _discover() -> None:
    for item in _modules():
        importlib.import_module(item)


def _modules() -> list[str]:
    """Dotted names of all modules below this package."""
    return [item.name for item in pkgutil.walk_packages(__path__, __name__ + ".")]


def names() -> list[str]:
    """Names of the models."""
    _discover()
    return sorted(_models)


def info(name: str) -> Registered:
    """What is known of a model.

    Raises:
        ZooError: Unknown name.
    """
    if name not in _models:
        for module in _modules():
            if module.rpartition(".")[2] == name:
                importlib.import_module(module)  # spares a decoder the import of timm
    if name not in _models:
        _discover()
    if name not in _models:
        raise unknown("model", name, _models)
    return _models[name]


def factory(name: str) -> Callable[..., nn.Module]:
    """Class or function that builds a model.

    Raises:
        ZooError: Unknown name.
    """
    return info(name).make


def facts_of(name: str) -> list[str]:
    """Return which of the parameters of a model the data decide.

    Raises:
        ZooError: Unknown name.
    """
    known = info(name)
    return [key for key in inspect.signature(known.make).parameters if key in known.facts]


def check_hosted(name: str, attention: str) -> None:
    """Refuse a mechanism of a kind that a model cannot host, before anything is built.

    Args:
        name: Name of the model.
        attention: Specification.

    Raises:
        ZooError: Unknown model or mechanism.
        CompatibilityError: The model hosts other kinds.
    """
    kinds = tuple(kind for kind in info(name).kinds if kind not in SOCKETS)
    for part in parse(attention):
        kind = part.entry.kind
        if ("mixer" if kind in SOCKETS else kind) not in kinds:
            hosted = ", ".join("token mixer" if k == "mixer" else k for k in kinds)
            raise CompatibilityError(
                f"{part.name!r} is of kind {kind!r}, but the model {name!r} hosts: {hosted}"
            )


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
