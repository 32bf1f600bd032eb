"""Models that host attention, by name: a decoder for sequences, timm's ViT and ResNet."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from zoo.errors import ZooError, unknown

# Where each model lives; imported on demand because the vision models bring in timm.
_MODELS = {
    "decoder_lm": "zoo.models.decoder_lm:DecoderLM",
    "vit": "zoo.models.vision:vit",
    "resnet": "zoo.models.vision:resnet",
}


def names() -> list[str]:
    """Names of the models."""
    return sorted(_MODELS)


def factory(name: str) -> Callable[..., nn.Module]:
    """Class or function that builds a model.

    Raises:
        ZooError: Unknown name.
    """
    if name not in _MODELS:
        raise unknown("model", name, _MODELS)
    module, _, attribute = _MODELS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


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
