"""Slots: a few vectors that compete for many inputs, one file each."""

from __future__ import annotations

from zoo.slots._video import SlotVideo

__all__ = ["SlotVideo"]
