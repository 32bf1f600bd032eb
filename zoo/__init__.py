"""The attention zoo: attention mechanisms by name, each one small readable file.

    import zoo
    zoo.list("*max")
    attn = zoo.create("sliding_window+rope", dim=256, heads=8, causal=True, window=64)
    y = attn(x)                                   # (B, N, C) -> (B, N, C)

Importing this package brings in torch and nothing heavier.
"""

from __future__ import annotations

import importlib
from typing import Any

from zoo import _moved
from zoo.cache import Cache, LayerCache
from zoo.errors import CompatibilityError, ZooError
from zoo.host.attention import Attention, Captured
from zoo.host.collect import auxiliary_losses, capture, padding_mask
from zoo.host.factory import create
from zoo.host.spec import canonical
from zoo.registry import Entry, Paper, Taxonomy, Traits, info, register
from zoo.registry import list_names as list

_moved.install()

__version__ = "0.1.0"
# Reached as attributes too, but imported on first use: they bring heavier libraries.
_LAZY = (
    *("bench", "claims", "datasets", "leaderboard", "metrics", "models", "pictures", "runs"),
    *("statistics", "sweeps", "tasks", "timm"),
)
_LAZY_FUNCTIONS = {"swap": "timm"}
__all__ = [
    "Attention",
    "Cache",
    "Captured",
    "CompatibilityError",
    "Entry",
    "LayerCache",
    "Paper",
    "Taxonomy",
    "Traits",
    "ZooError",
    "auxiliary_losses",
    "canonical",
    "capture",
    "create",
    "info",
    "list",
    "padding_mask",
    "register",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"zoo.{name}")
    if name in _LAZY_FUNCTIONS:
        return getattr(importlib.import_module(f"zoo.{_LAZY_FUNCTIONS[name]}"), name)
    if f"zoo.{name}" in _moved.MODULES:
        return importlib.import_module(f"zoo.{name}")
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")
