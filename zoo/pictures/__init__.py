"""Pictures of attention and of what models make."""

from __future__ import annotations

from typing import Any

from zoo import _moved


def __getattr__(name: str) -> Any:
    return _moved.content(__name__, name)
