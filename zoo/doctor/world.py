"""What lies outside this machine, asked for once and only if something needs it."""

from __future__ import annotations

import functools
import os
import urllib.request
from dataclasses import dataclass

from zoo.doctor.lines import reason

PATIENCE = 1.5
"""Seconds to wait for the hub."""


@dataclass
class World:
    """The hub of data sets, which is asked for a connection and for nothing else.

    Args:
        patience: Seconds to wait for it.
    """

    patience: float = PATIENCE

    @functools.cached_property
    def silence(self) -> str:
        """Why the hub does not answer; empty if it does."""
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            return "HF_HUB_OFFLINE is set"
        try:
            from zoo.datasets import hub

            return "" if hub.reachable(self.patience) else "no network, or the hub is down"
        except Exception as error:  # it stands on a library of its own
            return f"it cannot be asked: {reason(error)}"

    @property
    def answer(self) -> str:
        """How the hub answers, where it does."""
        proxy = "https" in urllib.request.getproxies()
        return "behind a proxy, which was not asked" if proxy else "which answers"
