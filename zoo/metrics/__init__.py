"""Figures of quality as torchmetrics classes, by name.

    metric = zoo.metrics.create("matched_iou", joint=True)
    metric.update(predicted, masks)
    metric.compute()

The classes are attributes as well: ``zoo.metrics.MatchedIoU(joint=True)``. They and torchmetrics
are imported when one is first asked for.
"""

from __future__ import annotations

from typing import Any

from zoo.metrics.registry import Info, classes, create, info, metric, names

__all__ = ["Info", "create", "info", "metric", "names"]


def __getattr__(name: str) -> Any:
    if name[:1].isupper() and name in (found := classes()):
        return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *classes()})
